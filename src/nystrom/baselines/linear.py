"""Linear attention: the softmax's kernel replaced by a product of features (Katharopoulos et al. 2020)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nystrom._precision import full_precision
from nystrom.baselines.tokens import finish, prepare


def linear_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n v"],
    mask: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """Weights ``φ(q)·φ(k) / Σ φ(q)·φ(k)`` with φ(x) = elu(x) + 1, and no factor 1/√d, as published.

    Time O(b h n d v), memory O(b h n (d + v)).

    Args:
        query: what the n tokens ask, per head.
        key: what they answer to.
        value: what they hold; its width may differ.
        mask: True = takes part.

    Raises:
        ValueError: shapes or dtypes disagree; mask is not bool (b, n).

    Source: Katharopoulos et al. 2020, arXiv:2006.16236, eq 4 to 7. The Nyströmformer authors' LRA code of the same name
    leaves the normaliser out.
    """
    with full_precision(query.device):
        q, k, v, mask = prepare(query, key, value, mask)
        q, k = (x.clamp_max(0.0).exp() + x.relu() for x in (q, k))  # elu(x) + 1 without its cancellation below -17
        return finish(kernel_attention(q, k, v, mask), mask, value.dtype)


def kernel_attention(
    query: Float[Tensor, "b h n m"], key: Float[Tensor, "b h n m"], value: Float[Tensor, "b h n v"], mask: Tensor
) -> Float[Tensor, "b h n v"]:
    """Normalised attention with weights ``query · key`` of positive features; zero where no key takes part."""
    key = key.masked_fill(~mask[:, None, :, None], 0.0)
    total = query @ key.sum(2)[..., None]  # (b, h, n, 1)
    return query @ (key.mT @ value) / torch.where(total > 0, total, 1.0)
