"""A pretrained encoder with a classification head, its tokenizer, and the attention of one's choice."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from nystrom.hf.files import check_tokenizer, find
from nystrom.hf.settings import EXACT_BELOW, configure, settings_of
from nystrom.models import check_encoder, num_positions
from nystrom.presets import Attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OWN = {"softmax": "exact", "nystrom": "nystrom", "nystrom_shift": "shift", "nystrom_residual": "residual"}
"""What our Nyströmformer's config calls them."""


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder, or of a name on the Hugging Face Hub.

    Raises:
        OSError: there is no such folder or name, or no tokenizer in it.
        ValueError: it cannot pad.
    """
    folder = find(name, allow_pickle=True)
    check_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{name}: this tokenizer has no padding token, which inputs of unequal length need")
    return tokenizer


def load_classifier(
    name: str, labels: tuple[str, ...], length: int, attention: Attention | None, settings: dict[str, Any]
) -> "PreTrainedModel":
    """The encoder with a head; a new one, unless the folder has one of as many classes.

    Args:
        name: folder, or name on the Hugging Face Hub.
        labels: names of the classes; none: one number is predicted, by its squared error.
        length: tokens that it is to read (count).
        attention: None: what its folder says.
        settings: fields of `Settings`, by name; those of the folder stay where none are given.

    Raises:
        OSError: there is no such model.
        ValueError: not an encoder; it does not take this attention, one of the settings, or the length.
    """
    folder = find(name, allow_pickle=True)  # transformers reads nothing but tensors from one
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'}: no such file; is {name} a Hugging Face model's folder?")
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if labels:
        names = dict(enumerate(labels))
        head = {"id2label": names, "label2id": {label: i for i, label in names.items()}}
        head["problem_type"] = "single_label_classification"
    own = AutoConfig.from_pretrained(folder).model_type == "nystrom"
    if own:
        for field in settings.keys() - {"num_landmarks"}:
            raise ValueError(f"{field} is no setting of a Nyströmformer of ours: got {settings[field]}; leave it out")
        head |= settings | ({} if attention is None else {"attention": OWN[attention]})
    model = _load(name, folder, head)
    if not own:
        check_encoder(model)
        configure(model, cast(Any, "sdpa" if attention == "softmax" else attention), **settings)
    reach = model.config.max_position_embeddings if own else num_positions(model)
    if reach is not None and length > reach:
        longer = f"pretrain --init {name}" if own else f"convert {name} OUT"
        raise ValueError(
            f"length must be at most the {reach} tokens that {name} reads: got {length}; shorten it, or first make the "
            f"model longer: nystrom {longer} --length {length}"
        )
    return model


def _load(name: str, folder: Path, head: dict[str, Any]) -> "PreTrainedModel":
    """In float32, and without transformers' report of the head's weights, which may be new; but no others may be."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32, **head
        )
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{name}: its weights cannot be read, or do not fit config.json: {error}") from None
    finally:
        logging.set_verbosity(before)
    encoder = f"{model.base_model_prefix}."
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    missing = sorted(key for key in new if key.startswith(encoder) and "pooler." not in key)
    if missing:
        raise ValueError(
            f"{name}: weights of the encoder are missing, or of another size than config.json says: "
            f"{', '.join(missing[:3])}; is it an encoder?"
        )
    return model


def attention_of(model: "PreTrainedModel") -> Attention:
    """Which one it runs."""
    if model.config.model_type == "nystrom":
        return next(cast(Attention, name) for name, ours in OWN.items() if ours == model.config.attention)
    name = model.config._attn_implementation
    return cast(Attention, name) if name in OWN else "softmax"


def exact_below(model: "PreTrainedModel") -> int:
    """Inputs of fewer tokens get exact attention in every layer; 0 where none do, and for softmax."""
    kind = model.config._attn_implementation
    if model.config.model_type == "nystrom" or kind not in EXACT_BELOW:
        return 0
    layers = (settings_of(model.config, layer).exact_below for layer in range(model.config.num_hidden_layers))
    return min(EXACT_BELOW[kind] if least is None else least for least in layers)
