"""Texts of one length, in tokens, drawn from files: what a model is measured on."""

import random
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from nystrom.data.text import text_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Texts(NamedTuple):
    """Texts of equal length, none of them padded."""

    ids: Int[Tensor, "t n"]
    labels: Int[Tensor, " t"]
    """Which of the paths each is from, from 0; the paths take turns."""


def draw(
    tokenizer: "PreTrainedTokenizerBase", paths: tuple[Path, ...], length: int, count: int, *, seed: int, join: bool
) -> Texts:
    """The first `count` texts of at least `length` tokens, cut there, in an order shuffled by the seed.

    Args:
        tokenizer: its special tokens count.
        paths: files or folders, a class each; one document per file.
        length: of every text (tokens).
        count: texts (count).
        seed: of the order, within each class; classes take turns.
        join: put documents of a class one after another until they fill the length.

    Raises:
        ValueError: there are fewer; a file is not UTF-8 text; a file belongs to two classes.
        FileNotFoundError: a path does not exist.
    """
    classes = [text_files([path]) for path in paths]
    for (a, some), (b, others) in combinations(zip(paths, classes, strict=True), 2):
        if both := set(some) & set(others):
            raise ValueError(f"{a} and {b} are to be two classes, and both hold {min(both)}")
    for files in classes:
        random.Random(seed).shuffle(files)
    left = {label: _long_enough(tokenizer, files, length, join) for label, files in enumerate(classes)}
    found: list[tuple[list[int], int]] = []
    while left and len(found) < count:
        for label in list(left):
            if (ids := next(left[label], None)) is None:
                del left[label]
            elif len(found) < count:
                found.append((ids, label))
    if len(found) < count:
        where, fix = ", ".join(map(str, paths)), "pass fewer texts" + ("" if join else ", a smaller --length or --join")
        raise ValueError(f"{where}: {len(found)} texts have at least {length} tokens: {count} were asked for; {fix}")
    ids, labels = zip(*found, strict=True)
    return Texts(torch.tensor(ids), torch.tensor(labels))


def _long_enough(
    tokenizer: "PreTrainedTokenizerBase", files: list[Path], length: int, join: bool
) -> Iterator[list[int]]:
    """The texts that fill the length, cut there."""
    held = ""
    for path in files:
        held = f"{held}\n\n{_read(path)}" if held else _read(path)
        ids = tokenizer(held, truncation=True, max_length=length, verbose=False)["input_ids"]
        if len(ids) == length:
            yield ids
        if len(ids) == length or not join:
            held = ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text: {error.reason} at offset {error.start}; convert it, or leave it out of --text"
        ) from None
