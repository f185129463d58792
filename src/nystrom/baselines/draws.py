"""Random numbers that depend on a seed alone: not on the device, on the batch or on how much padding there is."""

from collections.abc import Callable

import torch
from torch import Tensor

ROWS = 16  # drawn at a time


def stream(draw: Callable[..., Tensor], count: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """`count` rows of `shape` from `draw` (torch.rand or torch.randn), on the CPU; a longer stream begins as a shorter.

    Drawn in blocks of equal size, since torch's numbers depend on how many are asked for at once.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = [draw(ROWS, *shape, generator=generator) for _ in range(-(-count // ROWS))]
    return torch.cat(blocks)[:count]


def fresh(seed: int, training: bool) -> int:
    """`seed`, or in training another one each time, from torch's global generator."""
    return int(torch.randint(2**62, ())) if training else seed
