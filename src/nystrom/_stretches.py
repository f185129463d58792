"""Segments of a whole sequence, seen from a stretch of it: what one rank holds, or one chunk."""

from itertools import groupby, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nystrom import _cpu
from nystrom.landmarks import bin_sums, segment_lengths, segment_of_token


class Split(NamedTuple):
    """Where a stretch's valid tokens stand among those of the whole sequence."""

    mask: Bool[Tensor, "b n"] | None
    """Its tokens that take part; None where all of the sequence do, and so b2 = 1; else b2 = b."""
    before: Int[Tensor, "b2 1"]
    """Valid tokens before it (count)."""
    num_valid: Int[Tensor, "b2 1"]
    """Valid tokens of the sequence (count)."""
    numbers: tuple[int, int] | None
    """These two as numbers, where there is no mask."""


def segment_sums(
    tokens: Float[Tensor, "b h n d"], split: Split, m: int
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h m d"]]:
    """The tokens, which whoever goes on with saves memory backward, and what they add to each segment."""
    if split.mask is not None:
        return bin_sums(tokens, segment_of_token(split.mask, m, split.before, split.num_valid), m)
    assert split.numbers is not None
    before, num_valid = split.numbers
    length, num_short = num_valid // m, m - num_valid % m
    starts = [i * length + max(0, i - num_short) for i in range(m + 1)]
    after = before + tokens.shape[2]
    held = [min(end, after) - max(start, before) for start, end in pairwise(starts)]
    first = next(i for i, count in enumerate(held) if count > 0)
    runs = [(len(list(same)), count) for count, same in groupby(count for count in held if count > 0)]
    if _cpu.usable(tokens):
        tokens, sums = _cpu.run_sums(tokens, runs)
    else:
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        sums = torch.cat([part.sum(3, dtype=dtype) for part in _cpu.segments(tokens, runs)], dim=2)
    return tokens, F.pad(sums, (0, 0, first, m - first - sums.shape[2]))


def means(
    sums: Float[Tensor, "b h m d"], split: Split, m: int
) -> tuple[Float[Tensor, "b h m d"], Bool[Tensor, "b 1 m"] | None]:
    """The landmarks, and which exist: None where all do."""
    counts = segment_lengths(split.num_valid, m, sums.device)  # (b2, m)
    return sums / counts.clamp_min(1)[:, None, :, None], None if split.mask is None else counts[:, None] > 0


def unmasked(before: int, num_valid: int, device: torch.device) -> Split:
    """A stretch of a sequence without padding."""
    counts = torch.tensor([before, num_valid], device=device).view(2, 1, 1)
    return Split(None, counts[0], counts[1], (before, num_valid))
