"""A Transformer encoder whose cost grows linearly with the length. The forward path, top to bottom:

token ids -> Embeddings -> Block x num_layers -> MaskedLM or SequenceClassifier
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nystrom._validate import key_padding_mask
from nystrom.attention import Kind, NystromAttention

Activation = Literal["gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The sizes that make an encoder; saved beside its weights."""

    vocab_size: int
    """Token ids run from 0 to vocab_size - 1 (count)."""
    max_length: int = 2048
    """Learned positions: the longest input (tokens)."""
    embed_dim: int = 256
    """c, model width."""
    num_layers: int = 4
    """Blocks (count)."""
    num_heads: int = 4
    """Attention heads per block (count)."""
    ffn_dim: int = 1024
    """Width inside the feed-forward part."""
    dropout: float = 0.1
    """Probability of dropping a hidden unit or an attention weight while training."""
    norm_first: bool = True
    """Pre-norm, with a last norm after the blocks; False: post-norm, with a norm after the embeddings, as in BERT."""
    kind: Kind = "nystrom"
    """Attention: "nystrom", "shift" or "residual" (linear cost), or "softmax" (exact)."""
    num_landmarks: int = 64
    """m, landmarks per head (count)."""
    num_pinv_iters: int = 6
    """Steps of the inverse iteration (count). Unused by "softmax" and "residual"."""
    conv_kernel_size: int | None = 33
    """Tokens spanned by the convolution skip; odd, or None for no skip."""
    attention_dropout: float | None = None
    """Probability of dropping an attention weight while training; None: as dropout."""
    type_vocab_size: int = 0
    """Segments told apart by an embedding of their own (count); 0 for no such embedding."""
    position_offset: int = 0
    """Rows of the position table before that of the first token: 2 in tables made as RoBERTa's (count)."""
    activation: Activation = "gelu"
    """Inside the feed-forward part: "gelu", "gelu_tanh" (its tanh approximation) or "relu"."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in every layer norm."""


class MaskedLMOutput(NamedTuple):
    """What `MaskedLM` returns."""

    loss: Float[Tensor, ""] | None
    """Mean cross-entropy over the labelled tokens (nats), 0 if no token is; None without labels."""
    logits: Tensor
    """(b, n, vocab); with labels only the labelled tokens' rows, in order: (labelled tokens, vocab)."""


class ClassifierOutput(NamedTuple):
    """What `SequenceClassifier` returns."""

    loss: Float[Tensor, ""] | None
    """Mean cross-entropy (nats); None without labels."""
    logits: Float[Tensor, "b classes"]


