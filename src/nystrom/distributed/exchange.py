"""What ranks tell each other, with its gradients: all the communication of this package.

A rank's loss counts the tokens that it holds, and gradients are those of the sum of all ranks' losses: what every rank
holds alike gets the sum of the ranks' gradients. So either all ranks run the backward pass, or none.
"""

# torch types Function.backward for any number of gradients; each one here names its own.
# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from nystrom._cpu import once

Group = dist.ProcessGroup | None
"""The ranks that share a sequence, in the order of their stretches; None: all there are."""


def agree(check: Callable[[], Mapping[str, int]], device: torch.device, group: Group) -> list[dict[str, int]]:
    """What each rank found out about its input, by `check`; every rank raises where one would, so that none waits.

    Args:
        check: gives whole numbers under the same names on every rank; may raise ValueError.
        device: of the tensors that are exchanged.
        group: the ranks.

    Returns:
        The numbers of each rank, in the order of the ranks.

    Raises:
        ValueError: the one that `check` raised here, or on another rank a message that names it.
    """
    try:
        found, error = check(), None
    except ValueError as refused:
        found, error = {}, refused
    # A refusal has no numbers, so all send as many as can be: a length, then numbers, then zeros.
    sent = torch.zeros(MOST, dtype=torch.int64)
    sent[: len(found) + 1] = torch.tensor([-1 if error else len(found), *found.values()])
    rows = gather(sent.to(device), group).tolist()
    if error is not None:
        raise error
    refusing = [rank for rank, row in enumerate(rows) if row[0] < 0]
    if refusing:
        raise ValueError(f"the input of rank {refusing[0]} was refused; its own message says why")
    return [dict(zip(found, row[1:], strict=False)) for row in rows]


MOST = 24
"""Numbers that ranks exchange before anything else (count)."""


def same(found: list[dict[str, int]], names: Mapping[str, str]) -> None:
    """Raise ValueError unless the ranks have the same numbers under these names (each with the words for it)."""
    for name, words in names.items():
        values = [one[name] for one in found]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            raise ValueError(
                f"{words} must be the same on every rank: got {values[0]} on rank 0 and {values[other]} on rank {other}"
            )


def gather(x: Tensor, group: Group) -> Tensor:
    """x of every rank, (ranks, ...); of one shape everywhere, without gradient."""
    x = x.contiguous()
    found = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, x, group=group)
    return torch.stack(found)


def total(x: Float[Tensor, "*shape"], group: Group) -> Float[Tensor, "*shape"]:
    """The sum over the ranks, on every rank."""
    return _Total.apply(x, group)


def merge(
    out: Float[Tensor, "*shape v"], log_mass: Float[Tensor, "*shape"], group: Group
) -> tuple[Float[Tensor, "*shape v"], Float[Tensor, "*shape"]]:
    """Attention over the keys of all ranks from that over each rank's own: the mean of the outputs by their masses.

    The masses are given and returned as logs (-inf: no key), and scaled by the largest before they are summed, so that
    none overflows.
    """
    return _Merge.apply(out, log_mass, group)


def joined(x: Float[Tensor, "b n c"], lengths: list[int], group: Group) -> Float[Tensor, "b total c"]:
    """The stretches of all ranks, one after the other, on every rank: the only exchange that grows with the length.

    Args:
        x: this rank's stretch.
        lengths: of the stretches of all ranks (tokens).
        group: the ranks.
    """
    return _Joined.apply(x, lengths, group)


def edges(
    x: Float[Tensor, "b h n d"], reach: int, lengths: list[int], group: Group
) -> tuple[Float[Tensor, "b h reach d"], Float[Tensor, "b h reach d"]]:
    """The `reach` tokens before this rank's stretch and those after it; zeros beyond the ends of the sequence.

    Args:
        x: this rank's stretch.
        reach: tokens on each side (count).
        lengths: of the stretches of all ranks (tokens).
        group: the ranks.
    """
    rank = dist.get_rank(group)
    return _Edges.apply(x, reach, lengths, rank, group)


