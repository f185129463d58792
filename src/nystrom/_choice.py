"""Which keys a block of queries reads exactly, and the keys in the order of their tree that both this and the sums over
clusters look them up in.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nystrom._tree import Tree, rows

CANDIDATES = 256
"""Keys per block among which the exact ones are chosen (count): at least these, and more for a large top_k."""
PROBE = 16
"""Queries averaged into one that looks for candidates (count)."""
CELLS = 4
"""Cells in a leaf (count)."""
LOW = -1e30
"""The logit of what takes no part: finite, so that no difference of two is NaN."""


class Keys(NamedTuple):
    """The keys and values of some heads in tree order, with what the blocks look up in them."""

    table: Float[Tensor, "b slots dv"]
    """Key and value of each slot, side by side."""
    exists: Bool[Tensor, "b2 slots"] | None
    cells: Float[Tensor, "b cells dv"]
    """Means of cells of `table`."""
    log_counts: Float[Tensor, "b2 cells"]
    """Of the keys in each cell; LOW for an empty one."""
    x: Float[Tensor, "b slots r"]
    """The keys in principal coordinates; not differentiated, as all below."""
    leaves: Float[Tensor, "b leaves r"]
    """Means of leaves of `x`."""
    no_leaf: Bool[Tensor, "b2 leaves"] | None
    slot_of_token: Int[Tensor, "b s"]
    total: Int[Tensor, "b2 1"]
    """Tokens that take part (count)."""
    axes: Float[Tensor, "b d r"]


def lay_out(k: Float[Tensor, "b s d"], v: Float[Tensor, "b s v"], tree: Tree) -> Keys:
    """Keys and values in tree order, and their means over cells and leaves."""
    b, s, d = k.shape
    table = rows(torch.cat([k, v], -1), tree.tokens)
    slots = table.shape[1]
    per_cell = max(1, tree.leaf // CELLS)
    cells, counts = _means(table, tree.exists, per_cell)
    log_counts = torch.where(counts > 0, counts.log(), LOW)
    with torch.no_grad():
        x = table[..., :d] @ tree.axes
        leaves, leaf_counts = _means(x, tree.exists, tree.leaf)
        token = tree.tokens if tree.exists is None else torch.where(tree.exists, tree.tokens, s)
        slot = torch.arange(slots, device=k.device).expand(b, slots)
        slot_of_token = torch.zeros(b, s + 1, dtype=torch.long, device=k.device).scatter(1, token, slot)[:, :s]
    no_leaf = None if tree.exists is None else leaf_counts == 0
    return Keys(table, tree.exists, cells, log_counts, x, leaves, no_leaf, slot_of_token, tree.total, tree.axes)


def _means(
    table: Float[Tensor, "b slots w"], exists: Bool[Tensor, "b2 slots"] | None, size: int
) -> tuple[Float[Tensor, "b groups w"], Float[Tensor, "b2 groups"]]:
    """The mean of the taken slots in each run of `size`, and their number."""
    groups = table.unflatten(1, (-1, size))
    if exists is None:
        return table if size == 1 else groups.mean(2), table.new_full((1, groups.shape[1]), size)
    taken = exists.unflatten(1, (-1, size)).to(table.dtype)
    counts = taken.sum(2)
    return (groups * taken[..., None]).sum(2) / counts.clamp_min(1)[..., None], counts


def choose(
    q: Float[Tensor, "b blocks block d"], before: Int[Tensor, "b blocks"], keys: Keys, top_k: int, window: int
) -> tuple[Int[Tensor, "b blocks t"], Bool[Tensor, "b blocks t"]]:
    """Slots of each block's exact keys; False where there is none.

    Averages of a few queries look for leaves; of the keys in the best leaves, those with the highest weight that any
    query gives them among these. All in principal coordinates: the rest of a logit is nearly the same for every key.
    """
    b, blocks, block, _ = q.shape
    s, slots = keys.slot_of_token.shape[1], keys.table.shape[1]
    token = before[..., None] + torch.arange(window, device=q.device) - (window - block) // 2
    inside = (token >= 0) & (token < keys.total[..., None])
    own = keys.slot_of_token.gather(1, token.clamp(0, s - 1).flatten(1)).view(token.shape)
    hidden = torch.zeros(b, blocks, slots + 1, dtype=torch.bool, device=q.device)  # the last: of tokens outside
    hidden = hidden.scatter(2, torch.where(inside, own, slots), True)

    x = (q.flatten(1, 2) @ keys.axes).unflatten(1, (blocks, block))
    probes = torch.stack([part.mean(2) for part in x.split(PROBE, dim=2)], 2)  # (b, blocks, probes, r)
    of_leaves = (probes.flatten(1, 2) @ keys.leaves.mT).unflatten(1, (blocks, -1))
    if keys.no_leaf is not None:
        of_leaves = of_leaves.masked_fill(keys.no_leaf[:, None, None], LOW)
    num_leaves = keys.leaves.shape[1]
    leaf = slots // num_leaves
    number = -(-max(CANDIDATES, 2 * top_k + window) * num_leaves // s)
    leaves = of_leaves.softmax(-1).amax(2).topk(min(number, num_leaves), sorted=False).indices

    slot = (leaves[..., None] * leaf + torch.arange(leaf, device=q.device)).flatten(2)  # (b, blocks, candidates)
    candidates = rows(keys.x.unflatten(1, (-1, leaf)).flatten(2), leaves).flatten(2).unflatten(2, (slot.shape[2], -1))
    logits, hidden = x @ candidates.mT, hidden.gather(2, slot)
    if keys.exists is not None:
        empty = ~keys.exists[:, None].expand(b, blocks, slots).gather(2, slot)
        logits, hidden = logits.masked_fill(empty[:, :, None], LOW), hidden | empty
    weight = logits.softmax(-1).amax(2).masked_fill(hidden, -1.0)
    best = weight.topk(min(top_k, slot.shape[2]), sorted=False)
    return torch.cat([own, slot.gather(2, best.indices)], -1), torch.cat([inside, best.values >= 0], -1)
