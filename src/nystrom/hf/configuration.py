"""The sizes of our Nyströmformer under the names that transformers gives them."""

from typing import Any, Literal, get_args, no_type_check

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from nystrom.attention import Kind
from nystrom.encoder import Activation, EncoderConfig

Attention = Literal["nystrom", "exact", "shift", "residual"]
KINDS: dict[str, Kind] = {"nystrom": "nystrom", "exact": "softmax", "shift": "shift", "residual": "residual"}
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",  # transformers has three names for this one
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
POSITION_OFFSET = 2  # transformers' table of positions has two rows, never read, before the first token's


@no_type_check  # strict has checked by then, and the hook of our tests knows no dataclass that takes further fields
@strict
class NystromformerConfig(PreTrainedConfig):
    """Sizes and options of a Nyströmformer, saved as config.json; model_type "nystrom".

    Raises:
        ValueError: an unknown attention or hidden_act; an option that this attention cannot obey.
    """

    model_type = "nystrom"

    attention: str = "nystrom"
    """"nystrom", "shift" or "residual" (see `NystromAttention`), of linear cost, or "exact"; same weights."""
    num_pinv_iters: int | None = None
    """Steps of the inverse iteration (count); None: 6. Only "nystrom" and "shift" take any."""
    attention_queries: list[int] | None = None
    """Tokens whose attention rows output_attentions returns; None: the first real one of each sample."""
    num_landmarks: int = 64
    """m, landmarks per head (count). Unused by "exact"."""
    conv_kernel_size: int | None = 65
    """Tokens spanned by the convolution skip; odd, or None for no skip."""
    vocab_size: int = 30000
    """Token ids run from 0 to vocab_size - 1 (count)."""
    hidden_size: int = 768
    """c, model width."""
    num_hidden_layers: int = 12
    """Blocks (count)."""
    num_attention_heads: int = 12
    """Heads per block (count)."""
    intermediate_size: int = 3072
    """Width inside the feed-forward part."""
    hidden_act: str = "gelu_new"
    """One of `ACTIVATIONS`."""
    hidden_dropout_prob: float | int = 0.1
    """Probability of dropping a hidden unit while training."""
    attention_probs_dropout_prob: float | int = 0.1
    """Probability of dropping an attention weight while training."""
    max_position_embeddings: int = 512
    """The longest input (tokens)."""
    type_vocab_size: int = 2
    """Segments told apart (count)."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in every layer norm."""
    norm_first: bool = False
    """Pre-norm, with a last norm after the blocks; False: post-norm, as in BERT and the published model."""
    sentence_order: bool = True
    """Whether `NystromformerForPreTraining` has the head that tells the order of two sentences."""
    initializer_range: float = 0.02
    """Standard deviation of new weights."""
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True
    """Whether the masked language model's output layer is its token embeddings."""

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("is_decoder", "add_cross_attention"):
            if kwargs.get(name):
                raise ValueError(f"{name} must be False: a Nyströmformer is an encoder, its landmarks read every token")
        super().__post_init__(**kwargs)
        self.to_encoder()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers': the config, and with return_unused_kwargs what was not used.

        Raises:
            ValueError: the fields are of transformers' own Nyströmformer.
        """
        if config_dict.get("model_type") == "nystromformer":
            raise ValueError(
                "model_type must be 'nystrom': got 'nystromformer', transformers' own model, whose tensors have other "
                "names; from_transformers reads its folders"
            )
        return super().from_dict(config_dict, **kwargs)

    def to_encoder(self) -> EncoderConfig:
        """The same sizes for `nystrom.Encoder`.

        Raises:
            ValueError: as the class.
        """
        if self.attention not in KINDS:
            raise ValueError(f"attention must be one of {', '.join(get_args(Attention))}: got {self.attention!r}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}: got {self.hidden_act!r}")
        if self.num_pinv_iters is not None and self.attention not in ("nystrom", "shift"):
            raise ValueError(
                f"num_pinv_iters must be None for attention {self.attention!r}, which inverts nothing: "
                f"got {self.num_pinv_iters}"
            )
        if self.chunk_size_feed_forward != 0:
            raise ValueError(f"chunk_size_feed_forward must be 0, no chunks: got {self.chunk_size_feed_forward}")
        return EncoderConfig(
            vocab_size=self.vocab_size,
            max_length=self.max_position_embeddings,
            embed_dim=self.hidden_size,
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            ffn_dim=self.intermediate_size,
            dropout=float(self.hidden_dropout_prob),
            norm_first=self.norm_first,
            kind=KINDS[self.attention],
            num_landmarks=self.num_landmarks,
            num_pinv_iters=6 if self.num_pinv_iters is None else self.num_pinv_iters,
            conv_kernel_size=self.conv_kernel_size,
            attention_dropout=float(self.attention_probs_dropout_prob),
            type_vocab_size=self.type_vocab_size,
            position_offset=POSITION_OFFSET,
            activation=ACTIVATIONS[self.hidden_act],
            layer_norm_eps=self.layer_norm_eps,
        )
