"""Skyformer: a Gaussian kernel in place of the softmax, approximated from random landmarks (Chen et al. 2021)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nystrom._precision import full_precision
from nystrom.baselines.draws import fresh, stream
from nystrom.baselines.tokens import finish, prepare
from nystrom.inverses import iterative_pinv


class SkyformerAttention(nn.Module):
    """``κ(Q, W) (κ(W, W) + γ I)⁻¹ κ(W, K) V`` with κ(x, y) = exp(−|x − y|² / (2 √d)) and m landmarks W.

    The landmarks are queries and keys chosen at random, the same places in all heads: with both, the approximated
    kernel of all queries and keys is positive semi-definite. Rows are not normalised. The inverse is
    `iterative_pinv` of D^-½ (κ(W, W) + γ I) D^-½, D the row sums. Time O(b h (n m d + m³)), memory O(b h (n m + m²)).

    Args:
        num_landmarks: m (count). Where queries and keys together are fewer, all of them are landmarks.
        ridge: γ; the approximation of κ(Q, K) from all landmarks is off by about as much.
        num_pinv_iters: steps of the inverse (count).
        seed: of the choice in evaluation. In training it is new in each call, from torch's global generator.

    Raises:
        ValueError: a count below 1; ridge <= 0.

    Source: Chen et al. 2021, arXiv:2111.00035, eq 3 to 6 and section 4.4; γ and the steps are those of the authors'
    code. Landmarks without repetition are ours, and so is the start of the inverse.
    """

    def __init__(self, num_landmarks: int = 128, *, ridge: float = 0.1, num_pinv_iters: int = 6, seed: int = 0) -> None:
        super().__init__()
        if min(num_landmarks, num_pinv_iters) < 1 or not ridge > 0:
            raise ValueError(
                "num_landmarks and num_pinv_iters must be at least 1 and ridge positive: "
                f"got {num_landmarks}, {num_pinv_iters} and {ridge}"
            )
        self.num_landmarks = num_landmarks
        self.ridge = ridge
        self.num_pinv_iters = num_pinv_iters
        self.seed = seed

    def forward(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n v"],
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b h n v"]:
        """Attend.

        Raises:
            ValueError: shapes or dtypes disagree; mask is not bool (b, n).
        """
        with full_precision(query.device):
            q, k, v, mask = prepare(query, key, value, mask)
            h, n, d = q.shape[1:]
            tokens = torch.cat([q, k], 2) * d**-0.25
            chosen, exists = choose(mask, self.num_landmarks, fresh(self.seed, self.training))
            landmarks = tokens.gather(2, chosen[:, None, :, None].expand(-1, h, -1, d))
            absent = ~exists[:, None, None]
            factor = gaussian(tokens, landmarks).masked_fill(absent, 0.0)  # (b, h, 2n, m)
            core = gaussian(landmarks, landmarks).masked_fill(absent | absent.mT, 0.0)
            core = core + self.ridge * torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
            half = core.sum(-1).rsqrt()  # D^-½
            inverse = iterative_pinv(half[..., None] * core * half[..., None, :], self.num_pinv_iters)
            read = factor[:, :, n:].mT @ v  # landmarks read the tokens
            read = half[..., None] * (inverse @ (half[..., None] * read))
            return finish(factor[:, :, :n] @ read, mask, value.dtype)


def gaussian(x: Float[Tensor, "b h n d"], y: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
    """exp(−|x − y|² / 2), without an array of differences."""
    norms = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
    return (x @ y.mT - 0.5 * norms).exp()


def choose(mask: Bool[Tensor, "b n"], num_landmarks: int, seed: int) -> tuple[Int[Tensor, "b m"], Bool[Tensor, "b m"]]:
    """Places, among n queries and then n keys, of landmarks drawn without repetition, and which of them exist.

    The valid tokens' i-th query and key have the same chance in every sample: padding moves nothing.
    """
    n = mask.shape[1]
    lots = stream(torch.rand, n, (2,), seed).to(mask.device)[(mask.cumsum(-1) - 1).clamp_min(0)]  # (b, n, 2)
    lots = lots.masked_fill(~mask[..., None], 2.0).mT.flatten(1)  # (b, 2n)
    lots, chosen = lots.sort(dim=-1, stable=True)
    return chosen[:, :num_landmarks], lots[:, :num_landmarks] < 2.0
