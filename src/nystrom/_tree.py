"""Keys in the order of a k-d tree: clusters of near keys, and small leaves within them, as consecutive slots.

Every cluster and leaf has the same number of slots, whatever the length, so that all further work is on regular arrays;
where a sample does not fill them some slots are empty. Nothing here is differentiated.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LEAVES = 8
"""Leaves in a cluster (count, a power of two)."""
COORDINATES = 24
"""Principal coordinates that the tree splits by and that keys are chosen by (count)."""
SAMPLE = 64
"""Tokens that a group's spread is read from (count)."""


class Tree(NamedTuple):
    """Where keys lie, for each set of them."""

    tokens: Int[Tensor, "b slots"]
    """The token in each slot; of an empty slot, some token."""
    exists: Bool[Tensor, "b2 slots"] | None
    """False for an empty slot; b2 is b or 1. None where every slot is taken."""
    axes: Float[Tensor, "b d r"]
    """The r directions in which the keys vary most."""
    total: Int[Tensor, "b2 1"]
    """Tokens that take part (count)."""
    leaf: int
    """Slots in a leaf (count)."""


def grow(keys: Float[Tensor, "b s d"], num_clusters: int, counts: Int[Tensor, " b"] | None) -> Tree:
    """Halve the keys again and again, each group where it is widest, into clusters and then into leaves.

    Principal axes of all keys stand in for those of each group. Time O(b s (d² + log² s)), memory O(b s r).

    Args:
        keys: sets of tokens.
        num_clusters: m (count).
        counts: how many keys of each set are real, from the first on; None: all.
    """
    b, s, _ = keys.shape
    device = keys.device
    real = None if counts is None else torch.arange(s, device=device) < counts[:, None]
    x, axes = _principal(keys, real)
    num_leaves = LEAVES * num_clusters
    total = torch.full((1, 1), s, device=device) if counts is None else counts[:, None]
    full = counts is None and not torch.compiler.is_compiling()
    flat, r = x.flatten(), x.shape[-1]
    offset = (torch.arange(b, device=device) * s)[:, None, None]
    order = torch.arange(s, device=device).expand(b, s)
    for bounds in _levels(num_clusters):
        group, exists = _slots(bounds, num_leaves, total, s, full)  # (b2, groups, size): places in the order
        tokens = _take(order, group)
        step = max(1, group.shape[-1] // SAMPLE)
        near = rows(x, tokens[..., ::step])  # (b, groups, sampled, r)
        if exists is None:
            spread = near.square().mean(2) - near.mean(2).square()
        else:
            weight = exists[..., ::step, None]
            number = weight.sum(2).clamp_min(1)
            near = near * weight
            spread = near.square().sum(2) / number - (near.sum(2) / number).square()
        axis = spread.argmax(-1)  # (b, groups)
        place = flat.index_select(0, ((tokens + offset) * r + axis[..., None]).flatten()).view(tokens.shape)
        if exists is not None:
            place = place.masked_fill(~exists, torch.inf)
        tokens = tokens.gather(-1, place.argsort(-1))
        order = _close_up(tokens, bounds, num_leaves, total, s) if exists is not None else tokens.flatten(1)
    leaf = slots_per_leaf(s, num_clusters)
    group, exists = _slots(list(range(num_leaves + 1)), num_leaves, total, s, full, leaf)
    return Tree(_take(order, group).flatten(1), None if exists is None else exists.flatten(1), axes, total, leaf)


def slots_per_leaf(s: int, num_clusters: int) -> int:
    """Slots in a leaf: as many as s keys need, and above 4 a multiple of 4."""
    size = -(-s // (LEAVES * num_clusters))
    return size if size <= 4 else -(-size // 4) * 4


def rows(table: Float[Tensor, "b s w"], index: Int[Tensor, "b ..."]) -> Float[Tensor, "b ... w"]:
    """The rows of each table at its own places, copied whole: torch.gather goes number by number."""
    b, s, w = table.shape
    if b == 1:
        return table[0].index_select(0, index.flatten()).view(*index.shape, w)
    offset = (torch.arange(b, device=index.device) * s).view(b, *[1] * (index.ndim - 1))
    return table.reshape(b * s, w).index_select(0, (index + offset).flatten()).view(*index.shape, w)


def _principal(
    keys: Float[Tensor, "b s d"], real: Bool[Tensor, "b s"] | None
) -> tuple[Float[Tensor, "b s r"], Float[Tensor, "b d r"]]:
    """Keys in their first principal coordinates, and the axes."""
    if real is None:
        x = keys - keys.mean(1, keepdim=True)
    else:
        x = keys.masked_fill(~real[..., None], 0.0)
        x = x - x.sum(1, keepdim=True) / real.sum(1).clamp_min(1)[:, None, None]
        x = x.masked_fill(~real[..., None], 0.0)
    gram = (x.mT @ x).nan_to_num(0.0, 0.0, 0.0)  # eigh would raise, for every head at once
    axes = torch.linalg.eigh(gram).eigenvectors[..., -COORDINATES:]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # else rounding would decide
    return x @ axes, axes


def _levels(num_clusters: int) -> list[list[int]]:
    """The groups to halve, level by level, as bounds counted in leaves."""
    levels = []
    for level in range((num_clusters - 1).bit_length()):
        levels.append([LEAVES * (j * num_clusters // 2**level) for j in range(2**level + 1)])
    for level in range((LEAVES - 1).bit_length()):
        span = LEAVES >> level
        levels.append(list(range(0, LEAVES * num_clusters + 1, span)))
    return levels


def _slots(
    bounds: list[int], num_leaves: int, total: Int[Tensor, "b2 1"], s: int, full: bool, size: int | None = None
) -> tuple[Int[Tensor, "b2 groups size"], Bool[Tensor, "b2 groups size"] | None]:
    """Places in the order that each group holds, and which of its slots are taken (None: all)."""
    starts = torch.tensor(bounds, device=total.device) * total // num_leaves  # (b2, groups + 1)
    widest = max(stop - start for start, stop in pairwise(bounds))
    size = -(-widest * s // num_leaves) if size is None else size
    place = starts[:, :-1, None] + torch.arange(size, device=total.device)
    if full and s == size * (len(bounds) - 1):
        return place, None
    last = (total - 1).clamp_min(0)[..., None]  # an empty slot holds a token that takes part, if there is one
    return place.minimum(last), place < starts[:, 1:, None]


def _take(order: Int[Tensor, "b s"], place: Int[Tensor, "b2 groups size"]) -> Int[Tensor, "b groups size"]:
    return order.gather(1, place.flatten(1).expand(len(order), -1)).view(len(order), *place.shape[1:])


def _close_up(
    tokens: Int[Tensor, "b groups size"], bounds: list[int], num_leaves: int, total: Int[Tensor, "b2 1"], s: int
) -> Int[Tensor, "b s"]:
    """The groups' tokens one after the other, without the empty slots between them."""
    starts = torch.tensor(bounds, device=total.device) * total // num_leaves
    place = torch.arange(s, device=total.device).expand(len(total), s)
    ends = torch.zeros(len(total), s + 1, dtype=torch.long, device=total.device)
    group = ends.scatter_add(1, starts[:, 1:], torch.ones_like(starts[:, 1:])).cumsum(1)[:, :s]
    group = group.clamp_max(len(bounds) - 2)  # places beyond the last real token are never read
    index = group * tokens.shape[-1] + (place - starts.gather(1, group)).clamp_max(tokens.shape[-1] - 1)
    return tokens.flatten(1).gather(1, index.expand(len(tokens), s))
