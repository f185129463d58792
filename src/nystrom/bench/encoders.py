"""Whole encoders that are measured: the same sizes throughout, only the attention differs."""

from dataclasses import replace
from importlib.util import find_spec

from jaxtyping import Float, Int
from torch import Tensor, nn

from nystrom.bench.methods import PINV_ITERS
from nystrom.encoder import Encoder, EncoderConfig

VOCAB = 1000
CONV = 33
"""Tokens that the convolution skip spans in every Nyström encoder."""


def encoders(n: int, num_layers: int, h: int, d: int, num_landmarks: int) -> dict[str, nn.Module]:
    """Every encoder that can run here, from ids (b, n) to states (b, n, h d), in eval mode, ours first.

    Post-norm, GELU, four times the width inside, as BERT. `exact` is ours with exact attention, and without the
    convolution, which only the Nyström forms need; `lucidrains` is ours with that package's attention module in every
    block, its own projections and convolution included.
    """
    config = EncoderConfig(
        vocab_size=VOCAB,
        max_length=n,
        embed_dim=h * d,
        num_layers=num_layers,
        num_heads=h,
        ffn_dim=4 * h * d,
        norm_first=False,
        num_landmarks=num_landmarks,
        num_pinv_iters=PINV_ITERS,
        conv_kernel_size=CONV,
    )
    exact = replace(config, kind="softmax", conv_kernel_size=None)
    models: dict[str, nn.Module] = {"nystrom": Encoder(config), "exact": Encoder(exact)}
    whole_segments = n % num_landmarks == 0  # see methods.methods
    if find_spec("transformers") and whole_segments and n > num_landmarks:
        models["hf"] = HuggingFaceEncoder(config)
    if find_spec("nystrom_attention") and whole_segments:
        models["lucidrains"] = with_lucidrains(config)
    return {name: model.eval() for name, model in models.items()}


class HuggingFaceEncoder(nn.Module):
    """transformers' NystromformerModel, told the length it will see: at its default it runs exact attention."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        from transformers import NystromformerConfig, NystromformerModel

        same_sizes = NystromformerConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.embed_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.ffn_dim,
            hidden_act="gelu",
            max_position_embeddings=config.max_length,
            segment_means_seq_len=config.max_length,
            num_landmarks=config.num_landmarks,
            conv_kernel_size=CONV,
        )
        self.model = NystromformerModel(same_sizes)

    def forward(self, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
        return self.model(input_ids=input_ids).last_hidden_state


def with_lucidrains(config: EncoderConfig) -> Encoder:
    """Our encoder with the attention module of the PyPI package nystrom-attention."""
    from nystrom_attention import NystromAttention

    encoder = Encoder(config)
    for block in encoder.blocks:
        block.attention = NystromAttention(
            config.embed_dim,
            dim_head=config.embed_dim // config.num_heads,
            heads=config.num_heads,
            num_landmarks=config.num_landmarks,
            pinv_iterations=config.num_pinv_iters,
            residual_conv_kernel=CONV,
        )
    return encoder
