"""What every reader of labelled texts returns, and the checks that they share."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Example(NamedTuple):
    """One text, or a pair of texts, and what is to be said of it."""

    text: str
    pair: str | None
    """The second text; None where there is one text only."""
    label: int | float | None
    """Number of the class, or the score; None where it is not known."""
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  (tuple has a method of this name)
    """The benchmark's own number of the example, else its place in the file, counted from 0."""


def class_number(name: str, labels: Sequence[str], where: str) -> int:
    """The place of `name` among `labels`; `where` (file and line) begins the message of the ValueError."""
    if name not in labels:
        raise ValueError(f"{where}: label {name!r} is none of {', '.join(map(repr, labels))}; correct the row")
    return labels.index(name)


def score(value: str, where: str, lowest: float = -math.inf, highest: float = math.inf) -> float:
    """`value` as a finite number, lowest to highest; `where` (file and line) begins the message of the ValueError."""
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"{where}: score {value!r} is not a number; correct the row") from None
    if not math.isfinite(number):
        raise ValueError(f"{where}: score {value!r} is not finite; correct the row")
    if not lowest <= number <= highest:
        raise ValueError(f"{where}: score {value!r} is outside {lowest:g} to {highest:g}; correct the row")
    return number


def decode(content: bytes, where: Path | str) -> str:
    """UTF-8 bytes as text, without a byte-order mark.

    Raises:
        ValueError: not UTF-8; the message names the line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{where}, line {line}: not UTF-8 text ({error.reason}); convert the file") from None
