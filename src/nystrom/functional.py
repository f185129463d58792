"""Nyström attention: the maths of Nyströmformer, top to bottom (Xiong et al. 2021, arXiv:2102.03902).

Softmax attention ``S V`` with ``S = softmax(Q Kᵀ / √d)`` is replaced by ``F A⁺ B V`` (eq 13), where Q~ and K~ are m
landmark queries and keys, each the mean of a segment of tokens (eq 16):

    F = left  = softmax(Q  K~ᵀ / √d)   n x m
    A = core  = softmax(Q~ K~ᵀ / √d)   m x m,   A⁺ = core_pinv, by iteration (eq 14)
    B = right = softmax(Q~ Kᵀ  / √d)   m x s

Read right to left, both outer factors are ordinary attention, so neither is ever stored:

    B V          = sdpa(Q~, K, V)              landmarks read the tokens
    F (A⁺ (B V)) = sdpa(Q, K~, A⁺ (B V))       tokens read the landmarks

Shapes, one meaning each across the library: b batch, h heads, g key/value heads (g = h unless enable_gqa), n queries,
s keys, m landmarks, d head width, v value width, c model width. Masks are bool and True means "takes part".
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nystrom._validate import check_attention_inputs, check_options, check_token_mask, key_padding_mask


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
    num_pinv_iters: int = 6,
) -> Float[Tensor, "b h n v"]:
    """Approximate softmax attention in time and memory linear in the length.

    The first eight parameters are those of `torch.nn.functional.scaled_dot_product_attention`. Time is
    O(b h (n + s) m d + b h m³). Beyond the output, memory is O(b h m (d + m)), plus a copy of query and key with a
    mask, or of some inputs where v differs from d. No n x m, m x s or n x s array is made wherever torch has a fused
    kernel for the inputs; with dropout_p > 0 it has none on CPU.

    Args:
        query: what the n tokens ask, per head.
        key: what the s tokens answer to, per head; s may differ from n (cross-attention).
        value: what the s tokens hold; its width may differ from key's.
        attn_mask: which keys take part: bool (True = takes part) or additive float (0, or <= -1e4 for masked), of
            shape (b, s), (b, 1, 1, s), (1, 1, 1, s), or (b, 1, n, s) with equal rows. A 2-D mask is read as (b, s),
            where SDPA would read (n, s). A masked key adds nothing to any landmark or output, whatever it holds, so
            long as it is finite.
        dropout_p: probability with which a query's weight on a landmark (an entry of `left`) is zeroed; the others
            are scaled by 1 / (1 - dropout_p), so the expected output is unchanged. Applied whenever it is above 0.
        is_causal: must be False; landmarks average over the future.
        scale: factor on the logits of all three softmaxes; default 1 / √d.
        enable_gqa: let each of g key/value heads serve h / g consecutive query heads.
        query_mask: which queries are real, i.e. enter the query landmarks. Default: the key mask where n = s
            (self-attention), otherwise every query. The outputs of masked queries are finite and mean nothing.
        num_landmarks: m, segments per sample (count). Where a sample has fewer than m valid tokens, each of them is a
            landmark and the surplus ones carry no weight.
        num_pinv_iters: steps of `iterative_pinv` (count). A regulariser and part of what trained weights mean, not a
            precision knob: more steps can be worse attention.

    Returns:
        The attended values, in value's dtype. Means, core and inverse are computed in float32 or wider, the two outer
        products in the inputs' dtype. A sample without a valid key, or without a valid query, gives zeros and zero
        gradients.

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
    b, h, n, d = query.shape
    g, s = key.shape[1:3]
    factor = d**-0.5 if scale is None else scale
    key_mask = None if attn_mask is None else key_padding_mask(attn_mask, b, n, s)
    if query_mask is not None:
        check_token_mask("query_mask", query_mask, b, n)
    elif n == s:
        query_mask = key_mask

    query_landmarks, query_counts = segment_means(query, num_landmarks, query_mask)  # (b, h, m, d), (b, m)
    key_landmarks, key_counts = segment_means(key, num_landmarks, key_mask)  # (b, g, m, d), (b, m)
    repeated_key_landmarks = key_landmarks.repeat_interleave(h // g, dim=1)  # (b, h, m, d)

    # Grouped heads share their keys, so their landmarks go in as extra queries: keys are never repeated.
    landmarks_by_group = query_landmarks.to(query.dtype).unflatten(1, (g, h // g)).flatten(2, 3)  # (b, g, h/g m, d)
    right_value = _attend(landmarks_by_group, key, value, _never_empty(key_mask), factor)
    right_value = right_value.unflatten(2, (h // g, -1)).flatten(1, 2)  # (b, h, m, v)

    with full_precision(query.device):
        core = _core(query_landmarks, repeated_key_landmarks, query_counts, key_counts, factor)  # (b, h, m, m)
        core_pinv = iterative_pinv(core, num_pinv_iters)
        landmark_value = core_pinv @ right_value.to(core_pinv.dtype)  # (b, h, m, v)

    landmark_mask = None if key_mask is None else _never_empty(key_counts > 0)
    left_key, left_value = repeated_key_landmarks.to(query.dtype), landmark_value.to(query.dtype)
    return _attend(query, left_key, left_value, landmark_mask, factor, dropout_p)


def segment_means(
    tokens: Float[Tensor, "b h n d"], num_landmarks: int, mask: Bool[Tensor, "b n"] | None = None
) -> tuple[Float[Tensor, "b h m d"], Int[Tensor, "b m"]]:
    """Cut each sample's valid tokens into consecutive segments and average each segment.

    With t valid tokens and l = t // m, the first m - t % m segments hold l tokens and the rest l + 1, so any length
    works and padding moves no boundary. Cost O(b h n d).

    Args:
        tokens: queries or keys, one set per head.
        num_landmarks: m, segments per sample (count); no more than n are made.
        mask: True = takes part; a masked token enters no mean.

    Returns:
        The means, in float32 or wider, and the tokens in each segment (count); 0 marks an empty segment, whose mean
        is zero and which comes only from a mask with fewer than m valid tokens.

    Raises:
        ValueError: num_landmarks or n below 1; mask is not bool (b, n).

    Source: Xiong et al. 2021, arXiv:2102.03902, eq 16; uneven segments as in the authors' T2T-ViT code.

    >>> means, counts = segment_means(torch.arange(5.0).view(1, 1, 5, 1), 2)
    >>> means.flatten().tolist(), counts.tolist()
    ([0.5, 3.0], [[2, 3]])
    """
    b, h, n, d = tokens.shape
    if num_landmarks < 1 or n < 1:
        raise ValueError(f"num_landmarks and the length must be at least 1: got {num_landmarks} and {n}")
    m = min(num_landmarks, n)
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    if mask is None:
        length, num_long = n // m, n % m  # not divmod, which torch.compile cannot trace
        num_short = m - num_long
        short, long = tokens.split([num_short * length, num_long * (length + 1)], dim=2)
        parts = [short.unflatten(2, (num_short, length)).mean(3, dtype=dtype)]
        if num_long:
            parts.append(long.unflatten(2, (num_long, length + 1)).mean(3, dtype=dtype))
        counts = torch.full((m,), length, device=tokens.device)
        counts[num_short:] += 1
        return torch.cat(parts, dim=2), counts.expand(b, m)

    check_token_mask("mask", mask, b, n)
    segment = _segment_of_token(mask, m)  # (b, n), m = "none"
    bins = (segment + (m + 1) * torch.arange(b, device=tokens.device)[:, None]).flatten()  # (b n)
    # Token-major rows: (b, n, h d) is how projections lie in memory, so this adds whole rows without a copy.
    rows = tokens.transpose(1, 2).flatten(0, 1).to(dtype)  # (b n, h, d)
    sums = rows.new_zeros(b * (m + 1), h, d).index_add(0, bins, rows).unflatten(0, (b, m + 1))[:, :m]
    counts = torch.zeros_like(bins[:1]).expand(b * (m + 1)).index_add(0, bins, torch.ones_like(bins))
    counts = counts.unflatten(0, (b, m + 1))[:, :m]  # (b, m)
    return (sums / counts.clamp_min(1)[..., None, None]).transpose(1, 2), counts


def iterative_pinv(matrix: Float[Tensor, "*batch p q"], num_iters: int = 6) -> Float[Tensor, "*batch q p"]:
    """Approximate the Moore-Penrose inverse of each matrix by the published iteration.

    ``Z ← ¼ Z (13 I − A Z (15 I − A Z (7 I − A Z)))`` from ``Z₀ = Aᵀ / (‖A‖₁ ‖A‖∞)``, the scale taken per matrix, so
    that no result depends on batch mates. With x = 1 − e an eigenvalue of A Z, a step maps e to (3 e³ + e⁴) / 4: small
    x grow 3.25-fold, so few steps leave small singular values damped, an implicit ridge. Cost 4 matmuls a step.

    Args:
        matrix: any real matrices, rectangular and rank-deficient included; a zero matrix gives zero.
        num_iters: steps (count).

    Returns:
        The inverses, in matrix's dtype; computed in float32 or wider, under autocast too.

    Raises:
        ValueError: num_iters < 1; matrix is not floating-point.

    Source: Xiong et al. 2021, arXiv:2102.03902, eq 14 and Lemma 1; start of Pan & Schreiber 1991.

    >>> iterative_pinv(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), num_iters=6)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.2500]])
    """
    if num_iters < 1:
        raise ValueError(f"num_iters must be at least 1: got {num_iters}")
    if not matrix.is_floating_point():
        raise ValueError(f"matrix must be a floating-point tensor: got {matrix.dtype}; convert it with .float()")
    with full_precision(matrix.device):
        a = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        eye = torch.eye(a.shape[-2], dtype=a.dtype, device=a.device)
        pinv = a.mT
        for axis in (-2, -1):  # one norm after the other: their product can leave the dtype's range
            norm = a.abs().sum(axis).amax(-1)
            pinv = (
                pinv / torch.where(norm > 0, norm, 1.0)[..., None, None]
            )  # no clamp: its gradient at 0 must be finite
        for _ in range(num_iters):
            product = a @ pinv
            pinv = 0.25 * pinv @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
        return pinv.to(matrix.dtype)


def _core(
    query_landmarks: Float[Tensor, "b h p d"],
    key_landmarks: Float[Tensor, "b h q d"],
    query_counts: Int[Tensor, "b p"],
    key_counts: Int[Tensor, "b q"],
    scale: float,
) -> Float[Tensor, "b h p q"]:
    """The core factor A. Rows and columns of empty landmarks are zero, and so they stay in its inverse."""
    logits = scale * query_landmarks @ key_landmarks.mT
    key_exists = (key_counts > 0)[:, None, None, :]
    both_exist = (query_counts > 0)[:, None, :, None] & key_exists
    lowest = torch.finfo(logits.dtype).min  # finite, so that a sample without keys makes no NaN
    return logits.masked_fill(~key_exists, lowest).softmax(-1).masked_fill(~both_exist, 0.0)


def _attend(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h s d"],
    value: Float[Tensor, "b h s v"],
    key_mask: Bool[Tensor, "b s"] | None,
    scale: float,
    dropout_p: float = 0.0,
) -> Float[Tensor, "b h n v"]:
    """Exact attention. Widths are made equal first, as the fused kernels ask: zero columns change no logit."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    d, v = query.shape[-1], value.shape[-1]
    if v > d:
        query, key = F.pad(query, (0, v - d)), F.pad(key, (0, v - d))
    elif v < d:
        value = F.pad(value, (0, d - v))
    return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale)[..., :v]


def _segment_of_token(mask: Bool[Tensor, "b n"], m: int) -> Int[Tensor, "b n"]:
    """The segment of each valid token; m for a masked one."""
    rank = mask.cumsum(-1) - 1  # place among the sample's valid tokens
    num_valid = mask.sum(-1, keepdim=True)
    length = num_valid // m
    num_short = m - num_valid % m
    in_short = num_short * length  # tokens held by the short segments
    long_segment = num_short + (rank - in_short) // (length + 1)
    segment = torch.where(rank < in_short, rank // length.clamp_min(1), long_segment)
    return torch.where(mask, segment, m)


def _never_empty(mask: Bool[Tensor, "b s"] | None) -> Bool[Tensor, "b s"] | None:
    """Let an entirely masked sample see everything: its core inverse is zero, so its output is, without a NaN."""
    return None if mask is None else mask | ~mask.any(-1, keepdim=True)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off: the inverse is ill-conditioned and must not run in half precision."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
