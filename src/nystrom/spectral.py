"""Spectral shifting: Nyström attention plus a multiple δ of the identity, for heads whose tokens read themselves.

The identity has full rank, so no product of m-column factors comes near δ I, however well it is inverted. With
N = F Z B, the matrix of `nystrom_attention` (left, inverse of the core, right: functional.py),

    spectral_shift_attention   S ≈ (1 - δ) N + δ I    rows of sum 1 keep it
    additive_shift_attention   S ≈ N + δ I            rows gain δ in sum

δ is one number per sample and head: the one that gives the approximation the trace of S. The trace of N is exact,
tr N = tr(Z (B F)), an m x m product. The trace of S is estimated: of each of m segments of the valid tokens the middle
one gives its exact weight on itself, and counts for its segment.

What is the paper's and what is ours: docs/spectral-shift.md.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nystrom._precision import full_precision
from nystrom._validate import check_attention_inputs, check_options
from nystrom.functional import Summary, core, inverse_of, summarise, through_landmarks, weights
from nystrom.inverses import Inverse, InverseName
from nystrom.landmarks import Landmarks, LandmarksName, strided


def spectral_shift_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g n d"],
    value: Float[Tensor, "b g n v"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    query_mask: Bool[Tensor, "b n"] | None = None,
    num_landmarks: int = 64,
    num_pinv_iters: int | None = None,
    landmarks: LandmarksName | Landmarks = "segment_means",
    pinv: InverseName | Inverse = "iterative",
) -> Float[Tensor, "b h n v"]:
    """Approximate softmax self-attention by ``(1 - δ) F Z B + δ I``: Nyström attention, moved towards the values.

    With σ and τ the mean weight of a token on itself in S and in F Z B, ``δ = (σ - τ) / (1 - τ)`` where σ > τ, else 0,
    when the result is that of `nystrom_attention` bit for bit. δ is in [0, 1]. Time O(b h n m (d + m) + b h m³), two to
    four times that of `nystrom_attention`; memory O(b h n m), for a few n x m arrays.

    Args:
        query: as in `nystrom_attention`, and so are all that follow unless said.
        key: what the same n tokens answer to. Position i of query and of key must be one token.
        value: what the n tokens hold.
        attn_mask: which keys take part.
        dropout_p: on F alone: δ is made without it, and neither δ nor the value it is multiplied with is dropped.
        is_causal: must be False.
        scale: factor on the logits.
        enable_gqa: let each key/value head serve several query heads. Each of these has its own δ.
        query_mask: which queries are real. δ is made from, and applied to, tokens whose query and key both take part;
            for other queries the result is that of `nystrom_attention`.
        num_landmarks: m (count); also the tokens from which the mean weight in S is estimated. From m = n on that
            estimate is exact.
        num_pinv_iters: steps of the inverse (count).
        landmarks: how they are made.
        pinv: how the core is inverted.

    Returns:
        The attended values, in value's dtype; all arithmetic is in float32 or wider. Gradients flow through δ too.

    Raises:
        ValueError: query and key differ in length; and as `nystrom_attention`.

    Source: ours. Shifting for symmetric kernels is of Wang et al. 2014 (SS-Nyström, arXiv:1406.5675); for attention it
    was proposed by Verma 2021, arXiv:2103.05638, of which only the abstract was available to us.

    >>> import torch
    >>> query, value = torch.randn(2, 1, 4, 500, 32).unbind()
    >>> spectral_shift_attention(4 * query, query, value, num_landmarks=16).sub(value).abs().max() < 0.5
    tensor(True)
    """
    _check_self_attention(query, key, value, enable_gqa)
    check_options(dropout_p, is_causal, scale, num_landmarks, num_pinv_iters)
    invert = inverse_of(pinv, num_pinv_iters)
    with full_precision(query.device):
        at = summarise(query, key, attn_mask, query_mask, scale, num_landmarks, landmarks)
        parts = _parts(at, invert, value, query_mask, num_landmarks, dropout_p)
        excess = parts.exact_own - parts.nystrom_own
        room = torch.where(excess > 0, 1 - parts.nystrom_own, 1.0)  # at least excess, for exact_own is at most 1
        shift = _per_token(torch.where(excess > 0, excess / room, 0.0), parts)
        return torch.lerp(parts.out, parts.value, shift).flatten(1, 2).to(value.dtype)


def additive_shift_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g n d"],
    value: Float[Tensor, "b g n v"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    query_mask: Bool[Tensor, "b n"] | None = None,
    num_landmarks: int = 64,
    num_pinv_iters: int | None = None,
    landmarks: LandmarksName | Landmarks = "segment_means",
    pinv: InverseName | Inverse = "iterative",
) -> Float[Tensor, "b h n v"]:
    """Approximate softmax self-attention by ``F Z B + δ I``: the plain form of spectral shifting.

    δ is the mean weight of a token on itself in S less that in F Z B: with the true trace of S, the minimiser of
    ``‖S - F Z B - δ I‖`` in the Frobenius norm. It may be negative. `spectral_shift_attention` has the same cost and is
    rarely the worse of the two: this one adds δ to the sum of every row.

    Args:
        query: as in `spectral_shift_attention`, and so are all that follow.
        key: with n tokens.
        value: with n tokens.
        attn_mask: which keys take part.
        dropout_p: on F alone.
        is_causal: must be False.
        scale: factor on the logits.
        enable_gqa: let each key/value head serve several query heads.
        query_mask: which queries are real.
        num_landmarks: m (count); also the tokens from which the mean weight in S is estimated.
        num_pinv_iters: steps of the inverse (count).
        landmarks: how they are made.
        pinv: how the core is inverted.

    Returns:
        The attended values, in value's dtype; all arithmetic is in float32 or wider. Gradients flow through δ too.

    Raises:
        ValueError: query and key differ in length; and as `nystrom_attention`.

    Source: ours, as for `spectral_shift_attention`.

    >>> import torch
    >>> query, value = torch.randn(2, 1, 4, 500, 32).unbind()
    >>> additive_shift_attention(query, query, value, num_landmarks=16).shape
    torch.Size([1, 4, 500, 32])
    """
    _check_self_attention(query, key, value, enable_gqa)
    check_options(dropout_p, is_causal, scale, num_landmarks, num_pinv_iters)
    invert = inverse_of(pinv, num_pinv_iters)
    with full_precision(query.device):
        at = summarise(query, key, attn_mask, query_mask, scale, num_landmarks, landmarks)
        parts = _parts(at, invert, value, query_mask, num_landmarks, dropout_p)
        shift = _per_token(parts.exact_own - parts.nystrom_own, parts)
        return (parts.out + shift * parts.value).flatten(1, 2).to(value.dtype)


class _Parts(NamedTuple):
    """What both forms are made of, in float32 or wider, query heads beside the key/value head they share."""

    out: Float[Tensor, "b g r n v"]
    """The result of `nystrom_attention`, before it is rounded to value's dtype."""
    value: Float[Tensor, "b g 1 n v"]
    exact_own: Float[Tensor, "b h"]
    """Mean weight of a valid token on itself in S, estimated; at most 1."""
    nystrom_own: Float[Tensor, "b h"]
    """The same in F Z B, exact."""
    mask: Bool[Tensor, "b n"] | None
    """Tokens that take part both as a query and as a key, and so have a weight on themselves; None where all do."""


