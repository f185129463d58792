"""A pretrained model as the one that `nystrom pretrain` trains."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.utils import logging

from nystrom.hf import convert
from nystrom.hf.base import NystromformerModel
from nystrom.hf.classifier import OWN
from nystrom.hf.configuration import NystromformerConfig
from nystrom.hf.files import SAFE
from nystrom.hf.keys import BASE
from nystrom.hf.modeling import NystromformerForMaskedLM
from nystrom.hf.pretraining import NystromformerForPreTraining
from nystrom.hf.settings import ATTENTIONS, settings_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADS = ("transform.", "norm.", "decoder.", "pooler.", "sentence_order.")


def start_from(
    folder: Path, kernel: int | None, attention: str | None = None, **changes: Any
) -> tuple[NystromformerForPreTraining, list[str]]:
    """The model in float32, and the names of its weights that the folder does not have, which are untrained.

    Args:
        folder: of a Nyströmformer, ours or transformers', or of BERT, RoBERTa, XLM-RoBERTa or CamemBERT, converted by
            `nystrom convert` or not. Of heads other than a masked language model's only the encoder is kept.
        kernel: tokens spanned by the convolution that BERT and RoBERTa get (count), its weights zero; None for none.
        attention: "softmax" or one of `ATTENTIONS`; None: what the folder says, or else "nystrom".
        changes: fields of `NystromformerConfig` that no weight depends on, such as num_landmarks and dropout.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is another model's folder, or its weights do not fit.
    """
    kind, name = _check(folder)
    if attention is not None:
        changes["attention"] = OWN[attention]
    if kind == "nystrom":
        return _own(folder, changes)
    if kind in convert.PREFIXES:
        source = _bert(folder, name, kernel, changes)
    elif name.endswith("ForMaskedLM"):
        source = NystromformerForMaskedLM.from_transformers(folder, changes.get("attention", "nystrom"))
    else:
        source = NystromformerModel.from_transformers(folder, changes.get("attention", "nystrom"), new_head=True)
    config = _changed(cast(NystromformerConfig, source.config), changes)
    model = NystromformerForPreTraining(config)
    prefix = BASE if isinstance(source, NystromformerModel) else ""
    tensors = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    own = [name for name, _ in model.named_parameters()]  # the output layer, which is the token embeddings, once
    model.load_state_dict({name: tensors[name] for name in own if name in tensors}, strict=False)
    return model, [name for name in own if name not in tensors]


def _check(folder: Path) -> tuple[str, str]:
    """The model's type and class."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; is {folder} a model's folder?")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    kinds = ("nystrom", "nystromformer", *convert.PREFIXES)
    if not isinstance(fields, dict) or fields.get("model_type") not in kinds:
        found = fields.get("model_type") if isinstance(fields, dict) else fields
        raise ValueError(f"{path}: model_type must be one of {', '.join(kinds)}: got {found!r}")
    if not any((folder / file).is_file() for file in SAFE):
        raise FileNotFoundError(f"{folder / SAFE[0]}: no such file; pickled weights are not read here")
    return fields["model_type"], (fields.get("architectures") or ["?"])[0]


def _own(folder: Path, changes: dict[str, Any]) -> tuple[NystromformerForPreTraining, list[str]]:
    from safetensors import SafetensorError

    config = _changed(NystromformerConfig.from_pretrained(folder), changes)
    loading: Any = NystromformerForPreTraining.from_pretrained
    try:
        with _no_report():
            model, info = loading(folder, config=config, dtype=torch.float32, output_loading_info=True)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: its weights cannot be read, or do not fit config.json: {error}") from None
    missing = sorted(info["missing_keys"])
    if lost := [name for name in missing if not name.startswith(HEADS)]:
        raise ValueError(f"{folder}: weights of the encoder are missing: {', '.join(lost)}")
    return model, missing


def _bert(folder: Path, name: str, kernel: int | None, changes: dict[str, Any]) -> "PreTrainedModel":
    """BERT or RoBERTa as one of ours; `changes` gets what its folder says of attention and is not in there."""
    wanted = re.sub("ForPreTraining$", "ForMaskedLM", name)
    if not wanted.endswith("ForMaskedLM"):  # the encoder alone
        wanted = re.sub("For[A-Z].*$", "Model", name)
    with _no_report():
        model = convert.read(folder, {"architectures": None if wanted == "?" else [wanted]}).model
    found = model.config._attn_implementation
    changes.setdefault("attention", OWN[found if found in ATTENTIONS else "nystrom"])
    changes.setdefault("num_landmarks", settings_of(model.config, None).num_landmarks if found in ATTENTIONS else 64)
    changes["conv_kernel_size"] = kernel
    return convert.with_convolution(model, "nystrom", kernel or 1)


@contextmanager
def _no_report() -> Iterator[None]:
    """Without transformers' report of new and of unused weights: the caller is told their names."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _changed(config: NystromformerConfig, changes: dict[str, Any]) -> NystromformerConfig:
    for name, value in changes.items():
        setattr(config, name, value)
    if config.attention not in ("nystrom", "shift"):
        config.num_pinv_iters = None
    config.dtype = torch.float32
    config.architectures = None
    return config
