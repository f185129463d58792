"""Longformer's attention: a sliding window and a few global tokens (Beltagy et al. 2020)."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nystrom._precision import full_precision
from nystrom.baselines.tokens import finish, prepare, three_blocks


def window_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n v"],
    mask: Bool[Tensor, "b n"] | None = None,
    *,
    window: int = 512,
    num_global: int = 1,
) -> Float[Tensor, "b h n v"]:
    """Softmax over the tokens up to window / 2 away on either side, and over the global ones, which read everything.

    Longformer projects queries, keys and values of the global tokens anew; here they are the same as the others'. Time
    O(b h n (1.5 window + num_global) d), memory O(b h n d) where torch has a fused kernel, plus one bool per logit.

    Args:
        query: what the n tokens ask, per head.
        key: what they answer to.
        value: what they hold; its width may differ.
        mask: True = takes part.
        window: tokens read beside the token itself, half of them on either side (count, even).
        num_global: the first so many tokens that take part read all and are read by all.

    Raises:
        ValueError: window is odd or below 2; num_global is negative; shapes or dtypes disagree; mask is not bool
            (b, n).

    Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.1.
    """
    if window < 2 or window % 2 or num_global < 0:
        raise ValueError(
            f"window must be even and at least 2, and num_global at least 0: got {window} and {num_global}"
        )
    with full_precision(query.device):
        q, k, v, mask = prepare(query, key, value, mask)
        n = q.shape[2]
        first = mask.long().argsort(dim=-1, descending=True, stable=True)[:, :num_global]
        out = _windows(q, k, v, mask, min(window // 2, n), first)
        if num_global:
            reads = (mask | ~mask.any(-1, keepdim=True))[:, None, None]  # without a key all, or there would be a NaN
            everything = F.scaled_dot_product_attention(_at(q, first), k, v, reads)
            out = out.scatter(2, first[:, None, :, None].expand(everything.shape), everything)
        return finish(out, mask, value.dtype)


def _at(x: Float[Tensor, "b h n w"], places: Int[Tensor, "b g"]) -> Float[Tensor, "b h g w"]:
    """Those of each sample's own tokens."""
    return x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _windows(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n v"],
    mask: Bool[Tensor, "b n"],
    half: int,
    first: Int[Tensor, "b g"],
) -> Float[Tensor, "b h n v"]:
    """Each token reads those up to `half` away and the global ones, in blocks of `half` tokens."""
    b, n = q.shape[0], q.shape[2]
    ask = torch.arange(half, device=q.device)[:, None]
    answer = torch.arange(3 * half, device=q.device) - half  # both counted from the block's first token
    local = three_blocks(mask.scatter(1, first, False)[:, None, :, None], half)[:, 0, ..., 0]
    visible = local[:, :, None] & ((ask - answer).abs() <= half)  # (b, blocks, half, 3 half)
    visible = visible | (ask == answer)  # padding sees itself, or there would be a NaN
    shared = mask.gather(1, first)[:, None, None].expand(-1, *visible.shape[1:3], -1)
    visible = torch.cat([visible, shared], -1).flatten(0, 1)[:, None]
    keys, values = (
        torch.cat(
            [three_blocks(x, half).transpose(1, 2), _at(x, first)[:, None].expand(-1, local.shape[1], -1, -1, -1)], 3
        )
        for x in (k, v)
    )
    queries = F.pad(q, (0, 0, 0, -n % half)).unflatten(2, (-1, half)).transpose(1, 2)  # (b, blocks, h, half, d)
    queries, keys, values = (x.flatten(0, 1) for x in (queries, keys, values))  # a block as a sample of its own
    out = F.scaled_dot_product_attention(queries, keys, values, visible)
    return out.unflatten(0, (b, -1)).transpose(1, 2).flatten(2, 3)[:, :, :n]
