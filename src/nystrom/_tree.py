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
CELLS = 4
"""Cells in a leaf (count)."""
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
    fewest: int
    """Tokens that take part in the smallest set, where that is known; otherwise s (count)."""
    leaf: int
    """Slots in a leaf (count); 0 for a tree without leaves."""

    def split(self, number: int) -> list["Tree"]:
        """The trees of so many sets of keys at a time."""
        trees = []
        for first in range(0, max(1, len(self.tokens)), number):
            part = slice(first, first + number)
            exists, total = (x if x is None or len(x) == 1 else x[part] for x in (self.exists, self.total))
            trees.append(self._replace(tokens=self.tokens[part], exists=exists, axes=self.axes[part], total=total))
        return trees


def grow(
    keys: Float[Tensor, "b s d"],
    num_clusters: int,
    counts: Int[Tensor, " b"] | None,
    fewest: int | None = None,
    *,
    leaves: bool = True,
) -> Tree:
    """Halve the keys again and again, each group where it is widest, into clusters and then into leaves.

    Principal axes of all keys stand in for those of each group. Time O(b s (d² + log² s)), memory O(b s r).

    Args:
        keys: sets of tokens.
        num_clusters: m (count).
        counts: how many keys of each set are real, from the first on; None: all.
        fewest: the least of these counts, where that is known.
        leaves: whether to divide clusters. Otherwise the first key of every cluster comes first, then every second.
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
    for bounds in _levels(num_clusters, leaves):
        group, exists = _slots(bounds, num_leaves, total, s, full)  # (b2, groups, size): places in the order
        tokens = _take(order, group)
        widest = max(stop - start for start, stop in pairwise(bounds))
        axis = _spread(x, tokens, exists, -(-widest * total // num_leaves)).argmax(-1)  # (b, groups)
        place = flat.index_select(0, ((tokens + offset) * r + axis[..., None]).flatten()).view(tokens.shape)
        if exists is not None:
            place = place.masked_fill(~exists, torch.inf)
        tokens = tokens.gather(-1, place.argsort(-1))
        order = _close_up(tokens, bounds, num_leaves, total, s) if exists is not None else tokens.flatten(1)
    leaf = slots_per_leaf(s, num_clusters) if leaves else 0
    ends = list(range(0, num_leaves + 1, 1 if leaves else LEAVES))
    group, exists = _slots(ends, num_leaves, total, s, full, leaf or None)
    if not leaves:
        group, exists = group.mT, None if exists is None else exists.mT
    exists = None if exists is None else exists.flatten(1)
    return Tree(_take(order, group).flatten(1), exists, axes, total, s if fewest is None else fewest, leaf)


def slots_per_leaf(s: int, num_clusters: int) -> int:
    """Slots in a leaf: as many as s keys need, and above 4 a multiple of 4."""
    size = -(-s // (LEAVES * num_clusters))
    return size if size <= 4 else -(-size // 4) * 4


def keys_per_cell(s: int, num_clusters: int) -> int:
    """Slots in a cell (count)."""
    return max(1, slots_per_leaf(s, num_clusters) // CELLS)


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


def _spread(
    x: Float[Tensor, "b s r"],
    tokens: Int[Tensor, "b groups size"],
    exists: Bool[Tensor, "b2 groups size"] | None,
    widest: Int[Tensor, "b2 1"],
) -> Float[Tensor, "b groups r"]:
    """The variance of each group's tokens, read off some of them, in each coordinate.

    Which ones follows from `widest`, the tokens of the set's largest group (count), and not from the slots.
    """
    size = tokens.shape[-1]
    if exists is None:
        near = rows(x, tokens[..., :: max(1, size // SAMPLE)])  # (b, groups, sampled, r)
        return near.square().mean(2) - near.mean(2).square()
    if size >= 2 * SAMPLE:
        place = torch.arange(2 * SAMPLE, device=x.device) * (widest // SAMPLE).clamp_min(1)  # (b2, sampled)
        inside = (place < widest)[:, None]
        place = place.clamp_max(size - 1)[:, None]
        tokens = tokens.gather(2, place.expand(*tokens.shape[:2], -1))
        exists = exists.gather(2, place.expand(*exists.shape[:2], -1)) & inside
    near = rows(x, tokens) * exists[..., None]
    number = exists.sum(2).clamp_min(1)[..., None]
    return near.square().sum(2) / number - (near.sum(2) / number).square()


def _levels(num_clusters: int, leaves: bool) -> list[list[int]]:
    """The groups to halve, level by level, as bounds counted in leaves."""
    levels = []
    for level in range((num_clusters - 1).bit_length()):
        levels.append([LEAVES * (j * num_clusters // 2**level) for j in range(2**level + 1)])
    for level in range((LEAVES - 1).bit_length() if leaves else 0):
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
