"""The attention functions that `import nystrom.hf` registers with transformers, and their masks."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nystrom._validate import key_padding_mask
from nystrom.functional import nystrom_attention
from nystrom.hf.settings import ATTENTIONS, EXACT_BELOW, Settings, settings_of
from nystrom.residual import residual_nystrom_attention
from nystrom.spectral import spectral_shift_attention


def register() -> None:
    """Make "nystrom", "nystrom_shift" and "nystrom_residual" values of transformers' `attn_implementation`."""
    for name in ATTENTIONS:
        AttentionInterface.register(name, partial(attend, name))
        AttentionMaskInterface.register(name, padding_or_all)  # without it transformers drops the mask, unsaid


def attend(
    attention: str,
    module: nn.Module,
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g s d"],
    value: Float[Tensor, "b g s v"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "b n h v"], None]:
    """One layer's attention, as transformers' AttentionInterface calls it.

    Under `exact_below` tokens it is exact; layers that read a window of tokens read it exactly at any length.

    Raises:
        ValueError: the layer is causal; it changes its logits in a way that landmarks cannot follow; its mask varies by
            query; cross-attention with nystrom_shift; attention weights are asked for.
    """
    b, h, n, _ = query.shape
    s = key.shape[2]
    settings = settings_of(getattr(module, "config", None), getattr(module, "layer_idx", None))
    name = type(module).__name__
    if getattr(module, "is_causal", True) if is_causal is None else is_causal:  # as transformers' own reads it
        if settings.exact_causal:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
            )
        raise ValueError(
            f"{name} is causal, and landmarks would let its tokens read the future. For the encoder of a model "
            "that also has a decoder: nystrom.hf.configure(model, exact_causal=True) leaves causal layers exact. "
            'For a causal model: attn_implementation="sdpa"'
        )
    _check(name, attention, n, s, options)
    mask = _key_mask(name, attention_mask, b, n, s)
    if sliding_window is not None and sliding_window <= n:
        if n != s:
            raise ValueError(f"{name} reads a window across sequences ({n} queries, {s} keys); that is not supported")
        out = window_attention(query, key, value, mask, dropout, scaling, sliding_window - 1)
    elif max(n, s) < (EXACT_BELOW[attention] if settings.exact_below is None else settings.exact_below):
        every = None if mask is None else mask[:, None, None, :]
        out = F.scaled_dot_product_attention(
            query, key, value, every, dropout, scale=scaling, enable_gqa=h != key.shape[1]
        )
    else:
        out = _approximate(attention, settings)(
            query, key, value, mask, dropout, scale=scaling, enable_gqa=h != key.shape[1]
        )
    return out.transpose(1, 2).contiguous(), None


def _approximate(attention: str, settings: Settings) -> Any:
    if attention == "nystrom_residual":
        return partial(
            residual_nystrom_attention,
            num_landmarks=settings.num_landmarks,
            top_k=settings.top_k,
            window=settings.window,
            block=settings.block,
        )
    function = nystrom_attention if attention == "nystrom" else spectral_shift_attention
    return partial(function, num_landmarks=settings.num_landmarks, num_pinv_iters=settings.num_pinv_iters)


def _check(name: str, attention: str, n: int, s: int, options: dict[str, Any]) -> None:
    """Raise ValueError for what the attention would have to obey and cannot."""
    for extra in ("position_bias", "softcap", "s_aux", "cu_seq_lens_q", "cache", "block_table"):
        if options.get(extra) is not None:
            raise ValueError(
                f"{name} passes {extra} to its attention, which {attention} cannot take; "
                'give this model attn_implementation="sdpa"'
            )
    if options.get("output_attentions"):
        raise ValueError(
            f"{attention} makes no n x n weights to return: leave output_attentions out, use "
            'attn_implementation="eager", or nystrom.attention_rows for chosen rows'
        )
    if n != s and attention == "nystrom_shift":
        raise ValueError(
            f"{name} is cross-attention ({n} queries, {s} keys), which has no diagonal to shift; "
            "use nystrom or nystrom_residual"
        )


def _key_mask(name: str, mask: Tensor | None, b: int, n: int, s: int) -> Bool[Tensor, "b s"] | None:
    if mask is None:
        return None
    try:
        return key_padding_mask(mask, b, n, s)
    except ValueError as error:
        raise ValueError(
            f"{name} got a mask that says more than which tokens are real, as packed sequences do; put each sequence "
            f"in a row of its own, with padding: {error}"
        ) from None


def window_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g n d"],
    value: Float[Tensor, "b g n v"],
    mask: Bool[Tensor, "b n"] | None,
    dropout_p: float,
    scale: float | None,
    reach: int,
) -> Float[Tensor, "b h n v"]:
    """Exact attention to the tokens at most `reach` away, in time and memory O(b h n reach).

    Blocks of `reach` queries read the keys of their own block and of both beside it.
    """
    b, h, n, _ = query.shape
    if h != key.shape[1]:
        key, value = (x.repeat_interleave(h // x.shape[1], dim=1) for x in (key, value))
    size = max(1, reach)
    blocks = -(-n // size)
    more = blocks * size - n
    q = F.pad(query, (0, 0, 0, more)).unflatten(2, (blocks, size))  # (b, h, blocks, size, d)
    k, v = (F.pad(x, (0, 0, size, size + more)).unfold(2, 3 * size, size).mT for x in (key, value))
    real = query.new_ones(b, n, dtype=torch.bool) if mask is None else mask
    real = F.pad(real, (size, size + more)).unfold(1, 3 * size, size)  # (b, blocks, 3 size)
    place = torch.arange(size, device=query.device)[:, None] + size
    distance = (place - torch.arange(3 * size, device=query.device)).abs()  # (size, 3 size)
    near = real[:, :, None] & (distance <= reach) | (distance == 0)  # padding reads itself, lest it be NaN
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), near[:, :, None], dropout_p, scale=scale
    )  # (b, blocks, h, size, v)
    return out.transpose(1, 2).flatten(2, 3)[:, :, :n]


def padding_or_all(*args: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """The (b, n) padding mask for layers that read every token or a window of them, (b, 1, n, n) for any other.

    transformers would spread padding over n x n; so it does where the mask says more, for causal layers that
    `exact_causal` lets through.
    """
    plain = "allow_is_bidirectional_skip" in options and not options.get("use_vmap")  # as its bidirectional masks are
    if plain:
        return attention_mask
    return sdpa_mask(*args, attention_mask=attention_mask, **options)