class MaskedLM(nn.Module):
    """Encoder with a masked-language-modelling head, its output layer tied to the token embeddings."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.encoder_config = config  # not `config`: Trainer writes to that name
        self.encoder = Encoder(config)
        self.transform = nn.Linear(config.embed_dim, config.embed_dim)
        self.activation = activation(config.activation)
        self.norm = nn.LayerNorm(config.embed_dim, config.layer_norm_eps)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.apply(_init_weights)

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        attn_mask: Tensor | None = None,
        labels: Int[Tensor, "b n"] | None = None,
    ) -> MaskedLMOutput:
        """Score every token, or with labels only the labelled ones, which saves most of the output layer's cost.

        Args:
            input_ids: token ids.
            attn_mask: True = real token, (b, n); any key-padding form that `nystrom_attention` accepts.
            labels: the id wanted at each token; -100 where none is.

        Raises:
            ValueError: longer than max_length.
        """
        x = self.encoder(input_ids, attn_mask)
        if labels is not None:
            labelled = labels != -100
            x, labels = x[labelled], labels[labelled]  # (labelled tokens, c)
        x = self.norm(self.activation(self.transform(x)))
        logits = F.linear(x, self.encoder.embeddings.token.weight, self.output_bias)
        if labels is None:
            return MaskedLMOutput(None, logits)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a sum overflows in half
        loss = F.cross_entropy(wide, labels, reduction="sum") / max(len(labels), 1)
        return MaskedLMOutput(loss, logits)


class SequenceClassifier(nn.Module):
    """Encoder with a classification head over one pooled vector.

    Args:
        config: the encoder's sizes.
        num_classes: classes (count).
        pooling: "mean" over the valid tokens, or "first" for the first valid token.
    """

    def __init__(self, config: EncoderConfig, num_classes: int, pooling: Literal["mean", "first"] = "mean") -> None:
        super().__init__()
        if pooling not in ("mean", "first"):
            raise ValueError(f"pooling must be 'mean' or 'first': got {pooling!r}")
        self.encoder_config = config
        self.pooling = pooling
        self.encoder = Encoder(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.embed_dim, num_classes)
        self.apply(_init_weights)

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        attn_mask: Tensor | None = None,
        labels: Int[Tensor, " b"] | None = None,
    ) -> ClassifierOutput:
        """Classify each sample.

        Args:
            input_ids: token ids.
            attn_mask: True = real token, (b, n) or another key-padding form. A sample without one pools to zeros
                ("mean") or to its first token ("first").
            labels: the class of each sample.

        Raises:
            ValueError: longer than max_length.
        """
        b, n = input_ids.shape
        mask = None if attn_mask is None else key_padding_mask(attn_mask, b, n, n)
        x = self.encoder(input_ids, mask)
        if mask is None:
            mask = torch.ones_like(input_ids, dtype=torch.bool)
        logits = self.classifier(self.dropout(self.pool(x, mask)))
        return ClassifierOutput(None if labels is None else F.cross_entropy(logits, labels), logits)

    def pool(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b c"]:
        """One vector for each sample: the mean of its valid tokens, or the first of them."""
        if self.pooling == "mean":
            return x.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        return x[torch.arange(len(x), device=x.device), mask.int().argmax(1)]  # argmax: the first True


class Encoder(nn.Module):
    """Embeddings and blocks: token ids to token states."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        for name in ("vocab_size", "max_length", "num_layers", "ffn_dim"):
            if getattr(config, name) < (0 if name == "num_layers" else 1):
                raise ValueError(f"{name} must be positive: got {getattr(config, name)}")
        for name in ("type_vocab_size", "position_offset", "layer_norm_eps"):
            if getattr(config, name) < 0:
                raise ValueError(f"{name} must not be negative: got {getattr(config, name)}")
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.embed_dim, config.layer_norm_eps) if config.norm_first else nn.Identity()

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        attn_mask: Tensor | None = None,
        token_type_ids: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Encode; attn_mask True = real token. Cost O(b n) for the default attention."""
        x = self.embeddings(input_ids, token_type_ids)
        for block in self.blocks:
            x = block(x, attn_mask)
        return self.norm(x)


class Embeddings(nn.Module):
    """Token plus learned position embeddings, plus those of the segments where there are any."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.position_offset = config.position_offset
        self.token = nn.Embedding(config.vocab_size, config.embed_dim)
        self.position = nn.Embedding(config.position_offset + config.max_length, config.embed_dim)
        self.token_type = None
        if config.type_vocab_size > 0:
            self.token_type = nn.Embedding(config.type_vocab_size, config.embed_dim)
        self.norm = nn.Identity() if config.norm_first else nn.LayerNorm(config.embed_dim, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, input_ids: Int[Tensor, "b n"], token_type_ids: Int[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n c"]:
        return self.of_vectors(self.token(input_ids), token_type_ids)

    def of_vectors(
        self, x: Float[Tensor, "b n c"], token_type_ids: Int[Tensor, "b n"] | None = None, first: int = 0
    ) -> Float[Tensor, "b n c"]:
        """The same from the tokens' vectors in place of their ids; without token_type_ids all are of segment 0.

        The first token stands at place `first`.
        """
        n, max_length = first + x.shape[1], self.position.num_embeddings - self.position_offset
        if n > max_length:
            raise ValueError(
                f"input_ids must be at most max_length tokens long: got {n}, max_length {max_length}; "
                "shorten the input or build the model with a larger max_length"
            )
        if self.token_type is not None:
            x = x + (self.token_type.weight[0] if token_type_ids is None else self.token_type(token_type_ids))
        elif token_type_ids is not None:
            raise ValueError("token_type_ids must be left out: this model has no segments (type_vocab_size 0)")
        return self.dropout(self.norm(x + self.position.weight[self.position_offset :][first:n]))


class Block(nn.Module):
    """Attention and feed-forward, each with a residual connection and a layer norm."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.attention = NystromAttention(
            config.embed_dim,
            config.num_heads,
            kind=config.kind,
            num_landmarks=config.num_landmarks,
            num_pinv_iters=None if config.kind == "residual" else config.num_pinv_iters,
            conv_kernel_size=config.conv_kernel_size,
            dropout=config.dropout if config.attention_dropout is None else config.attention_dropout,
        )
        self.attention_norm = nn.LayerNorm(config.embed_dim, config.layer_norm_eps)
        self.ffn = nn.Sequential(
            nn.Linear(config.embed_dim, config.ffn_dim),
            activation(config.activation),
            nn.Linear(config.ffn_dim, config.embed_dim),
        )
        self.ffn_norm = nn.LayerNorm(config.embed_dim, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "b n c"], attn_mask: Tensor | None = None) -> Float[Tensor, "b n c"]:
        return self.after_attention(x, self.attention(self.before_attention(x), attn_mask))

    def before_attention(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """What the attention reads, token by token."""
        return self.attention_norm(x) if self.norm_first else x

    def after_attention(self, x: Float[Tensor, "b n c"], attended: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The rest of the block, token by token."""
        x = x + self.dropout(attended)
        if self.norm_first:
            return x + self.dropout(self.ffn(self.ffn_norm(x)))
        x = self.attention_norm(x)
        return self.ffn_norm(x + self.dropout(self.ffn(x)))

    def attention_rows(
        self, x: Float[Tensor, "b n c"], indices: Int[Tensor, "..."], attn_mask: Tensor | None = None
    ) -> Float[Tensor, "b h r n"]:
        """What chosen tokens read in the attention of this block (see `NystromAttention.rows`); x as `forward` gets."""
        return self.attention.rows(self.before_attention(x), indices, attn_mask)


def activation(name: Activation) -> nn.Module:
    """The module that a name stands for; ValueError for an unknown one."""
    if name not in get_args(Activation):
        raise ValueError(f"activation must be 'gelu', 'gelu_tanh' or 'relu': got {name!r}")
    return nn.ReLU() if name == "relu" else nn.GELU(approximate="tanh" if name == "gelu_tanh" else "none")


def _init_weights(module: nn.Module) -> None:
    """BERT's initialisation; the convolution keeps torch's own."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
