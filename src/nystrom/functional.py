"""Nyström attention: the maths of Nyströmformer, top to bottom (Xiong et al. 2021, arXiv:2102.03902).

Softmax attention ``S V`` with ``S = softmax(Q Kᵀ / √d)`` is replaced by ``F A⁺ B V`` (eq 13), where Q~ and K~ are m
landmark queries and keys, each the mean of a segment of tokens (eq 16, landmarks.py):

    F = left  = softmax(Q  K~ᵀ / √d)   n x m
    A = core  = softmax(Q~ K~ᵀ / √d)   m x m,   A⁺ = core_pinv, by iteration (eq 14, inverses.py)
    B = right = softmax(Q~ Kᵀ  / √d)   m x s

Read right to left, both outer factors are ordinary attention, so neither is ever stored:

    B V          = attend(Q~, K, V)              landmarks read the tokens
    F (A⁺ (B V)) = attend(Q, K~, A⁺ (B V))       tokens read the landmarks

Shapes, one meaning each across the library: b batch, h heads, g key/value heads (g = h unless enable_gqa), n queries,
s keys, m landmarks, d head width, v value width, c model width. Masks are bool and True means "takes part".
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nystrom._precision import full_precision
from nystrom._validate import (
    check_attention_inputs,
    check_landmarks,
    check_options,
    check_token_mask,
    key_padding_mask,
)
from nystrom.inverses import (
    Inverse,
    InverseName,
    chebyshev_pinv,
    iterative_pinv,
    ridge_pinv,
    svd_pinv,
)
from nystrom.landmarks import Landmarks, LandmarksName, kmeans, segment_means, segment_means_sharing, strided

LANDMARKS: dict[str, Landmarks] = {"segment_means": segment_means, "strided": strided, "kmeans": kmeans}
INVERSES: dict[str, Callable[..., Tensor]] = {
    "iterative": iterative_pinv,
    "chebyshev": chebyshev_pinv,
    "ridge": ridge_pinv,
    "svd": svd_pinv,
}
STEPPED = ("iterative", "chebyshev")
"""Inverses that take num_pinv_iters."""


def nystrom_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g s d"],
    value: Float[Tensor, "b g s v"],
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
    """Approximate softmax attention in time and memory linear in the length.

    The first eight parameters are those of `torch.nn.functional.scaled_dot_product_attention`. Time is
    O(b h (n + s) m d + b h m³). Beyond the output, memory is O(b h m (d + m)) wherever torch has a fused kernel for the
    inputs (on CPU it has none with dropout_p > 0), plus a float32 copy of half-precision inputs, of value or of query
    and key where their widths differ, and, on other devices than a CPU, of query and key with a mask.

    Args:
        query: what the n tokens ask, per head.
        key: what the s tokens answer to, per head; s may differ from n (cross-attention).
        value: what the s tokens hold; its width may differ from key's.
        attn_mask: which keys take part: bool (True = takes part) or additive float (0, or <= -1e4 for masked), of
            shape (b, s), (b, 1, 1, s), or (b, 1, n, s) with equal rows; 1 for b is all samples. A 2-D mask is read as
            (b, s), where SDPA would read (n, s). A masked key adds nothing to any landmark or output, whatever it
            holds, so long as its logits are finite; in the backward pass of torch's fused kernels a padded query with
            logits beyond about 1e6 can overflow into NaN.
        dropout_p: probability with which a query's weight on a landmark (an entry of `left`) is zeroed; the others
            are scaled by 1 / (1 - dropout_p), so the expected output is unchanged. Applied whenever it is above 0.
        is_causal: must be False; landmarks average over the future.
        scale: factor on the logits of all three softmaxes; default 1 / √d.
        enable_gqa: let each of g key/value heads serve h / g consecutive query heads.
        query_mask: which queries are real, i.e. enter the query landmarks. Default: the key mask where n = s, which is
            taken for self-attention, otherwise every query; give it in cross-attention of equal lengths. The outputs of
            masked queries are finite and mean nothing.
        num_landmarks: m, segments per sample (count). Where a sample has fewer than m valid tokens, each of them is a
            landmark and the surplus ones carry no weight.
        num_pinv_iters: steps of the inverse, for "iterative" (default 6) and "chebyshev" (default 7) alone. A
            regulariser and part of what trained weights mean, not a precision knob: more steps can be worse attention.
        landmarks: a function of landmarks.py, or its name; "segment_means" is the published one. Any function of
            tokens (b, h, n, d), num_landmarks and a mask (b, n) or None, to landmarks and counts, will do.
        pinv: a function of inverses.py, or its name; "iterative" is the published one. Any function of matrices to
            their inverses will do, such as ``functools.partial(ridge_pinv, ridge=1e-2)``.

    Returns:
        The attended values, in value's dtype. All arithmetic is in float32 or wider, autocast included. A sample
        without a valid key, or without a valid query, gives zeros and zero gradients. On a CPU the gradients cannot be
        differentiated again, except under `torch.func` with SDPA's math backend.

    Raises:
        ValueError: shapes or dtypes disagree; the mask varies by query or head; is_causal; an option out of range.

    Source: Xiong et al. 2021, arXiv:2102.03902, eq 13, 14 and 16. Where we differ: docs/deviations.md.

    >>> import torch
    >>> query, key, value = torch.randn(3, 2, 4, 1000, 32).unbind()
    >>> nystrom_attention(query, key, value, num_landmarks=16).shape
    torch.Size([2, 4, 1000, 32])
    """
    check_attention_inputs(query, key, value, enable_gqa)
    check_options(dropout_p, is_causal, scale, num_landmarks, num_pinv_iters)
    invert = inverse_of(pinv, num_pinv_iters)
    with full_precision(query.device):
        at = summarise(query, key, attn_mask, query_mask, scale, num_landmarks, landmarks)
        core_pinv = invert(core(at)).to(at.key_landmarks.dtype)  # (b, h, m, m)
        return through_landmarks(at, core_pinv, value, dropout_p).to(query.dtype)


class Summary(NamedTuple):
    """Tokens and their landmarks. Use these tokens from here on: they carry the landmarks' gradients as well."""

    query: Float[Tensor, "b h n d"]
    key: Float[Tensor, "b g s d"]
    key_mask: Bool[Tensor, "b s"] | None
    query_landmarks: Float[Tensor, "b h m d"]
    key_landmarks: Float[Tensor, "b h p d"]
    """Repeated over the query heads that share them; p differs from m only where n or s is below num_landmarks."""
    query_exists: Bool[Tensor, "b h1 m"] | None
    """False for an empty landmark; None where none is. h1 and h2 are h, or 1 where all heads agree."""
    key_exists: Bool[Tensor, "b h2 p"] | None
    scale: float


