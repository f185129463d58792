"""MonarchAttention (Yaras et al., NeurIPS 2025, arXiv:2505.18698), written from its formula to compare with.

Cut the n tokens into p blocks of c. Softmax attention maximises <A, logits> + entropy(A) over matrices whose rows are
weights; here A is restricted to Monarch matrices, in which all queries at one place j of their blocks share how they
read the c keys of block k, and each query has its own weights on the blocks:

    A[(l, j), (k, i)] = over_blocks[j, l, k] within_block[j, k, i]        l, k blocks; i, j places in a block

With either factor fixed the best other one is a softmax (sums over i, k and l; H is the entropy of within_block[j, k]):

    within_block[j, k] = softmax_i( (Σ_l over_blocks[j, l, k] q_lj) · k_ki / Σ_l over_blocks[j, l, k] )
    over_blocks[j, l]  = softmax_k( q_lj · (Σ_i within_block[j, k, i] k_ki) + H(within_block[j, k]) )

They are taken in turns, from queries that read their own block alone.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def monarch(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n v"],
    mask: Bool[Tensor, "b n"] | None,
    scale: float,
    *,
    block: int,
    num_steps: int,
) -> Float[Tensor, "b h n v"]:
    """Attention by the best Monarch matrix that a few alternating steps find; rows sum to one.

    Cost O(b h n (n / block + block) d) a step. Exact for one block (block >= n) and for blocks of one token.

    Args:
        query: what the tokens ask.
        key: what they answer to.
        value: what they hold.
        mask: True = takes part; a masked key is read by none, a masked query shapes no weights.
        scale: factor on the logits.
        block: c, tokens in a block (count); the last one is filled up with masked ones.
        num_steps: T, rounds of both updates (count).

    Raises:
        ValueError: block or num_steps below 1.
    """
    if min(block, num_steps) < 1:
        raise ValueError(f"block and num_steps must be at least 1: got {block} and {num_steps}")
    n = query.shape[2]
    block = min(block, n)
    if mask is None and n % block:
        mask = query.new_ones(len(query), n, dtype=torch.bool)
    hidden = None  # (b, 1, p, c)
    if mask is not None:
        hidden = ~F.pad(mask, (0, -n % block)).unflatten(1, (-1, block))[:, None]
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (F.pad(x.to(wide), (0, 0, 0, -n % block)).unflatten(2, (-1, block)) for x in (query, key, value))
    q = scale * q if hidden is None else (scale * q).masked_fill(hidden[..., None], 0.0)
    by_place = q.transpose(2, 3).contiguous()  # (b, h, c, p, d), where q, k and v are (b, h, p, c, d)

    within_block, over_blocks = _updated(q, by_place, k, hidden)
    for _ in range(num_steps - 1):
        weights = over_blocks if hidden is None else over_blocks.masked_fill(hidden.mT[..., None], 0.0)
        mass = weights.sum(3)[..., None].clamp_min(torch.finfo(wide).tiny)  # (b, h, c, p, 1)
        asked = (weights.mT @ by_place / mass).transpose(2, 3)
        within_block, over_blocks = _updated(asked, by_place, k, hidden)
    out = over_blocks @ (within_block @ v).transpose(2, 3)  # (b, h, c, p, v)
    return out.transpose(2, 3).flatten(2, 3)[:, :, :n].to(query.dtype)


def _updated(
    asked: Float[Tensor, "b h p c d"],
    by_place: Float[Tensor, "b h c p d"],
    k: Float[Tensor, "b h p c d"],
    hidden: Bool[Tensor, "b 1 p c"] | None,
) -> tuple[Float[Tensor, "b h p c c"], Float[Tensor, "b h c p p"]]:
    """Both factors, from what the queries at each place together ask of each block."""
    logits = asked @ k.mT
    if hidden is not None:
        logits = logits.masked_fill(hidden[..., None, :], torch.finfo(k.dtype).min)
    within_block = logits.softmax(-1)
    answers = within_block @ k  # (b, h, p, c, d)
    log_sum = logits.amax(-1) - within_block.amax(-1).log()
    entropy = log_sum - (asked * answers).sum(-1)  # minus the mean logit; so low without a key that none reads there
    logits = by_place @ answers.transpose(2, 3).mT + entropy.mT[..., None, :]  # (b, h, c, p, p)
    return within_block, logits.softmax(-1)
