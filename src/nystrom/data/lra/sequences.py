"""What every task of Long Range Arena hands to a Trainer: sequences with labels, batches of them, and files of both."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from nystrom.data.lra import cache


class Sequences:
    """Labelled sequences, or labelled pairs of sequences, as a map-style data set.

    Args:
        labels: (count,) class of each.
        first: (count,) arrays of token ids; 0 is padding, except in images, where it is black.
        second: the other sequences of pairs.
    """

    def __init__(self, labels: np.ndarray, first: Sequence[np.ndarray], second: Sequence[np.ndarray] | None = None):
        self.labels, self.first, self.second = labels, first, second

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        found = {"input_ids": self.first[i], "labels": int(self.labels[i])}
        return found if self.second is None else found | {"pair_ids": self.second[i]}

    def lengths(self) -> list[int]:
        """Tokens of each, of a pair those of the longer one."""
        if self.second is None:
            return [len(row) for row in self.first]
        return [max(len(one), len(two)) for one, two in zip(self.first, self.second, strict=True)]

    def pick(self, places: Sequence[int]) -> "Sequences":
        """Those at these places."""
        second = None if self.second is None else [self.second[i] for i in places]
        return Sequences(self.labels[list(places)], [self.first[i] for i in places], second)

    def draw(self, count: int | None, name: str) -> "Sequences":
        """So many of them at random, the same in every run; None: all.

        Raises:
            ValueError: there are not so many.
        """
        if count is None:
            return self
        if count > len(self):
            raise ValueError(f"the {name} set has {len(self)} examples: asked for {count}")
        return self.pick(sorted(random.Random(0).sample(range(len(self)), count)))

    def divide(self, part: float, seed: int = 0) -> "tuple[Sequences, Sequences]":
        """The rest, and this part of them, drawn at random."""
        aside = set(random.Random(seed).sample(range(len(self)), round(part * len(self))))
        return self.pick([i for i in range(len(self)) if i not in aside]), self.pick(sorted(aside))


def make_collate(zero_is_padding: bool) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Examples -> a model's arguments, padded on the right with 0; masks, True = takes part, only where needed.

    Args:
        zero_is_padding: every 0 is masked, which the authors' code does to black pixels too; else what was padded is.
    """

    def pad(rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = pad_sequence([torch.from_numpy(row.astype(np.int64)) for row in rows], batch_first=True)
        if zero_is_padding:
            return ids, ids != 0
        return ids, torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {"labels": torch.tensor([example["labels"] for example in examples])}
        for name, mask_name in (("input_ids", "attn_mask"), ("pair_ids", "pair_mask")):
            if name in examples[0]:
                batch[name], mask = pad([example[name] for example in examples])
                if not mask.all():
                    batch[mask_name] = mask
        return batch

    return collate


def cached(path: Path, made: Mapping[str, Any], make: Callable[[], Sequences], pairs: bool = False) -> Sequences:
    """What a file of the cache holds, if it was made so, or else what `make` makes, which is then written there.

    Args:
        path: ends with .npz; its folder need not exist.
        made: all that the sequences depend on, as JSON can hold it.
        make: called where there is no such file, or it was made otherwise.
        pairs: whether it makes pairs.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be written.
    """
    if path.is_file():
        parts = ("first", "second") if pairs else ("first",)
        arrays, before = cache.read(path, ("labels", *parts, *(f"{part}_lengths" for part in parts)))
        if before == made:
            return Sequences(arrays["labels"], *(_split(arrays, part) for part in parts))
    found = make()
    arrays = {"labels": found.labels}
    for name, rows in (("first", found.first), ("second", found.second)):
        if rows is not None:
            arrays |= {name: np.concatenate(rows), f"{name}_lengths": np.array([len(row) for row in rows])}
    path.parent.mkdir(parents=True, exist_ok=True)
    cache.write(path, arrays, made)
    return found


def _split(arrays: Mapping[str, np.ndarray], name: str) -> list[np.ndarray]:
    return np.split(arrays[name], np.cumsum(arrays[f"{name}_lengths"])[:-1])
