"""What an approximation of attention does to given queries, keys and values: errors, row sums, spectra.

Masks are bool (b, n), True = takes part, for self-attention: they select queries and keys alike, and nothing else
enters a number. Whatever takes a matrix is for analysis only: n x n numbers per head are what the approximations avoid.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def exact_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g n d"],
    value: Float[Tensor, "b g n v"],
    mask: Bool[Tensor, "b n"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h n v"]:
    """Softmax attention by torch's own kernel: what the errors below are measured against.

    Args:
        query: as in `nystrom_attention`, and so are key and value; key heads may be shared.
        key: one set per group of heads.
        value: its width may differ from key's.
        mask: which keys take part.
        scale: factor on the logits; default 1 / √d.

    Returns:
        The attended values; those of a masked query are computed too, and mean nothing.

    >>> query, key, value = torch.randn(3, 1, 2, 5, 4).unbind()
    >>> exact_attention(query, key, value).shape
    torch.Size([1, 2, 5, 4])
    """
    key_mask = None if mask is None else mask[:, None, None, :]
    shared = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, key_mask, scale=scale, enable_gqa=shared)


def softmax_matrix(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g n d"],
    mask: Bool[Tensor, "b n"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h n n"]:
    """The exact attention matrix, in float32 or wider; rows and columns of masked tokens are zero.

    >>> matrix = softmax_matrix(*torch.randn(2, 1, 2, 5, 4).unbind())
    >>> torch.allclose(matrix.sum(-1), torch.ones(1, 2, 5))
    True
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = (query.shape[-1] ** -0.5 if scale is None else scale) * query.to(wide) @ key.to(wide).mT
    if mask is None:
        return logits.softmax(-1)
    weights = logits.masked_fill(~mask[:, None, None, :], torch.finfo(wide).min).softmax(-1)
    return weights * both(mask)


def attention_matrix(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g n d"],
) -> Float[Tensor, "b h n n"]:
    """The matrix that a method implies, whatever it does inside: what it makes of the identity as value.

    Args:
        attend: query, key and value to the output, linear in the value; it closes over its mask and options.
        query: what the tokens ask.
        key: what they answer to.

    Returns:
        Row i is what query i reads of each token; a masked token's row means nothing.

    >>> query, key = torch.randn(2, 1, 2, 5, 4).unbind()
    >>> torch.allclose(attention_matrix(exact_attention, query, key), softmax_matrix(query, key), atol=1e-6)
    True
    """
    b, g, n, _ = key.shape
    return attend(query, key, torch.eye(n, dtype=key.dtype, device=key.device).expand(b, g, n, n))


def squares(x: Float[Tensor, "b h n v"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b h"]:
    """The sum of squares of the valid tokens' rows, per sample and head, in float64: add these over samples.

    >>> squares(torch.ones(1, 1, 3, 2), torch.tensor([[True, True, False]])).item()
    4.0
    """
    per_token = x.square().sum(-1, dtype=torch.float64)  # (b, h, n)
    return (per_token if mask is None else per_token.masked_fill(~mask[:, None], 0.0)).sum(-1)


def output_error(
    approx: Float[Tensor, "b h n v"], exact: Float[Tensor, "b h n v"], mask: Bool[Tensor, "b n"] | None = None
) -> Float[Tensor, " h"]:
    """‖approx - exact‖ / ‖exact‖ of each head, Frobenius norms over all samples and valid tokens.

    >>> output_error(torch.full((2, 1, 3, 4), 1.5), torch.ones(2, 1, 3, 4)).item()
    0.5
    """
    return (squares(approx - exact, mask).sum(0) / squares(exact, mask).sum(0)).sqrt()


def layer_error(
    approx: Float[Tensor, "b h n v"], exact: Float[Tensor, "b h n v"], mask: Bool[Tensor, "b n"] | None = None
) -> float:
    """`output_error` of all heads together: norms over samples, heads and valid tokens.

    >>> layer_error(torch.full((2, 1, 3, 4), 1.5), torch.ones(2, 1, 3, 4))
    0.5
    """
    return (squares(approx - exact, mask).sum() / squares(exact, mask).sum()).sqrt().item()


def matrix_error(
    approx: Float[Tensor, "b h n n"], exact: Float[Tensor, "b h n n"], mask: Bool[Tensor, "b n"] | None = None
) -> Float[Tensor, " h"]:
    """`output_error` of attention matrices: only entries of two valid tokens count.

    >>> matrix_error(torch.zeros(1, 1, 3, 3), torch.eye(3)[None, None]).item()
    1.0
    """
    if mask is not None:
        approx, exact = (x.masked_fill(~both(mask), 0.0) for x in (approx, exact))
    return output_error(approx, exact, mask)


def row_sum_error(matrix: Float[Tensor, "b h n n"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, " h"]:
    """How far rows are from weights that add up to one: mean |row sum - 1| of each head over the valid tokens.

    >>> row_sum_error(torch.full((1, 1, 4, 4), 0.375)).item()
    0.5
    """
    if mask is not None:
        matrix = matrix.masked_fill(~both(mask), 0.0)
    return _mean_over_tokens((matrix.sum(-1) - 1).abs(), mask)


def singular_values(
    matrix: Float[Tensor, "b h n n"], mask: Bool[Tensor, "b n"] | None = None
) -> Float[Tensor, "b h n"]:
    """Singular values of attention matrices, largest first; a masked token adds a zero at the end. Cost O(b h n³).

    >>> singular_values(torch.eye(3)[None, None]).tolist()
    [[[1.0, 1.0, 1.0]]]
    """
    return torch.linalg.svdvals(matrix if mask is None else matrix.masked_fill(~both(mask), 0.0))


def diagonal_weight(matrix: Float[Tensor, "b h n n"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, " h"]:
    """How much a token reads of itself: the mean s_ii of each head over the valid tokens.

    >>> diagonal_weight(torch.full((1, 1, 4, 4), 0.25)).item()
    0.25
    """
    return _mean_over_tokens(matrix.diagonal(dim1=-2, dim2=-1), mask)


def both(mask: Bool[Tensor, "b n"]) -> Bool[Tensor, "b 1 n n"]:
    """Where query and key are both valid."""
    return (mask[:, :, None] & mask[:, None, :])[:, None]


def _mean_over_tokens(x: Float[Tensor, "b h n"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, " h"]:
    if mask is None:
        return x.mean((0, 2))
    return x.masked_fill(~mask[:, None], 0.0).sum((0, 2)) / mask.sum()
