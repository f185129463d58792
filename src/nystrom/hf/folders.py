"""Folders as transformers' own Nyströmformer saves them: config.json with model_type "nystromformer", and tensors."""

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import NystromformerConfig as TheirConfig

from nystrom.hf.configuration import NystromformerConfig
from nystrom.hf.files import refused
from nystrom.hf.keys import to_ours, to_theirs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAFE, SHARDS, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
NOT_OURS = ("model_type", "segment_means_seq_len", "inv_coeff_init_option", "transformers_version", "use_cache")
"""Fields of their config.json that say nothing about a model of ours."""
SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "num_landmarks",
    "conv_kernel_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "id2label",
    "label2id",
    "problem_type",
    "dtype",
)
"""Fields with one meaning in their config and in ours."""


def read_config(folder: Path, options: Mapping[str, Any]) -> NystromformerConfig:
    """Their config.json as ours, with options of ours on top.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is not of transformers' Nyströmformer; it wants what our models cannot do.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; a model on the Hub is first brought here by huggingface_hub.snapshot_download"
        )
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(fields, dict) or fields.get("model_type") != "nystromformer":
        found = fields.get("model_type") if isinstance(fields, dict) else fields
        hint = "; from_pretrained reads it" if found == "nystrom" else ""
        raise ValueError(f"{path}: model_type must be 'nystromformer': got {found!r}{hint}")
    if fields.get("inv_coeff_init_option"):
        raise ValueError(f"{path}: inv_coeff_init_option must be false: got {fields['inv_coeff_init_option']!r}")
    if not fields.get("tie_word_embeddings", True):
        raise ValueError(f"{path}: tie_word_embeddings must be true: got {fields['tie_word_embeddings']!r}")
    # A field that they left out has their default, which is not always ours.
    theirs = {name: getattr(TheirConfig(), name) for name in SHARED if name not in ("id2label", "label2id", "dtype")}
    theirs |= {name: value for name, value in fields.items() if name not in NOT_OURS}
    if "num_labels" in options:  # else the names of the old labels would count
        theirs = {name: value for name, value in theirs.items() if name not in ("id2label", "label2id", "num_labels")}
    try:
        return NystromformerConfig(**theirs | dict(options))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_tensors(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of a folder, under our names.

    Raises:
        FileNotFoundError: there is no file of tensors.
        ValueError: only a pickle is there, and not allowed; a file is no such file; a name is unknown.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    try:
        if (folder / SAFE).is_file():
            tensors = load_file(folder / SAFE)
        elif (folder / SHARDS).is_file():
            for name in sorted(set(json.loads((folder / SHARDS).read_text())["weight_map"].values())):
                tensors |= load_file(folder / name)
        elif (folder / PICKLE).is_file() and allow_pickle:
            try:
                tensors = torch.load(folder / PICKLE, map_location="cpu", weights_only=True)
            except UnpicklingError as error:
                raise refused(folder / PICKLE, error) from None
        elif (folder / PICKLE).is_file():
            raise ValueError(f"{PICKLE} is the only file of tensors; allow_pickle=True reads it")
        else:
            raise FileNotFoundError(f"{folder / SAFE}: no such file")
        return to_ours(tensors)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: {error}") from None


def write(model: "PreTrainedModel", config: NystromformerConfig, folder: Path, length: int | None) -> None:
    """Write a model of ours in their format: all of it, or nothing.

    Raises:
        FileExistsError: the folder exists and is not empty, or is a file.
        ValueError: transformers has no such model.
    """
    from safetensors.torch import save_file

    folder = folder.resolve()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists already; name a new or an empty folder")
    if config.conv_kernel_size is None:
        raise ValueError("conv_kernel_size must be a number: got None; transformers' model always has the convolution")
    if not hasattr(transformers, name := type(model).__name__):
        raise ValueError(f"transformers has no {name}: read its folder as one that it has, as NystromformerForMaskedLM")
    if config.norm_first:
        raise ValueError(
            "norm_first must be False: got True; transformers' model normalises after each part of a block"
        )
    if not config.tie_word_embeddings:
        raise ValueError("tie_word_embeddings must be True: got False")
    if length is not None and (length <= config.num_landmarks or length % config.num_landmarks != 0):
        raise ValueError(
            f"length must be a multiple of num_landmarks above it, {config.num_landmarks}: got {length}; or None, for "
            "exact attention at any length"
        )
    fields: dict[str, Any] = {name: getattr(config, name) for name in SHARED}
    fields["dtype"] = model.dtype
    theirs = TheirConfig(
        **fields,
        segment_means_seq_len=config.num_landmarks if length is None else length,
        architectures=[type(model).__name__],
    )
    tensors = {name: tensor.detach().contiguous() for name, tensor in to_theirs(model.state_dict()).items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    half = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    half.mkdir()
    try:
        save_file(tensors, half / SAFE, metadata={"format": "pt"})
        theirs.save_pretrained(half)
        if folder.is_dir():
            folder.rmdir()
        half.rename(folder)
    except BaseException:
        shutil.rmtree(half)
        raise