def _parts(
    at: Summary,
    invert: Inverse,
    value: Float[Tensor, "b g n v"],
    query_mask: Bool[Tensor, "b n"] | None,
    num_tokens: int,
    dropout_p: float,
) -> _Parts:
    core_pinv = invert(core(at)).to(at.key_landmarks.dtype)  # (b, h, p, m)
    mask = at.key_mask
    if query_mask is not None:
        mask = query_mask if mask is None else query_mask & mask
    out = through_landmarks(at, core_pinv, value, dropout_p)
    return _Parts(
        out.unflatten(1, (at.key.shape[1], -1)),
        value[:, :, None].to(out.dtype),
        _exact_own(at, mask, num_tokens),
        _nystrom_own(at, core_pinv, mask),
        mask,
    )


def _exact_own(at: Summary, mask: Bool[Tensor, "b n"] | None, num_tokens: int) -> Float[Tensor, "b h"]:
    """Mean softmax weight of a valid token on itself, from one token of each segment; 0 without a valid token.

    To estimate all n normalisers from the landmarks instead takes a mean inside the exponential: they come out too
    small (Jensen) and δ too large, by measurement in docs/spectral-shift.md.
    """
    b, h, n, _ = at.query.shape
    places = torch.arange(n, dtype=torch.float32, device=at.query.device).view(1, 1, n, 1)
    middle, counts = strided(places.expand(b, 1, n, 1), num_tokens, mask)
    index = middle.flatten(1).long()[:, None, :, None].expand(b, h, -1, 1)  # (b, h, tokens, 1)
    query = at.query.gather(2, index.expand(-1, -1, -1, at.query.shape[3]))
    weight = _read_keys(at, query).gather(3, index).squeeze(3)
    return (weight * counts[:, None]).sum(-1) / counts.sum(-1, keepdim=True).clamp_min(1)


def _nystrom_own(
    at: Summary, core_pinv: Float[Tensor, "b h p m"], mask: Bool[Tensor, "b n"] | None
) -> Float[Tensor, "b h"]:
    """Mean of the diagonal of F Z B over the valid tokens, by tr(F Z B) = tr(Z (B F)); 0 without a valid token."""
    left = weights(at.query, at.key_landmarks, at.key_exists, at.scale)
    num_valid: int | Tensor = left.shape[2]
    if mask is not None:
        left = left.masked_fill(~mask[:, None, :, None], 0.0)
        num_valid = mask.sum(-1, keepdim=True).clamp_min(1)
    right_left = _read_keys(at, at.query_landmarks) @ left  # (b, h, m, p)
    return (core_pinv * right_left.mT).sum((-2, -1)) / num_valid


def _read_keys(at: Summary, query: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h m n"]:
    """Softmax weights of some queries on all keys."""
    h, g = query.shape[1], at.key.shape[1]
    by_group = query.unflatten(1, (g, h // g)).flatten(2, 3)  # as in `through_landmarks`
    key_mask = None if at.key_mask is None else at.key_mask[:, None]
    return weights(by_group, at.key, key_mask, at.scale).unflatten(2, (h // g, -1)).flatten(1, 2)


def _per_token(shift: Float[Tensor, "b h"], parts: _Parts) -> Float[Tensor, "b g r n2 1"]:
    """δ at the tokens that have a weight on themselves, 0 at others."""
    shift = shift.unflatten(1, parts.out.shape[1:3])[..., None, None]
    return shift if parts.mask is None else torch.where(parts.mask[:, None, None, :, None], shift, 0.0)


def _check_self_attention(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    check_attention_inputs(query, key, value, enable_gqa)
    n, s = query.shape[2], key.shape[2]
    if n != s:
        raise ValueError(
            f"query and key must share the length, for only self-attention has a diagonal to shift: got query length "
            f"{n}, key length {s}; use nystrom_attention for cross-attention"
        )
