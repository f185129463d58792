"""What a block of queries reads: which keys exactly, and one softmax over these and the clusters of the others.

In the order of their tree, as both the choice and the sums over clusters look keys up in it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nystrom._tree import CELLS, Tree, rows

CANDIDATES = 256
"""Keys per block among which the exact ones are chosen (count): at least these, and more for a large top_k."""
PROBE = 16
"""Queries averaged into one that looks for candidates (count)."""
LOW = -1e30
"""The logit of what takes no part: finite, so that no difference of two is NaN."""


class Options(NamedTuple):
    """Sizes (counts) and dropout, as `residual_nystrom_attention` takes them."""

    num_landmarks: int
    top_k: int
    window: int
    block: int
    dropout_p: float


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
    tokens: Int[Tensor, "b slots"]
    """As in `Tree`."""
    slot_of_token: Int[Tensor, "b s"]
    total: Int[Tensor, "b2 1"]
    """Tokens that take part (count)."""
    fewest: int
    """Tokens that take part in the smallest set, where that is known; otherwise s (count)."""
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
    sizes = tree.total, tree.fewest
    return Keys(
        table, tree.exists, cells, log_counts, x, leaves, no_leaf, tree.tokens, slot_of_token, *sizes, tree.axes
    )


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


def num_candidates(top_k: int, window: int) -> int:
    """Keys per block among which the exact ones are chosen, at least (count)."""
    return max(CANDIDATES, 2 * top_k + window)


def choose(
    q: Float[Tensor, "b blocks block d"], before: Int[Tensor, "b blocks"], keys: Keys, top_k: int, window: int
) -> tuple[Int[Tensor, "b blocks t"], Bool[Tensor, "b blocks t"]]:
    """Slots of each block's exact keys; False where there is none.

    Averages of a few queries look for leaves; of the keys in the best leaves, those with the highest weight that any
    query gives them among these. All in principal coordinates: the rest of a logit is nearly the same for every key.
    """
    b, blocks, block, _ = q.shape
    s, slots = keys.slot_of_token.shape[1], keys.table.shape[1]
    first = before[..., None] - (window - block) // 2
    token = first + torch.arange(window, device=q.device)
    inside = (token >= 0) & (token < keys.total[..., None])
    own = keys.slot_of_token.gather(1, token.clamp(0, s - 1).flatten(1)).view(token.shape)

    x = (q.flatten(1, 2) @ keys.axes).unflatten(1, (blocks, block))
    probes = torch.stack([part.mean(2) for part in x.split(PROBE, dim=2)], 2)  # (b, blocks, probes, r)
    of_leaves = (probes.flatten(1, 2) @ keys.leaves.mT).unflatten(1, (blocks, -1))
    if keys.no_leaf is not None:
        of_leaves = of_leaves.masked_fill(keys.no_leaf[:, None, None], LOW)
    num_leaves = keys.leaves.shape[1]
    leaf = slots // num_leaves
    candidates = num_candidates(top_k, window)
    number = min(num_leaves, -(-candidates * num_leaves // max(1, keys.fewest)))  # of the smallest set
    leaves = of_leaves.softmax(-1).amax(2).topk(number, sorted=keys.fewest < s).indices

    slot = (leaves[..., None] * leaf + torch.arange(leaf, device=q.device)).flatten(2)  # (b, blocks, candidates)
    x_near = rows(keys.x.unflatten(1, (-1, leaf)).flatten(2), leaves).flatten(2).unflatten(2, (slot.shape[2], -1))
    logits, token = x @ x_near.mT, keys.tokens.gather(1, slot.flatten(1)).view(slot.shape)
    hidden = (token >= first) & (token < first + window)
    if keys.exists is not None:
        empty = ~keys.exists[:, None].expand(b, blocks, slots).gather(2, slot)
        if keys.fewest < s:  # larger sets look at fewer leaves
            rank = torch.arange(number, device=q.device).repeat_interleave(leaf)
            empty = empty | (rank >= -(-candidates * num_leaves // keys.total.clamp_min(1)))[:, None]
        logits, hidden = logits.masked_fill(empty[:, :, None], LOW), hidden | empty
    weight = logits.softmax(-1).amax(2).masked_fill(hidden, -1.0)
    best = weight.topk(min(top_k, slot.shape[2]), sorted=False)
    return torch.cat([own, slot.gather(2, best.indices)], -1), torch.cat([inside, best.values >= 0], -1)


def choose_of_all(
    q: Float[Tensor, "b blocks block d"],
    before: Int[Tensor, "b blocks"],
    k: Float[Tensor, "b slots d"],
    tree: Tree,
    top_k: int,
    window: int,
) -> Bool[Tensor, "b blocks slots"]:
    """The same choice where every key is a candidate, as a mask over all slots; of an empty one it says nothing."""
    first = before[..., None] - (window - q.shape[2]) // 2
    token = tree.tokens[:, None]
    near = (token >= first) & (token < first + window)
    logits = (q.flatten(1, 2) @ tree.axes @ (k @ tree.axes).mT).unflatten(1, q.shape[1:3])
    hidden = near
    if tree.exists is not None:
        hidden = near | ~tree.exists[:, None]
        logits = logits.masked_fill(~tree.exists[:, None, None], LOW)
    weight = logits.softmax(-1).amax(2).masked_fill(hidden, -1.0)
    best = weight.topk(min(top_k, k.shape[1]), sorted=False)
    return near | torch.zeros_like(near).scatter(2, best.indices, best.values >= 0)


def read_heads(
    q: Float[Tensor, "b blocks block d"],
    k: Float[Tensor, "b s d"],
    v: Float[Tensor, "b s v"],
    before: Int[Tensor, "b blocks"],
    tree: Tree,
    options: Options,
    at_once: int,
) -> Float[Tensor, "b blocks block v"]:
    """Every block of some heads, `at_once` blocks at a time."""
    step = max(1, at_once // max(1, len(q)))
    parts = zip(q.split(step, 1), before.split(step, 1), strict=True)
    if not tree.leaf:
        return torch.cat([read_all(*part, k, v, tree, options) for part in parts], 1)
    keys = lay_out(k, v, tree)
    return torch.cat([read(*part, keys, options) for part in parts], 1)


def read(
    q: Float[Tensor, "b blocks block d"], before: Int[Tensor, "b blocks"], keys: Keys, options: Options
) -> Float[Tensor, "b blocks block v"]:
    """One softmax per query over its block's exact keys and the clusters without them."""
    d, m = q.shape[3], options.num_landmarks
    with torch.no_grad():
        near, there = choose(q, before, keys, options.top_k, options.window)
    exact = rows(keys.table, near)  # (b, blocks, t, d + v)
    logits = (q @ exact[..., :d].mT).masked_fill(~there[:, :, None], LOW)  # (b, blocks, block, t)

    mean = q.mean(2)
    scores = mean @ keys.cells[..., :d].mT + keys.log_counts[:, None]  # (b, blocks, cells): log w_j, of a whole cell
    cell = near // (keys.table.shape[1] // keys.cells.shape[1])
    with torch.no_grad():  # the part of each cell that is left without the exact keys
        counts = keys.log_counts.exp().round()[:, None].expand(scores.shape)
        left = counts.scatter_add(2, cell, -there.to(q.dtype)).gather(2, cell) / counts.gather(2, cell).clamp_min(1)
        log_left = torch.zeros_like(scores).scatter(2, cell, torch.where(left > 0, left.log(), LOW))
    scores = (scores + log_left).unflatten(2, (m, -1))
    highest = scores.amax(-1, keepdim=True)
    weights = scores.softmax(-1)  # (b, blocks, m, cells of a cluster)
    log_mass = torch.where(highest > LOW / 2, highest - weights.amax(-1, keepdim=True).log(), LOW).mT
    far = (weights.transpose(1, 2) @ keys.cells.unflatten(1, (m, -1))).transpose(1, 2)  # (b, blocks, m, d + v)
    far_logits = (q - mean[:, :, None]) @ far[..., :d].mT + log_mass

    t = logits.shape[-1]
    reads = F.dropout(torch.cat([logits, far_logits], -1).softmax(-1), options.dropout_p)
    return reads[..., :t] @ exact[..., d:] + reads[..., t:] @ far[..., d:]


