"""The attention functions that `import nystrom.hf` registers with transformers, and their masks."""

from functools import partial
from typing import Any, NamedTuple

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


class Mask(NamedTuple):
    """What transformers hands from its mask functions to `attend`.

    Not a tensor, so that a model which attends by itself stops at it instead of misreading it.
    """

    padding: Bool[Tensor, "b s"] | None
    """Which tokens are real; None: all."""
    reach: int | None
    """How far a token reads (count); None: every token."""
    dense: Bool[Tensor, "b 1 n s"] | None = None
    """Any other mask, such as a causal one."""

    def __radd__(self, scores: object) -> Any:
        raise ValueError(
            "this model adds its mask to scores of its own, so it does not take its attention from transformers' "
            'AttentionInterface and it cannot be exchanged: attn_implementation="eager"'
        )


def register() -> None:
    """Make "nystrom", "nystrom_shift" and "nystrom_residual" values of transformers' `attn_implementation`."""
    for name in ATTENTIONS:
        AttentionInterface.register(name, partial(attend, name))
        AttentionMaskInterface.register(name, mask)  # without it transformers drops the mask, unsaid


def mask(*args: Any, attention_mask: Tensor | None = None, **options: Any) -> Mask:
    """What a layer may read: O(b n) memory for encoders, where transformers would spread padding over n x n."""
    if options.get("allow_is_bidirectional_skip"):  # every real token, or those in a window
        return Mask(attention_mask, options.get("local_size"))
    return Mask(None, None, sdpa_mask(*args, attention_mask=attention_mask, **options))


def attend(
    attention: str,
    module: nn.Module,
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g s d"],
    value: Float[Tensor, "b g s v"],
    attention_mask: Mask | Tensor | None,
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
            query; cross-attention with nystrom_shift or in a window; attention weights are asked for.
    """
    config = getattr(module, "config", None)
    if config is not None and getattr(config, "nystrom", None) is not None and not torch.compiler.is_compiling():
        config.attn_implementation = config._attn_implementation  # for config.json: transformers forgets it on loading
    settings = settings_of(config, getattr(module, "layer_idx", None))
    name = type(module).__name__
    read = attention_mask if isinstance(attention_mask, Mask) else Mask(None, None, attention_mask)
    _check_options(name, attention, options)
    if is_causal is None:  # as transformers' own reads it
        is_causal = getattr(module, "is_causal", read.padding is None and read.dense is None)
    if is_causal:
        if not settings.exact_causal:
            raise ValueError(
                f"{name} is causal, and landmarks would let its tokens read the future. For the encoder of a model "
                "that also has a decoder: nystrom.hf.configure(model, exact_causal=True) leaves causal layers exact. "
                'For a causal model: attn_implementation="sdpa"'
            )
        every = _over_keys(read.padding) if read.dense is None else read.dense
        return sdpa_attention_forward(module, query, key, value, every, dropout, scaling, is_causal, **options)
    if options.get("position_bias") is not None:
        raise ValueError(_cannot_take(name, "position_bias", attention))
    if sliding_window is not None and read.reach is None:
        raise ValueError(
            f"{name} reads a window of tokens that its mask does not tell of; give the model a padding mask (b, n)"
        )
    b, _, n, _ = query.shape
    s = key.shape[2]
    padding = read.padding if read.dense is None else _key_mask(name, read.dense, b, n, s)
    cross = n != s or "Cross" in name or getattr(module, "is_decoder", False)  # causal ones did not come here
    if cross and attention == "nystrom_shift":
        raise ValueError(
            f"{name} is cross-attention ({n} queries, {s} keys), which has no diagonal to shift; "
            "use nystrom or nystrom_residual"
        )
    if n != s and read.reach is not None:
        raise ValueError(
            f"{name} reads a window across sequences ({n} queries, {s} keys), which {attention} cannot; "
            'give this model attn_implementation="sdpa"'
        )
    out = _attend(attention, settings, query, key, value, padding, read.reach, cross, dropout, scaling)
    return out.transpose(1, 2).contiguous(), None


def _attend(
    attention: str,
    settings: Settings,
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g s d"],
    value: Float[Tensor, "b g s v"],
    mask: Bool[Tensor, "b s"] | None,
    reach: int | None,
    cross: bool,
    dropout_p: float,
    scale: float | None,
) -> Float[Tensor, "b h n v"]:
    b, h, n, _ = query.shape
    length, gqa = max(n, key.shape[2]), h != key.shape[1]
    least = EXACT_BELOW[attention] if settings.exact_below is None else settings.exact_below
    if length < least if reach is None else length <= reach + 1:
        every = _over_keys(mask)
        return F.scaled_dot_product_attention(query, key, value, every, dropout_p, scale=scale, enable_gqa=gqa)
    if reach is not None:
        return window_attention(query, key, value, mask, dropout_p, scale, reach)
    function = _approximate(attention, settings, cross)
    real = query.new_ones(b, n, dtype=torch.bool) if cross else None  # not the key mask where n happens to be s
    return function(query, key, value, mask, dropout_p, scale=scale, enable_gqa=gqa, query_mask=real)


def _over_keys(mask: Bool[Tensor, "b s"] | None) -> Bool[Tensor, "b 1 1 s"] | None:
    return None if mask is None else mask[:, None, None, :]


def _approximate(attention: str, settings: Settings, cross: bool) -> Any:
    if attention == "nystrom_residual":
        return partial(
            residual_nystrom_attention,
            num_landmarks=settings.num_landmarks,
            top_k=settings.top_k,
            window=0 if cross else settings.window,
            block=settings.block,
        )
    function = nystrom_attention if attention == "nystrom" else spectral_shift_attention
    return partial(function, num_landmarks=settings.num_landmarks, num_pinv_iters=settings.num_pinv_iters)


def _check_options(name: str, attention: str, options: dict[str, Any]) -> None:
    """Raise ValueError for what the layer's attention would have to obey and cannot."""
    for extra in ("softcap", "s_aux", "sinks", "indices", "block_indices", "cu_seq_lens_q", "cache", "block_table"):
        if options.get(extra) is not None:
            raise ValueError(_cannot_take(name, extra, attention))
    if options.get("output_attentions"):
        raise ValueError(
            f"{attention} makes no n x n weights to return: leave output_attentions out, use "
            'attn_implementation="eager", or nystrom.attention_rows for chosen rows'
        )


def _cannot_take(name: str, extra: str, attention: str) -> str:
    return (
        f"{name} passes {extra} to its attention, which {attention} cannot take; "
        'give this model attn_implementation="sdpa"'
    )


def _key_mask(name: str, mask: Tensor, b: int, n: int, s: int) -> Bool[Tensor, "b s"]:
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
        q.transpose(1, 2).flatten(0, 1),  # four dimensions, for the fused kernels
        k.transpose(1, 2).flatten(0, 1),
        v.transpose(1, 2).flatten(0, 1),
        near.flatten(0, 1)[:, None],
        dropout_p,
        scale=scale,
    )  # (b blocks, h, size, v)
    return out.unflatten(0, (b, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :n]
