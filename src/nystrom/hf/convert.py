"""Pretrained checkpoints for `nystrom convert`: read, made longer, given the convolution."""

import inspect
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from nystrom.hf.configuration import NystromformerConfig
from nystrom.hf.files import PICKLES, SAFE, refused
from nystrom.hf.keys import BASE, to_ours
from nystrom.hf.positions import How, extended
from nystrom.models import check_encoder, num_positions, tile_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nystrom.hf.base import NystromformerPreTrainedModel

PREFIXES = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta.", "camembert": "roberta."}
"""Models that the convolution can be added to, by model_type, and what stands before the names of their encoder."""
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size", "initializer_range", "layer_norm_eps"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
"""Fields that their configs and ours share."""
HEAD = (
    ("lm_head.dense.", "cls.predictions.transform.dense."),
    ("lm_head.layer_norm.", "cls.predictions.transform.LayerNorm."),
    ("lm_head.decoder.", "cls.predictions.decoder."),
    ("lm_head.bias", "cls.predictions.bias"),
)
"""RoBERTa's names of the masked language model's head, and BERT's, which are also Nyströmformer's."""


class Checkpoint(NamedTuple):
    """A model as its folder has it."""

    model: "PreTrainedModel"
    left_out: list[str]
    """Tensors in the file that a model of this class does not have."""


def read(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """The model in eval mode, of the class that config.json names, in the dtype of its weights.

    Raises:
        ValueError: not an encoder whose attention can be exchanged; the weights do not fit config.json.
        OSError: a file of it is missing.
    """
    from safetensors import SafetensorError

    model_class = _class_named(folder, config.get("architectures"))
    safe = any((folder / file).is_file() for file in SAFE)
    options: dict[str, Any] = {"dtype": "auto", "use_safetensors": safe, "trust_remote_code": False}
    try:
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
        missing = sorted(info["missing_keys"])
        if missing and all("pooler." in name for name in missing) and _has_pooler_switch(type(model)):
            model, info = model_class.from_pretrained(
                folder, output_loading_info=True, add_pooling_layer=False, **options
            )
            missing = sorted(info["missing_keys"])
    except UnpicklingError as error:
        raise refused(folder / PICKLES[0], error) from None
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: its weights cannot be read, or do not fit config.json: {error}") from None
    if missing:
        raise ValueError(f"{folder}: weights of {type(model).__name__} are missing: {', '.join(missing)}")
    try:
        check_encoder(model)
    except ValueError as error:
        raise ValueError(
            f"{folder}: {error}. Convert takes encoders, such as BERT, RoBERTa, DistilBERT or MiniLM"
        ) from None
    return Checkpoint(model.eval(), sorted(info["unexpected_keys"]))


def longer(model: "PreTrainedModel", length: int, how: How) -> "PreTrainedModel":
    """A copy of the model that reads `length` tokens.

    Raises:
        ValueError: it has no learnt positions; it reads more than `length` already.
    """
    reach = num_positions(model)
    if reach is not None and length < reach:
        raise ValueError(f"length must be at least the {reach} tokens that the model reads already: got {length}")
    copy = tile_positions(model, length)
    if how == "interpolate" and reach is not None:
        before, after = _positions(model), _positions(copy)
        after.weight.data = extended(before, before.num_embeddings - reach, length, how).weight.detach()
    return copy


def with_convolution(model: "PreTrainedModel", attention: str, kernel: int, **options: Any) -> Any:
    """The same weights in a model of ours, which adds a convolution skip to its attention; its weights are zero, so the
    output is what it is without.

    Args:
        model: BERT, RoBERTa or XLM-RoBERTa, without a head or with that of a masked language model.
        attention: one of `ATTENTIONS`.
        kernel: tokens that the convolution spans (count); odd.
        options: further fields of `NystromformerConfig`.

    Raises:
        ValueError: another model; a size that ours cannot have.
    """
    from nystrom.hf.modeling import NystromformerForMaskedLM, NystromformerModel

    name, config = type(model).__name__, model.config
    with_head = name.endswith("ForMaskedLM")
    if config.model_type not in PREFIXES or not (with_head or model.base_model is model):
        raise ValueError(
            f"the convolution can be added to models of type {', '.join(PREFIXES)}, without a head or with that of a "
            f"masked language model: got {name}; leave --conv-kernel-size out"
        )
    if with_head and not config.tie_word_embeddings:
        raise ValueError(f"{name} does not share its token embeddings with its output layer, as the convolution's does")
    reach = cast(int, num_positions(model))
    own_config = NystromformerConfig(
        **{field: getattr(config, field) for field in SIZES},
        **options,
        attention=cast(Any, attention.removeprefix("nystrom_")),
        conv_kernel_size=kernel,
        max_position_embeddings=reach,
    )
    own: Any = (NystromformerForMaskedLM if with_head else NystromformerModel)(own_config)
    own.to(model.dtype)
    _take_over(own, to_ours(_theirs(model.state_dict(), PREFIXES[config.model_type])), reach)
    return own.eval()


def _theirs(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Under the names of transformers' Nyströmformer, which are BERT's but for the first part."""
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in ((prefix, BASE), *HEAD):
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        if not name.removeprefix(BASE).startswith("pooler."):
            renamed[name] = tensor
    return renamed


def _take_over(model: "NystromformerPreTrainedModel", tensors: dict[str, Tensor], reach: int) -> None:
    """Load all of these; the convolutions, and rows before the first position that were not there, become zero."""
    own = dict(model.named_parameters())
    for name in own:
        if name.endswith(".conv.weight"):
            tensors[name] = torch.zeros_like(own[name])
        elif name.endswith("embeddings.position.weight"):
            rows = tensors[name][-reach:]
            tensors[name] = torch.cat([rows.new_zeros(len(own[name]) - reach, rows.shape[1]), rows])
    assert own.keys() == tensors.keys(), own.keys() ^ tensors.keys()
    model.load_state_dict(tensors, strict=False)  # the output layer is the token embeddings


def _class_named(folder: Path, architectures: list[str] | None) -> Any:
    """The first of these in transformers; AutoModel where there are none."""
    import transformers

    if not architectures:
        return transformers.AutoModel
    found = getattr(transformers, architectures[0], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} has no class {architectures[0]}, and "
            "code from a model's folder is not run"
        )
    return found


def _has_pooler_switch(model_class: type) -> bool:
    return "add_pooling_layer" in inspect.signature(model_class.__init__).parameters


def _positions(model: "PreTrainedModel") -> torch.nn.Embedding:
    return cast(torch.nn.Embedding, model.base_model.get_submodule("embeddings.position_embeddings"))