class _Total(Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    @once
    def backward(ctx, grad):
        return _summed(grad, ctx.group), None


class _Merge(Function):
    @staticmethod
    def forward(ctx, out, log_mass, group):
        most = log_mass.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        mass = (log_mass - _finite(most)).exp()
        merged = _summed(torch.cat([mass[..., None] * out, mass[..., None]], -1), group)
        mass = merged[..., -1]
        merged = merged[..., :-1] / mass.clamp_min(torch.finfo(mass.dtype).tiny)[..., None]
        log_masses = most + mass.log()
        ctx.save_for_backward(out, log_mass, merged, log_masses)
        ctx.group = group
        return merged, log_masses

    @staticmethod
    @once
    def backward(ctx, grad, grad_log_mass):
        out, log_mass, merged, log_masses = ctx.saved_tensors
        both = _summed(torch.cat([grad, grad_log_mass[..., None]], -1), ctx.group)
        grad, grad_log_mass = both[..., :-1], both[..., -1]
        part = (log_mass - _finite(log_masses)).exp()
        return part[..., None] * grad, part * (grad_log_mass + (grad * (out - merged)).sum(-1)), None


class _Joined(Function):
    @staticmethod
    def forward(ctx, x, lengths, group):
        ctx.lengths, ctx.group = lengths, group
        b, n, c = x.shape
        padded = torch.cat([x, x.new_zeros(b, max(lengths) - n, c)], 1)  # ranks exchange tensors of one shape
        found = gather(padded, group)
        return torch.cat([found[rank, :, :length] for rank, length in enumerate(lengths)], 1)

    @staticmethod
    @once
    def backward(ctx, grad):
        return _summed(grad, ctx.group).split(ctx.lengths, 1)[dist.get_rank(ctx.group)], None, None


class _Edges(Function):
    """Each rank sends its first and its last `reach` tokens to all: stretches may be shorter than what is read."""

    @staticmethod
    def forward(ctx, x, reach, lengths, rank, group):
        ctx.sizes = x.shape, reach, lengths, rank, group
        b, h, n, d = x.shape
        held = min(n, reach)
        sent = x.new_zeros(2, b, h, reach, d)
        sent[0, :, :, :held], sent[1, :, :, :held] = x[:, :, :held], x[:, :, n - held :]
        found = gather(sent, group)
        before, after = x.new_zeros(2, b, h, reach, d)
        for place, other, start, length in _pieces(reach, lengths, rank):
            side, at = (before, 1) if other < rank else (after, 0)
            side[:, :, place : place + length] = found[other, at, :, :, start : start + length]
        return before, after

    @staticmethod
    @once
    def backward(ctx, grad_before, grad_after):
        (b, h, n, d), reach, lengths, rank, group = ctx.sizes
        sent = grad_before.new_zeros(len(lengths), 2, b, h, reach, d)
        for place, other, start, length in _pieces(reach, lengths, rank):
            side, at = (grad_before, 1) if other < rank else (grad_after, 0)
            sent[other, at, :, :, start : start + length] = side[:, :, place : place + length]
        first, last = _summed(sent, group)[rank]
        grad, held = first.new_zeros(b, h, n, d), min(n, reach)
        grad[:, :, :held] += first[:, :, :held]
        grad[:, :, n - held :] += last[:, :, :held]
        return grad, None, None, None, None


def _pieces(reach: int, lengths: list[int], rank: int) -> list[tuple[int, int, int, int]]:
    """What a rank reads: place in its edge, of which rank, from which token of that rank's edge, how many."""
    found, room = [], reach
    for other in range(rank - 1, -1, -1):  # the nearest first
        length, held = min(room, lengths[other]), min(reach, lengths[other])
        room -= length
        found.append((room, other, held - length, length))
    done = 0
    for other in range(rank + 1, len(lengths)):
        length = min(reach - done, lengths[other])
        found.append((done, other, 0, length))
        done += length
    return [piece for piece in found if piece[3]]


def _finite(logs: Tensor) -> Tensor:
    """-inf less -inf is NaN."""
    return logs.clamp_min(torch.finfo(logs.dtype).min)


def _summed(x: Tensor, group: Any) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x
