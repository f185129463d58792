"""Attention approximated in other ways than ours, as plain functions: what an error is compared with.

Each takes query, key and value (b, h, n, d), a mask (b, n) or None, True = takes part, and the factor on the logits. A
masked token is read by none; what a masked query gets means nothing. Averages are taken over segments as
`segment_means` cuts them.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nystrom.baselines.tokens import three_blocks
from nystrom.landmarks import segment_means


def pooled(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n v"],
    mask: Bool[Tensor, "b n"] | None,
    scale: float,
    *,
    num_landmarks: int,
) -> Float[Tensor, "b h n v"]:
    """Every query reads the mean key and mean value of each segment, as if all its tokens were alike.

    Cost O(b h n m d); rows sum to one.
    """
    mean_key, counts = segment_means(key, num_landmarks, mask)
    mean_value, _ = segment_means(value, num_landmarks, mask)
    lowest = torch.finfo(mean_key.dtype).min  # finite, so that a sample without tokens makes no NaN
    bias = counts.to(mean_key.dtype).log().clamp_min(lowest)  # a segment weighs as much as its tokens together
    return F.scaled_dot_product_attention(query, mean_key, mean_value, bias[:, None, None, :], scale=scale)


def no_inverse(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n v"],
    mask: Bool[Tensor, "b n"] | None,
    scale: float,
    *,
    num_landmarks: int,
) -> Float[Tensor, "b h n v"]:
    """``left @ (right @ value)``: Nyström attention without its core, so that rows sum to one and no entry is negative.

    Cost O(b h n m d). Agent Attention (Han et al. 2024, arXiv:2312.08874) is of this form.
    """
    query_landmarks, counts = segment_means(query, num_landmarks, mask)
    key_landmarks, _ = segment_means(key, num_landmarks, mask)
    key_mask, exists = (None, None) if mask is None else (mask[:, None, None], (counts > 0)[:, None, None])
    read = F.scaled_dot_product_attention(query_landmarks, key, value, key_mask, scale=scale)
    return F.scaled_dot_product_attention(query, key_landmarks, read, exists, scale=scale)


def window(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n v"],
    mask: Bool[Tensor, "b n"] | None,
    scale: float,
    *,
    width: int,
) -> Float[Tensor, "b h n v"]:
    """Every query reads the block of `width` tokens it lies in and the two next to it, exactly, and nothing else.

    Cost O(b h n width d); rows sum to one.
    """
    b, h, n, _ = query.shape
    real = torch.ones(b, n, dtype=torch.bool, device=query.device) if mask is None else mask
    keys, values = (three_blocks(x, width) for x in (key, value))  # (b, h, blocks, 3 width, d)
    reads = three_blocks(real[:, None, :, None], width)[..., 0]  # (b, 1, blocks, 3 width)
    queries = F.pad(query, (0, 0, 0, -n % width)).unflatten(2, (-1, width))
    queries, keys, values = (x.flatten(1, 2) for x in (queries, keys, values))  # a block as a head of its own
    block_mask = reads.expand(-1, h, -1, -1).flatten(1, 2)[:, :, None]
    out = F.scaled_dot_product_attention(queries, keys, values, block_mask, scale=scale)
    return out.unflatten(1, (h, -1)).flatten(2, 3)[:, :, :n]
