"""Checks at the public boundary: every rule about shapes, dtypes and masks, stated once, before any compute."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

MASKED_BELOW = -1e4  # an additive mask value this low is "masked": its weight underflows in every dtype

KEY_PADDING_RULE = "attn_mask must be a key-padding mask of shape (b, s), (b, 1, 1, s) or (1, 1, 1, s)"
ADDITIVE_RULE = (
    f"an additive attn_mask holds only 0 (take part) and values <= {MASKED_BELOW:g} (masked), no bias, no NaN"
)


def check_attention_inputs(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Raise ValueError unless query (b, h, n, d), key (b, g, s, d) and value (b, g, s, v) fit together."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, length, width): got {x.ndim} in shape {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor: got {x.dtype}; convert it with .float()")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must share one dtype: got query {query.dtype}, key {key.dtype}, value {value.dtype}"
        )
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"query, key and value must share the batch size: got {_shapes(query, key, value)}")
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(f"key and value must share heads and length: got {_shapes(query, key, value)}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must share the head width: got {_shapes(query, key, value)}")
    h, g = query.shape[1], key.shape[1]
    if not enable_gqa and h != g:
        raise ValueError(
            f"query, key and value must share the number of heads: got {_shapes(query, key, value)}; "
            f"for grouped key/value heads pass enable_gqa=True"
        )
    if enable_gqa and h > 0 and (g == 0 or h % g != 0):
        raise ValueError(
            f"the query heads must be a multiple of the key heads: got {h} and {g} ({_shapes(query, key, value)})"
        )
    if h == 0 or query.shape[2] == 0 or key.shape[2] == 0 or query.shape[3] == 0:
        raise ValueError(f"heads, length and head width must be at least 1: got {_shapes(query, key, value)}")


def check_options(
    dropout_p: float, is_causal: bool, scale: float | None, num_landmarks: int, num_pinv_iters: int | None
) -> None:
    """Raise ValueError for an option outside its range, or one that landmark attention cannot obey."""
    if is_causal:
        raise ValueError(
            "is_causal must be False: got True. A landmark averages tokens of a whole segment, so a causal form would "
            "read the future; use torch.nn.functional.scaled_dot_product_attention for causal attention"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1): got {dropout_p}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive: got {scale}")
    for name, count in (("num_landmarks", num_landmarks), ("num_pinv_iters", num_pinv_iters)):
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"{name} must be an integer of at least 1: got {count!r}")


def key_padding_mask(attn_mask: Tensor, b: int, n: int, s: int, h: int | None = None) -> Bool[Tensor, "b s"]:
    """`attn_mask` as bool (b, s), True = take part; ValueError if it says anything a key-padding mask cannot say.

    Accepted shapes: (b, s), (b, 1, 1, s), and (b, 1, n, s) or (b, h, n, s) whose rows are all equal; 1 for b. Without
    `h` (count) the number of heads is not checked.
    Accepted dtypes: bool, or floating point holding only 0 (take part) and values <= -1e4 (masked).
    """
    mask = attn_mask[:, None, None, :] if attn_mask.ndim == 2 else attn_mask
    if mask.ndim != 4 or mask.shape[0] not in (1, b) or mask.shape[3] != s or mask.shape[2] not in (1, n):
        raise ValueError(f"{KEY_PADDING_RULE}: {_mask_sizes(attn_mask, b, n, s)}")
    if h is not None and mask.shape[1] not in (1, h):
        raise ValueError(f"{KEY_PADDING_RULE}: {_mask_sizes(attn_mask, b, n, s)}, and {h} heads")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attn_mask must be bool (True = take part) or additive float: got {mask.dtype}; use .bool()")
    for axis, word in ((1, "head"), (2, "query")):
        if mask.shape[axis] != 1 and mask.stride(axis) != 0:  # stride 0 is an expanded view: equal by construction
            same = (mask == mask.narrow(axis, 0, 1)).all()
            if known_false(same, f"{KEY_PADDING_RULE}, and its values vary by {word}"):
                sizes = _mask_sizes(attn_mask, b, n, s)
                raise ValueError(f"{KEY_PADDING_RULE}: {sizes}, and its values vary by {word}")
    mask = mask[:, 0, 0, :]
    if mask.dtype != torch.bool:
        take_part = mask == 0
        if known_false((take_part | (mask <= MASKED_BELOW)).all(), ADDITIVE_RULE):
            other = mask[~take_part & ~(mask <= MASKED_BELOW)]
            raise ValueError(f"{ADDITIVE_RULE}: got {len(other)} other values, the first {other[0].item()}")
        mask = take_part
    return mask.expand(b, s)


def check_landmarks(landmarks: Tensor, counts: Tensor, tokens: Tensor) -> None:
    """Raise ValueError unless landmarks (b, h, m, d) and counts (b, m) or (b, h, m) fit tokens (b, h, n, d)."""
    b, h, _, d = tokens.shape
    m = landmarks.shape[2] if landmarks.ndim == 4 else 0
    if m < 1 or tuple(landmarks.shape) != (b, h, m, d) or tuple(counts.shape) not in ((b, m), (b, h, m)):
        raise ValueError(
            f"landmarks must return landmarks ({b}, {h}, m, {d}) and counts ({b}, m) or ({b}, {h}, m) with m >= 1 for "
            f"tokens {tuple(tokens.shape)}: got {tuple(landmarks.shape)} and {tuple(counts.shape)}"
        )


def check_token_mask(name: str, mask: Tensor, b: int, n: int) -> None:
    """Raise ValueError unless `mask` is bool (b, n)."""
    if mask.dtype != torch.bool or tuple(mask.shape) != (b, n):
        raise ValueError(
            f"{name} must be bool of shape (b, n) = ({b}, {n}), True = takes part: "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )


def check_indices(indices: Tensor, b: int, n: int) -> Int[Tensor, "b r"]:
    """indices as (b, r), counted; ValueError unless they are positions of queries."""
    if indices.is_floating_point() or indices.dtype == torch.bool or indices.ndim not in (1, 2):
        raise ValueError(
            f"indices must be integers of shape (r,) or (b, r): got {indices.dtype} of shape {tuple(indices.shape)}"
        )
    if indices.ndim == 2 and indices.shape[0] != b:
        raise ValueError(f"indices (b, r) must have one row per sample: got {indices.shape[0]} rows for batch {b}")
    outside = (indices < 0) | (indices >= n)
    if known_false(~outside.any(), f"indices must be in [0, {n})"):
        raise ValueError(f"indices must be in [0, {n}): got {indices[outside][0].item()}")
    return indices.long().expand(b, indices.shape[-1])


def known_false(condition: Tensor, rule: str) -> bool:
    """Whether a scalar condition fails; where its value is not known yet, leave a run-time assertion instead."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, rule)  # pyright: ignore[reportPrivateImportUsage]
        return False
    return condition.device.type != "meta" and not condition


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"


def _mask_sizes(attn_mask: Tensor, b: int, n: int, s: int) -> str:
    return f"got shape {tuple(attn_mask.shape)} with batch {b}, query length {n}, key length {s}"
