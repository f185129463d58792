"""Linformer: keys and values projected along the tokens to a fixed number (Wang et al. 2020)."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nystrom._precision import full_precision
from nystrom.baselines.tokens import finish, prepare


class LinformerAttention(nn.Module):
    """``softmax(Q (E K)ᵀ / √d) E V`` with a learned E (k x max_length) for each head, the same for keys and values.

    As in the Nyströmformer authors' LRA code, which also shares E between the layers: give each layer this same module
    for that. Time O(b h n k d), memory O(b h (n + k) d) where torch has a fused kernel; h k max_length parameters.

    Args:
        num_heads: h (count).
        max_length: the longest input (tokens); a shorter one uses the first columns of E.
        num_features: k, projected keys (count).

    Raises:
        ValueError: a count below 1.

    Source: Wang et al. 2020, arXiv:2006.04768, eq 7, with key-value sharing (section 4); E starts with standard
    deviation 0.02.
    """

    def __init__(self, num_heads: int, max_length: int, num_features: int = 256) -> None:
        super().__init__()
        if min(num_heads, max_length, num_features) < 1:
            raise ValueError(
                "num_heads, max_length and num_features must be at least 1: "
                f"got {num_heads}, {max_length} and {num_features}"
            )
        self.projection = nn.Parameter(torch.empty(num_heads, num_features, max_length))
        nn.init.normal_(self.projection, std=0.02)

    def forward(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n v"],
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b h n v"]:
        """Attend. A masked token adds nothing to any projected key; all k of these take part.

        Raises:
            ValueError: n is above max_length; h is not num_heads; shapes or dtypes disagree; mask is not bool (b, n).
        """
        with full_precision(query.device):
            q, k, v, mask = prepare(query, key, value, mask)
            h, n = q.shape[1:3]
            num_heads, _, max_length = self.projection.shape
            if h != num_heads or n > max_length:
                raise ValueError(f"made for {num_heads} heads and up to {max_length} tokens: got {h} heads, {n} tokens")
            projection = self.projection[:, :, :n].to(q.dtype)
            # as one product per head: a matmul would copy the projection for each sample
            projected = torch.einsum("hkn,bhnc->bhkc", projection, torch.cat([k, v], -1))
            k, v = projected.split([k.shape[-1], v.shape[-1]], -1)
            out = F.scaled_dot_product_attention(q, k, v)
            return finish(out, mask, value.dtype)
