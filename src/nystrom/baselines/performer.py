"""Performer: attention by random features, for the softmax and the ReLU kernel (Choromanski et al. 2020)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nystrom._precision import full_precision
from nystrom.baselines.linear import kernel_attention
from nystrom.baselines.tokens import finish, prepare


def orthogonal_features(num_features: int, head_dim: int, generator: torch.Generator) -> Float[Tensor, "m d"]:
    """Directions drawn d at a time, orthogonal to one another, each with the length of a Gaussian vector.

    Source: Choromanski et al. 2020, arXiv:2009.14794, section 2.4.
    """
    blocks = []
    for _ in range(-(-num_features // head_dim)):
        gaussian = torch.randn(head_dim, head_dim, dtype=torch.float64, generator=generator)
        basis, triangle = torch.linalg.qr(gaussian)
        blocks.append((basis * triangle.diagonal().sign()).mT)  # with these signs uniform over all rotations
    lengths = torch.randn(num_features, head_dim, dtype=torch.float64, generator=generator).norm(dim=1, keepdim=True)
    return (lengths * torch.cat(blocks)[:num_features]).float()


class PerformerAttention(nn.Module):
    """FAVOR+: softmax attention estimated without bias in kernel and normaliser, with positive features.

    φ(x) = exp(ω·x − |x|²/2) for m random ω, x = q or k over d^¼. Computed by two softmaxes, over tokens for each
    feature and over features for each query, which is the same without the overflow and without the ε that public
    codes add to every feature. Time O(b h n m d), memory O(b h n m).

    Args:
        head_dim: d.
        num_features: m (count).
        seed: of the features, which all heads share. Give each layer another one.

    Raises:
        ValueError: a count below 1.

    Source: Choromanski et al. 2020, arXiv:2009.14794, Lemma 1 and section 2.4; the two softmaxes are ours.
    """

    features: Tensor

    def __init__(self, head_dim: int, num_features: int = 256, *, seed: int = 0) -> None:
        super().__init__()
        _check(head_dim, num_features)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("features", orthogonal_features(num_features, head_dim, generator))

    def redraw(self, generator: torch.Generator) -> None:
        """Replace the features, in place, by others of `generator` (on the CPU), as the paper does while training."""
        num_features, head_dim = self.features.shape
        self.features.copy_(orthogonal_features(num_features, head_dim, generator))

    def forward(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n v"],
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b h n v"]:
        """Attend.

        Raises:
            ValueError: d is not head_dim; shapes or dtypes disagree; mask is not bool (b, n).
        """
        with full_precision(query.device):
            q, k, v, mask = prepare(query, key, value, mask)
            q, k, features = _scaled(q, k, self.features)
            ask = q @ features.mT  # (b, h, n, m); |q|²/2 would cancel
            answer = k @ features.mT - 0.5 * k.square().sum(-1, keepdim=True)
            lowest = torch.finfo(answer.dtype).min  # finite, so that a sample without tokens makes no NaN
            answer = answer.masked_fill(~mask[:, None, :, None], lowest)
            read = answer.softmax(2).mT @ v  # features read the tokens
            total = answer.logsumexp(2, keepdim=True)  # (b, h, 1, m)
            return finish((ask + total).softmax(-1) @ read, mask, value.dtype)  # and tokens the features


class PerformerReLUAttention(nn.Module):
    """Performer's other kernel: φ(x) = max(ω·x, 0) + 0.001 for m random ω, x = q or k over d^¼; normalised.

    The Nyströmformer authors' LRA settings name it, but as they call performer-pytorch they get the softmax kernel of
    `PerformerAttention`, with logits q·k / d. Time O(b h n m d), memory O(b h n m).

    Args:
        head_dim: d.
        num_features: m (count).
        seed: of the features, which all heads share. Give each layer another one.

    Raises:
        ValueError: a count below 1.

    Source: Choromanski et al. 2020, arXiv:2009.14794, section 2.2 ("generalized attention") and the authors' code.
    """

    features: Tensor

    def __init__(self, head_dim: int, num_features: int = 256, *, seed: int = 0) -> None:
        super().__init__()
        _check(head_dim, num_features)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("features", orthogonal_features(num_features, head_dim, generator))

    def redraw(self, generator: torch.Generator) -> None:
        """Replace the features, in place, by others of `generator` (on the CPU), as the paper does while training."""
        num_features, head_dim = self.features.shape
        self.features.copy_(orthogonal_features(num_features, head_dim, generator))

    def forward(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n v"],
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b h n v"]:
        """Attend.

        Raises:
            ValueError: d is not head_dim; shapes or dtypes disagree; mask is not bool (b, n).
        """
        with full_precision(query.device):
            q, k, v, mask = prepare(query, key, value, mask)
            q, k, features = _scaled(q, k, self.features)
            q, k = ((x @ features.mT).relu() + 1e-3 for x in (q, k))
            return finish(kernel_attention(q, k, v, mask), mask, value.dtype)


def _check(head_dim: int, num_features: int) -> None:
    if min(head_dim, num_features) < 1:
        raise ValueError(f"head_dim and num_features must be at least 1: got {head_dim} and {num_features}")


def _scaled(query: Tensor, key: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key over d^¼, so that their product has the factor 1/√d, and the features in their dtype."""
    d = features.shape[1]
    if query.shape[3] != d:
        raise ValueError(f"made for heads of width {d}: got {query.shape[3]}")
    return query * d**-0.25, key * d**-0.25, features.to(query.dtype)
