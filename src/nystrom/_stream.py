"""A few queries read many keys block by block, and say how much they found: what they read elsewhere can be added.

With weights p_j = exp(q·k_j - log_mass) the output is Σ p_j v_j. Two stretches of keys merge by their masses, so no
rank and no chunk of a sequence need see the keys of another.
"""

# torch types Function.backward for any number of gradients; each one here names its own.
# pyright: reportIncompatibleMethodOverride=false

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd import Function

from nystrom._cpu import once

CACHE = 2**20
"""Weights at a time on a CPU: about what stays in its cache (count)."""
NUMBERS = 2**27
"""The same on other devices (count)."""


def read(
    query: Float[Tensor, "b g m d"],
    key: Float[Tensor, "b g s d"],
    value: Float[Tensor, "b g s v"],
    key_mask: Bool[Tensor, "b s"] | None,
    scale: float,
) -> tuple[Float[Tensor, "b g m v"], Float[Tensor, "b g m"]]:
    """Exact attention of m queries, and log Σ exp(scale q·k).

    Time O(b g s m (d + v)), memory O(b g m (d + v)), backward too, and a block of weights. Without a key that takes
    part: zeros, and -inf.
    """
    return _Read.apply(query, key, value, key_mask, scale)


class _Read(Function):
    @staticmethod
    def forward(ctx, query, key, value, key_mask, scale):
        q = query * scale
        b, g, m, _ = q.shape
        most = q.new_full((b, g, m, 1), torch.finfo(q.dtype).min)
        mass, out = torch.zeros_like(most), q.new_zeros(b, g, m, value.shape[3])
        for i, heads, at, room in _blocks(q, key):
            logits = _logits(q, key, key_mask, (i, heads, at), room)
            before, now = most[i, heads], most[i, heads].maximum(logits.amax(-1, keepdim=True))
            weight, shrink = logits.sub_(now).exp_(), (before - now).exp()
            most[i, heads] = now
            mass[i, heads] = mass[i, heads] * shrink + weight.sum(-1, keepdim=True)
            out[i, heads] = torch.baddbmm(out[i, heads] * shrink, weight, value[i, heads, at])
        out /= mass.clamp_min(torch.finfo(mass.dtype).tiny)
        log_mass = (most + mass.log()).squeeze(-1)
        ctx.save_for_backward(query, key, value, key_mask, out, log_mass)
        ctx.scale = scale
        return out, log_mass

    @staticmethod
    @once
    def backward(ctx, grad_out, grad_log_mass):
        query, key, value, key_mask, out, log_mass = ctx.saved_tensors
        # of a logit: p (grad_out·v - grad_out·out + grad_log_mass)
        shared = grad_log_mass[..., None] - (grad_out * out).sum(-1, keepdim=True)
        q = query * ctx.scale
        finite = log_mass[..., None].clamp_min(torch.finfo(log_mass.dtype).min)
        grad_q, grad_key, grad_value = torch.zeros_like(q), torch.empty_like(key), torch.empty_like(value)
        for i, heads, at, room in _blocks(q, key, 2):
            weight = _logits(q, key, key_mask, (i, heads, at), room[0]).sub_(finite[i, heads]).exp_()
            torch.bmm(weight.mT, grad_out[i, heads], out=grad_value[i, heads, at])
            grad = torch.bmm(grad_out[i, heads], value[i, heads, at].mT, out=room[1])
            grad.add_(shared[i, heads]).mul_(weight)
            torch.bmm(grad.mT, q[i, heads], out=grad_key[i, heads, at])
            grad_q[i, heads] += grad @ key[i, heads, at]
        return grad_q * ctx.scale, grad_key, grad_value, None, None


def _blocks(q: Tensor, key: Tensor, arrays: int = 1) -> Iterator[tuple[int, slice, slice, Any]]:
    """Sample, heads and keys to work on at a time, and room for their weights: one array, or several, used again."""
    (b, g, m, _), s = q.shape, key.shape[2]
    most = CACHE if q.device.type == "cpu" else NUMBERS
    length = min(s, max(1, most // m))
    num_heads = min(g, max(1, most // (m * length)))
    room = q.new_empty(arrays, num_heads * m * length)
    for i, head, start in product(range(b), range(0, g, num_heads), range(0, s, length)):
        heads, at = slice(head, min(g, head + num_heads)), slice(start, min(s, start + length))
        sizes = heads.stop - heads.start, m, at.stop - at.start
        rooms = [one[: math.prod(sizes)].view(sizes) for one in room]
        yield i, heads, at, rooms if arrays > 1 else rooms[0]


def _logits(
    q: Float[Tensor, "b g m d"],
    key: Float[Tensor, "b g s d"],
    key_mask: Bool[Tensor, "b s"] | None,
    at: tuple[int, slice, slice],
    room: Float[Tensor, "heads m length"],
) -> Float[Tensor, "heads m length"]:
    i, heads, keys = at
    torch.bmm(q[i, heads], key[i, heads, keys].mT, out=room)
    return room if key_mask is None else room.masked_fill_(~key_mask[i, keys], -torch.inf)