def read_all(
    q: Float[Tensor, "b blocks block d"],
    before: Int[Tensor, "b blocks"],
    k: Float[Tensor, "b s d"],
    v: Float[Tensor, "b s v"],
    tree: Tree,
    options: Options,
) -> Float[Tensor, "b blocks block v"]:
    """The same for few keys, without lists. With c the cluster of key j, the softmax over Ω and the clusters is one of

        q̄·k_j + (q - q̄)·k_j    j in Ω
        q̄·k_j + (q - q̄)·k_c    other j

    over all keys: a cluster's weight goes to its keys in proportion to w_j.
    """
    m = options.num_landmarks
    k, v = rows(k, tree.tokens), rows(v, tree.tokens)
    with torch.no_grad():
        near = choose_of_all(q, before, k, tree, options.top_k, options.window)
    mean = q.mean(2)
    scores = mean @ k.mT  # (b, blocks, slots): log w_j
    if tree.exists is not None:
        scores = scores.masked_fill(~tree.exists[:, None], LOW)
    among = scores.masked_fill(near, LOW).unflatten(2, (-1, m)).softmax(2)  # w_j / mass_c, j not in Ω
    steps = ((q - mean[:, :, None]).flatten(1, 2) @ k.mT).view(*q.shape[:3], -1, m)  # (q - q̄)·k_j, by place in cluster
    far = (steps * among[:, :, None]).sum(3, keepdim=True)  # (q - q̄)·k_c
    exact = near.unflatten(2, (-1, m))[:, :, None]
    reads = (torch.where(exact, steps, far) + scores.unflatten(2, (-1, m))[:, :, None]).flatten(3).softmax(-1)
    if options.dropout_p:
        ones = torch.ones_like(steps)
        kept = (F.dropout(x, options.dropout_p) for x in (ones, ones[:, :, :, :1]))
        reads = reads * torch.where(exact, *kept).flatten(3)
    return (reads.flatten(1, 2) @ v).view(*q.shape[:3], -1)
