"""What there is to train on, to choose by and to score, of each task of Long Range Arena."""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nystrom.data.lra import images, listops, listops_files, pathfinder, pathfinder_files, retrieval, text
from nystrom.data.lra.listops import Expressions
from nystrom.data.lra.sequences import Sequences, cached

DEV = 0.1
"""Part of the training examples, where there is no dev set."""


class Splits(NamedTuple):
    """The examples of a task."""

    task: str
    """What reports call it."""
    train: Sequences
    dev: Sequences
    test: Sequences

    def limited(self, dev: int | None, test: int | None) -> "Splits":
        """With so many to choose by and to score, drawn at random, the same in every run; None: all."""
        return self._replace(dev=self.dev.draw(dev, "dev"), test=self.test.draw(test, "test"))


def list_ops(data: Path | None, cache: Path, processes: int) -> Splits:
    """ListOps of Long Range Arena's files, or made here, with seed 0.

    Raises:
        FileNotFoundError, ValueError: as `listops_files.read`; the cache is damaged.
    """
    if data is not None:
        return Splits("listops", *(_expressions(listops_files.read(data, name)) for name in listops.SIZES))
    made = {"law": 1, "seed": 0, "sizes": dict(listops.SIZES)}

    def make() -> Sequences:
        return _expressions(listops.generate(sum(listops.SIZES.values()), 0, processes=processes))

    everything = cached(cache / "listops.npz", made, make)
    ends = np.cumsum([0, *listops.SIZES.values()])
    return Splits("listops", *(everything.pick(range(a, b)) for a, b in pairwise(ends)))


def _expressions(found: Expressions) -> Sequences:
    return Sequences(found.labels, np.split(found.tokens, found.offsets[1:-1]))


def reviews(data: Path | None, length: int, dev_is_test: bool) -> Splits:
    """The film reviews; a tenth of the training ones are set aside as dev set, or the test set is the dev set too."""
    train, test = (text.read(data, split, length) for split in ("train", "test"))
    if dev_is_test:
        return Splits("text", train, test, test)
    train, dev = train.divide(DEV)
    return Splits("text", train, dev, test)


def papers(data: Path, length: int) -> Splits:
    """Long Range Arena's pairs where its files are there, else pairs of our own, which are called aan-subset."""
    names = ("train", "dev", "test")
    if (data / retrieval.FILES["train"]).is_file():
        return Splits("retrieval", *(retrieval.read(data, name, length) for name in names))
    return Splits("aan-subset", *(retrieval.build(data, name, length) for name in names))


def pictures(data: Path | None) -> Splits:
    """CIFAR-10; the last tenth of the training images is the dev set."""
    found = [images.read(data, split) for split in images.SPLITS]
    train, test = (_sequences(part) for part in found)
    cut = len(train) - round(DEV * len(train))
    return Splits("image", train.pick(range(cut)), train.pick(range(cut, len(train))), test)


def paths(data: Path | None, side: int, count: int, cache: Path, processes: int) -> Splits:
    """Pathfinder of Long Range Arena's folders, or so many pictures made here, with seed 0; a tenth of them is the dev
    set, a tenth the test set.

    Raises:
        FileNotFoundError, ValueError: as `pathfinder_files.read`; the cache is damaged; count is below 10.
    """
    if data is None and count < 10:
        raise ValueError(f"examples must be at least 10, of which a tenth is the test set: got {count}")
    if data is not None:
        everything = _sequences(pathfinder_files.read(data, side).pictures)
    else:
        made = {"law": 1, "seed": 0, "count": count}
        path = cache / f"pathfinder{side}-{count}.npz"
        everything = cached(path, made, lambda: _sequences(pathfinder.generate(count, 0, side, processes)))
    rest, test = everything.divide(DEV)
    train, dev = rest.divide(DEV / (1 - DEV), seed=1)
    return Splits(f"pathfinder{side}", train, dev, test)


def _sequences(found: images.Pictures) -> Sequences:
    return Sequences(found.labels, list(found.pixels))
