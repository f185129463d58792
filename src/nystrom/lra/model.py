"""The classifier of Long Range Arena, with any attention. The forward path, top to bottom:

token ids -> Encoder (pre-norm, `Attention` in each block) -> mean over the tokens -> two linear layers

The sizes are those of Nyströmformer's authors (two layers, 64 wide, two heads, 128 inside the feed-forward part); the
parameters are as many as theirs, one by one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nystrom.convolution import TokenConvolution
from nystrom.encoder import Block, ClassifierOutput, Encoder, EncoderConfig

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""query, key, value (b, h, n, d) and a mask (b, n) or None, True = takes part, to the attended values (b, h, n, d)."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the model of a task is, whatever its attention."""

    vocab_size: int
    """Token ids run from 0, which is padding, to vocab_size - 1 (count)."""
    max_length: int
    """Learned positions: the longest input (tokens)."""
    num_classes: int
    """Classes (count)."""
    pairs: bool = False
    """Two inputs, encoded one by one by the same encoder, are compared."""
    mean_over_all: bool = False
    """Divide the sum over the valid tokens by max_length, as the authors' code does; else by their number."""
    embed_dim: int = 64
    """c, model width."""
    num_layers: int = 2
    """Blocks (count)."""
    num_heads: int = 2
    """Attention heads per block (count)."""
    ffn_dim: int = 128
    """Width inside the feed-forward parts and the head."""
    dropout: float = 0.1
    """Probability of dropping a hidden unit while training; attention weights are not dropped."""


class Attention(nn.Module):
    """Multi-head self-attention around any `attend`: project, attend, add the convolution skip, project.

    Args:
        embed_dim: c, width of the model.
        num_heads: h (count).
        attend: what is compared; with parameters of its own where it is a module.
        conv_kernel_size: tokens that the depthwise convolution over the values spans; odd, or None for none.
        shared_key: keys are the queries, so that there is one projection less.

    Raises:
        ValueError: an even conv_kernel_size.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, attend: Attend, conv_kernel_size: int | None, shared_key: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = None if shared_key else nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.attend = attend
        self.conv = None if conv_kernel_size is None else TokenConvolution(num_heads, conv_kernel_size)

    def forward(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n c"]:
        query, value = self._heads(self.query(x)), self._heads(self.value(x))
        key = query if self.key is None else self._heads(self.key(x))
        attended = self.attend(query, key, value, mask)
        if self.conv is not None:
            visible = value if mask is None else value.masked_fill(~mask[:, None, :, None], 0.0)
            attended = attended + self.conv(visible)
        return self.out(attended.transpose(1, 2).flatten(2))

    def _heads(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n d"]:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class LraClassifier(nn.Module):
    """Classify a sequence, or a pair of sequences.

    Args:
        sizes: of the model.
        make_attend: called once for each layer, with the layer's number.
        conv_kernel_size: of the convolution skip in every layer; None for none.
        shared_key: see `Attention`.
    """

    def __init__(
        self,
        sizes: Sizes,
        make_attend: Callable[[int], Attend],
        conv_kernel_size: int | None,
        shared_key: bool = False,
    ) -> None:
        super().__init__()
        self.sizes = sizes
        c, width = sizes.embed_dim, sizes.ffn_dim
        names = ("vocab_size", "max_length", "embed_dim", "num_layers", "num_heads", "ffn_dim", "dropout")
        self.encoder = Encoder(EncoderConfig(**{name: getattr(sizes, name) for name in names}, conv_kernel_size=None))
        for number, block in enumerate(cast("list[Block]", self.encoder.blocks)):
            attention: Any = Attention(c, sizes.num_heads, make_attend(number), conv_kernel_size, shared_key)
            block.attention = attention
            block.ffn.insert(2, nn.Dropout(sizes.dropout))  # theirs has one more than ours
        for table in (self.encoder.embeddings.token, self.encoder.embeddings.position):
            nn.init.normal_(table.weight, std=0.02)
        features = 4 * c if sizes.pairs else c
        self.head = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, sizes.num_classes))

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        attn_mask: Bool[Tensor, "b n"] | None = None,
        pair_ids: Int[Tensor, "b p"] | None = None,
        pair_mask: Bool[Tensor, "b p"] | None = None,
        labels: Int[Tensor, " b"] | None = None,
    ) -> ClassifierOutput:
        """Score the classes.

        Args:
            input_ids: token ids.
            attn_mask: True = takes part; None: all do.
            pair_ids: the second inputs, where the sizes say pairs.
            pair_mask: their mask.
            labels: class of each sample.

        Raises:
            ValueError: longer than max_length; pair_ids are missing, or not wanted.
        """
        if self.sizes.pairs != (pair_ids is not None):
            raise ValueError(f"pair_ids must be given where inputs are pairs, and only there: pairs={self.sizes.pairs}")
        pooled = self.pool(input_ids, attn_mask)
        if pair_ids is not None:
            other = self.pool(pair_ids, pair_mask)
            pooled = torch.cat([pooled, other, pooled * other, pooled - other], -1)
        logits = self.head(pooled)
        return ClassifierOutput(None if labels is None else F.cross_entropy(logits, labels), logits)

    def pool(self, input_ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b c"]:
        """One vector for each input: the mean of its valid tokens."""
        x = self.encoder(input_ids, mask)
        total = x.sum(1) if mask is None else x.masked_fill(~mask[..., None], 0.0).sum(1)
        if self.sizes.mean_over_all:
            return total / self.sizes.max_length
        return total / (input_ids.shape[1] if mask is None else mask.sum(1, keepdim=True).clamp_min(1))
