"""What kinds share: check and widen inputs, keep masked tokens out, put blocks beside their neighbours."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nystrom._validate import check_attention_inputs, check_token_mask


def prepare(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n v"],
    mask: Bool[Tensor, "b n"] | None,
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"], Float[Tensor, "b h n v"], Bool[Tensor, "b n"]]:
    """Query, key and value in float32 or wider, zero where masked, and the mask, made where there is none.

    Raises:
        ValueError: shapes or dtypes disagree; key is of another length than query; mask is not bool (b, n).
    """
    check_attention_inputs(query, key, value, enable_gqa=False)
    b, _, n, _ = query.shape
    if key.shape[2] != n:
        raise ValueError(f"self-attention has as many keys as queries: got {key.shape[2]} and {n}")
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key, value = (x.to(wide) for x in (query, key, value))
    if mask is None:
        return query, key, value, torch.ones(b, n, dtype=torch.bool, device=query.device)
    check_token_mask("mask", mask, b, n)
    hidden = ~mask[:, None, :, None]
    query, key, value = (x.masked_fill(hidden, 0.0) for x in (query, key, value))
    return query, key, value, mask


def finish(out: Float[Tensor, "b h n v"], mask: Bool[Tensor, "b n"], dtype: torch.dtype) -> Float[Tensor, "b h n v"]:
    """The result in `dtype`, zero at masked tokens."""
    return out.masked_fill(~mask[:, None, :, None], 0.0).to(dtype)


def three_blocks(x: Tensor, width: int) -> Tensor:
    """Each block of `width` tokens with its neighbours, (b, h, blocks, 3 width, d); zeros or False beyond the ends."""
    n = x.shape[2]
    padded = F.pad(x, (0, 0, width, width + -n % width))
    return padded.unfold(2, 3 * width, width).transpose(-1, -2)
