"""Multiply-adds of a computation, counted by torch as it runs."""

from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode

from nystrom.bench.timing import Step

aten = torch.ops.aten


def multiply_adds(step: Step) -> int:
    """Multiply-adds in the matrix products and factorisations of one call, attention kernels included (count).

    Sums, softmaxes and copies are not counted: each touches a number once, where a product does d or m times.
    """
    counter = FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH)
    with torch.no_grad(), counter:
        step()
    return counter.get_total_flops() // 2


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    b, h, n, d = query
    return 2 * b * h * n * key[2] * (d + value[3])


def _cholesky(matrix: torch.Size, *_: object, **__: object) -> int:
    return prod(matrix) * matrix[-1] // 3


def _cholesky_solve(right: torch.Size, factor: torch.Size, *_: object, **__: object) -> int:
    return 2 * prod(right) * factor[-1]


def _svd(matrix: torch.Size, *_: object, **__: object) -> int:
    return 22 * prod(matrix) * min(matrix[-2:])  # Golub and Reinsch, of a square matrix, with both sets of vectors


UNKNOWN_TO_TORCH = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten.linalg_cholesky_ex: _cholesky,
    aten.cholesky_solve: _cholesky_solve,
    aten._linalg_svd: _svd,
}
"""Floating-point operations, from the shapes, of what FlopCounterMode does not know; a multiply-add is two."""
