"""Reading bytes: the film reviews of IMDB, as Long Range Arena classifies them (byte by byte, 4,000 of each)."""

from pathlib import Path

import numpy as np

from nystrom.data import reviews
from nystrom.data.lra.sequences import Sequences


def tokens(text: str | bytes, length: int) -> np.ndarray:
    """The first bytes, each one higher, so that 0 is free for padding; uint16."""
    content = text.encode() if isinstance(text, str) else text
    return np.frombuffer(content[:length], np.uint8).astype(np.uint16) + 1


def read(data: Path | None, split: str, length: int) -> Sequences:
    """The reviews of a split (train or test), labelled 0 where negative, 1 where positive.

    Raises:
        FileNotFoundError, OSError, ValueError: as `nystrom.data.reviews.read`.
    """
    found = reviews.read(data, split)
    labels = np.array([example.label for example in found], np.uint8)
    return Sequences(labels, [tokens(example.text, length) for example in found])
