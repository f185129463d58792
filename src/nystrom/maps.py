"""What the attention of `nystrom_attention` looks like: its three factors, and rows of the matrix they make.

For the matrix itself multiply the factors: n x s numbers per head, the size that the method exists to avoid.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nystrom._precision import full_precision
from nystrom._validate import check_attention_inputs, check_indices, check_options
from nystrom.functional import Summary, core, inverse_of, summarise, weights
from nystrom.inverses import Inverse, InverseName
from nystrom.landmarks import Landmarks, LandmarksName


class Factors(NamedTuple):
    """``left @ core_pinv @ right`` is the approximate attention matrix; in float32 or wider."""

    left: Float[Tensor, "b h n p"]
    """Weights of the queries on the landmark keys."""
    core_pinv: Float[Tensor, "b h p m"]
    """The inverse of the landmark queries' weights on the landmark keys."""
    right: Float[Tensor, "b h m s"]
    """Weights of the landmark queries on the keys; zero for masked ones."""


def attention_factors(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g s d"],
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    query_mask: Bool[Tensor, "b n"] | None = None,
    num_landmarks: int = 64,
    num_pinv_iters: int | None = None,
    landmarks: LandmarksName | Landmarks = "segment_means",
    pinv: InverseName | Inverse = "iterative",
) -> Factors:
    """The three factors whose product with the values is `nystrom_attention`, for the same arguments.

    Time O(b h (n + s) m d + b h m³), memory O(b h (n + s) m).

    Args:
        query: as in `nystrom_attention`, and so are all that follow.
        key: with s tokens.
        attn_mask: which keys take part.
        scale: factor on the logits.
        enable_gqa: let each key head serve several query heads.
        query_mask: which queries enter the landmarks.
        num_landmarks: m (count).
        num_pinv_iters: steps of the inverse (count).
        landmarks: how they are made.
        pinv: how the core is inverted.

    Returns:
        left, core_pinv and right. Row i of their product is what query i reads of each key: a row sums to one as far
        as the inverse is exact, and entries can be negative. Where a sample has no valid key the product is zero.

    Raises:
        ValueError: as `nystrom_attention`.

    Source: Xiong et al. 2021, arXiv:2102.03902, eq 13.

    >>> query, key = torch.randn(2, 1, 4, 100, 32).unbind()
    >>> left, core_pinv, right = attention_factors(query, key, num_landmarks=16)
    >>> left.shape, core_pinv.shape, right.shape
    (torch.Size([1, 4, 100, 16]), torch.Size([1, 4, 16, 16]), torch.Size([1, 4, 16, 100]))
    """
    check_attention_inputs(query, key, key, enable_gqa)
    check_options(0.0, False, scale, num_landmarks, num_pinv_iters)
    invert = inverse_of(pinv, num_pinv_iters)
    with full_precision(query.device):
        at = summarise(query, key, attn_mask, query_mask, scale, num_landmarks, landmarks)
        repeated_key = at.key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        key_mask = None if at.key_mask is None else at.key_mask[:, None]
        left = weights(at.query, at.key_landmarks, at.key_exists, at.scale)
        return Factors(left, invert(core(at)), weights(at.query_landmarks, repeated_key, key_mask, at.scale))


def attention_rows(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g s d"],
    indices: Int[Tensor, " r"] | Int[Tensor, "b r"],
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    query_mask: Bool[Tensor, "b n"] | None = None,
    num_landmarks: int = 64,
    num_pinv_iters: int | None = None,
    landmarks: LandmarksName | Landmarks = "segment_means",
    pinv: InverseName | Inverse = "iterative",
) -> Float[Tensor, "b h r s"]:
    """Rows of the approximate attention matrix: what the chosen queries read of every key, in token order.

    Without the matrix: time O(b h (n + s) m d + b h r s m), memory O(b h r s + s m) for r rows, head by head.

    Args:
        query: as in `nystrom_attention`, and so are all that follow indices.
        key: with s tokens.
        indices: positions of the chosen queries, 0 to n - 1: the same for every sample (r,), or each its own (b, r).
        attn_mask: which keys take part.
        scale: factor on the logits.
        enable_gqa: let each key head serve several query heads.
        query_mask: which queries enter the landmarks.
        num_landmarks: m (count).
        num_pinv_iters: steps of the inverse (count).
        landmarks: how they are made.
        pinv: how the core is inverted.

    Returns:
        The rows, in float32 or wider. ``rows @ value`` is `nystrom_attention` at those queries. Masked keys get 0.

    Raises:
        ValueError: as `nystrom_attention`; indices are not integers in [0, n).

    Source: Xiong et al. 2021, arXiv:2102.03902, eq 13.

    >>> query, key = torch.randn(2, 1, 4, 1000, 32).unbind()
    >>> attention_rows(query, key, torch.tensor([0]), num_landmarks=16).shape
    torch.Size([1, 4, 1, 1000])
    """
    check_attention_inputs(query, key, key, enable_gqa)
    check_options(0.0, False, scale, num_landmarks, num_pinv_iters)
    index = check_indices(indices, *query.shape[::2])
    invert = inverse_of(pinv, num_pinv_iters)
    h, g = query.shape[1], key.shape[1]
    with full_precision(query.device):
        at = summarise(query, key, attn_mask, query_mask, scale, num_landmarks, landmarks)
        chosen = at.query.gather(2, index[:, None, :, None].expand(-1, h, -1, query.shape[3]))
        reads = weights(chosen, at.key_landmarks, at.key_exists, at.scale) @ invert(core(at))  # (b, h, r, m)
        return torch.stack([reads[:, i] @ _right_of_head(at, i, i // (h // g)) for i in range(h)], dim=1)


def _right_of_head(at: Summary, head: int, group: int) -> Float[Tensor, "b m s"]:
    return weights(at.query_landmarks[:, head], at.key[:, group], at.key_mask, at.scale)