def summarise(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g s d"],
    attn_mask: Tensor | None,
    query_mask: Bool[Tensor, "b n"] | None,
    scale: float | None,
    num_landmarks: int,
    landmarks: LandmarksName | Landmarks,
) -> Summary:
    """Landmarks of the valid queries and keys (eq 16)."""
    b, h, n, d = query.shape
    g, s = key.shape[1:3]
    key_mask = None if attn_mask is None else key_padding_mask(attn_mask, b, n, s, h)
    if query_mask is not None:
        check_token_mask("query_mask", query_mask, b, n)
    elif n == s:
        query_mask = key_mask
    query, query_landmarks, query_exists = _landmarks(query, landmarks, num_landmarks, query_mask)
    if key_mask is not None:  # where there is no key, ask nothing of the padding, which `attend` then shows
        query_landmarks = query_landmarks.masked_fill(~key_mask.any(-1)[:, None, None, None], 0.0)
    key, key_landmarks, key_exists = _landmarks(key, landmarks, num_landmarks, key_mask)
    key_landmarks = key_landmarks.repeat_interleave(h // g, dim=1)
    if key_exists is not None and key_exists.shape[1] == g:
        key_exists = key_exists.repeat_interleave(h // g, dim=1)
    factor = d**-0.5 if scale is None else scale
    return Summary(query, key, key_mask, query_landmarks, key_landmarks, query_exists, key_exists, factor)


def core(at: Summary) -> Float[Tensor, "b h m p"]:
    """The core factor A. Rows and columns of empty landmarks are zero, and so they stay in its inverse."""
    logits = at.scale * at.query_landmarks @ at.key_landmarks.mT
    if at.key_exists is not None:
        lowest = torch.finfo(logits.dtype).min  # finite, so that a sample without keys makes no NaN
        logits = logits.masked_fill(~at.key_exists[:, :, None, :], lowest)
    weights = logits.softmax(-1)
    for exists, axis in ((at.query_exists, -1), (at.key_exists, -2)):
        if exists is not None:
            weights = weights.masked_fill(~exists.unsqueeze(axis), 0.0)
    return weights


def through_landmarks(
    at: Summary, core_pinv: Float[Tensor, "b h p m"], value: Float[Tensor, "b g s v"], dropout_p: float
) -> Float[Tensor, "b h n v"]:
    """``F (A⁺ (B V))`` (eq 13)."""
    h, g = at.query.shape[1], at.key.shape[1]
    # Grouped heads share their keys, so their landmarks go in as extra queries: keys are never repeated.
    by_group = at.query_landmarks.unflatten(1, (g, h // g)).flatten(2, 3)  # (b, g, h/g m, d)
    key_mask = None if at.key_mask is None else at.key_mask[:, None]
    right_value = attend(by_group, at.key, value, key_mask, at.scale)  # landmarks read the tokens
    right_value = right_value.unflatten(2, (h // g, -1)).flatten(1, 2)  # (b, h, m, v)
    landmark_value = core_pinv @ right_value
    return attend(at.query, at.key_landmarks, landmark_value, at.key_exists, at.scale, dropout_p)  # and tokens them


def inverse_of(pinv: InverseName | Inverse, num_pinv_iters: int | None) -> Inverse:
    """The function that an option names, with its number of steps.

    Raises:
        ValueError: an unknown name; num_pinv_iters given for an inverse that takes no steps.
    """
    if isinstance(pinv, str) and pinv not in INVERSES:
        raise ValueError(f"pinv must be one of {', '.join(INVERSES)}, or a function: got {pinv!r}")
    invert = INVERSES[pinv] if isinstance(pinv, str) else pinv
    if num_pinv_iters is None:
        return invert
    if pinv not in STEPPED:
        raise ValueError(
            f"num_pinv_iters is for {' and '.join(STEPPED)} alone: got {num_pinv_iters} with pinv={pinv!r}; "
            f"set a function's own options with functools.partial"
        )
    return partial(invert, num_iters=num_pinv_iters)


def landmarks_of(landmarks: LandmarksName | Landmarks) -> Landmarks:
    """The function that an option names.

    Raises:
        ValueError: an unknown name.
    """
    if not isinstance(landmarks, str):
        return landmarks
    if landmarks not in LANDMARKS:
        raise ValueError(f"landmarks must be one of {', '.join(LANDMARKS)}, or a function: got {landmarks!r}")
    return LANDMARKS[landmarks]


def _landmarks(
    tokens: Float[Tensor, "b h n d"],
    landmarks: LandmarksName | Landmarks,
    num_landmarks: int,
    mask: Bool[Tensor, "b n"] | None,
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h m d"], Bool[Tensor, "b h2 m"] | None]:
    """The tokens, their landmarks, and which of these exist (None: all)."""
    make = landmarks_of(landmarks)
    if make is segment_means:
        tokens, means, counts = segment_means_sharing(tokens, num_landmarks, mask)
        if mask is None and not torch.compiler.is_exporting():
            return tokens, means, None
    else:
        means, counts = make(tokens, num_landmarks, mask)
        check_landmarks(means, counts, tokens)
        means = means.to(torch.promote_types(means.dtype, torch.float32))
    return tokens, means, (counts if counts.ndim == 3 else counts[:, None]) > 0


def attend(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h s d"],
    value: Float[Tensor, "b h s v"],
    key_mask: Bool[Tensor, "b h2 s"] | None,
    scale: float,
    dropout_p: float = 0.0,
) -> Float[Tensor, "b h n v"]:
    """Exact attention in the widest of the dtypes, widths made equal as torch's kernels ask: zeros change no logit."""
    if key_mask is not None:  # without a key see everything: the core inverse is zero, so the output is, without NaN
        key_mask = (key_mask | ~key_mask.any(-1, keepdim=True))[:, :, None, :]
    d, v = query.shape[-1], value.shape[-1]
    if v > d:
        query, key = F.pad(query, (0, v - d)), F.pad(key, (0, v - d))
    elif v < d:
        value = F.pad(value, (0, d - v))
    wide = torch.promote_types(query.dtype, key.dtype)
    query, key, value = (x.to(wide) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, key_mask, dropout_p, scale=scale)[..., :v]


def weights(
    query: Float[Tensor, "*batch n d"],
    key: Float[Tensor, "*batch s d"],
    mask: Bool[Tensor, "*batch2 s"] | None,
    scale: float,
) -> Float[Tensor, "*batch n s"]:
    """Softmax weights in the wider dtype; a masked key's are zero, all of them where nothing else is there."""
    wide = torch.promote_types(query.dtype, torch.promote_types(key.dtype, torch.float32))
    logits = scale * query.to(wide) @ key.to(wide).mT
    if mask is None:
        return logits.softmax(-1)
    hidden = ~mask[..., None, :]
    return logits.masked_fill(hidden, torch.finfo(wide).min).softmax(-1).masked_fill(hidden, 0.0)
