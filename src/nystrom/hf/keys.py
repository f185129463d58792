"""Which tensor of transformers' Nyströmformer is which of ours: one table, read in both directions."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

BASE = "nystromformer."
"""Before every name of the encoder in a model with a head, in theirs and ours; a model without a head has none."""

# theirs, ours; {i} numbers the layers. Each stands for its weight and its bias.
ENCODER = (
    ("embeddings.word_embeddings", "encoder.embeddings.token"),
    ("embeddings.position_embeddings", "encoder.embeddings.position"),
    ("embeddings.token_type_embeddings", "encoder.embeddings.token_type"),
    ("embeddings.LayerNorm", "encoder.embeddings.norm"),
    ("encoder.layer.{i}.attention.self.query", "encoder.blocks.{i}.attention.query"),
    ("encoder.layer.{i}.attention.self.key", "encoder.blocks.{i}.attention.key"),
    ("encoder.layer.{i}.attention.self.value", "encoder.blocks.{i}.attention.value"),
    ("encoder.layer.{i}.attention.self.conv", "encoder.blocks.{i}.attention.conv"),
    ("encoder.layer.{i}.attention.output.dense", "encoder.blocks.{i}.attention.out"),
    ("encoder.layer.{i}.attention.output.LayerNorm", "encoder.blocks.{i}.attention_norm"),
    ("encoder.layer.{i}.intermediate.dense", "encoder.blocks.{i}.ffn.0"),
    ("encoder.layer.{i}.output.dense", "encoder.blocks.{i}.ffn.2"),
    ("encoder.layer.{i}.output.LayerNorm", "encoder.blocks.{i}.ffn_norm"),
)
HEADS = (
    ("cls.predictions.transform.dense", "transform"),
    ("cls.predictions.transform.LayerNorm", "norm"),
    ("cls.predictions.decoder", "decoder"),
    ("classifier.dense", "dense"),
    ("classifier.out_proj", "out_proj"),
    ("pre_classifier", "pre_classifier"),
    ("classifier", "classifier"),
    ("qa_outputs", "qa_outputs"),
)
TOKENS, SAME_TOKENS = BASE + "embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
BIAS, SAME_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"
"""Two names of theirs for one tensor: files hold the first, those of old versions both."""
BUFFERS = re.compile(r"(nystromformer\.)?embeddings\.(position_ids|token_type_ids)")
"""Counters that old versions wrote beside the weights."""


def to_ours(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names, without the second copies of shared ones and without counters.

    Raises:
        ValueError: a name that transformers' Nyströmformer has not; two tensors that should be one differ.
    """
    tensors = {name: tensor for name, tensor in theirs.items() if not BUFFERS.fullmatch(name)}
    for name, copy in ((TOKENS, SAME_TOKENS), (BIAS, SAME_BIAS)):
        again = tensors.pop(copy, None)
        if again is not None and not torch.equal(again, tensors.setdefault(name, again)):
            raise ValueError(
                f"{name} and {copy} must be equal: they differ. A model whose output layer is not its token embeddings "
                "(tie_word_embeddings false) cannot be converted"
            )
    if BIAS in tensors:  # our output layer has it under the second name
        tensors[SAME_BIAS] = tensors.pop(BIAS)
    return _renamed(tensors, ENCODER + HEADS, "transformers' Nyströmformer")


def to_theirs(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under transformers' names, each shared one once.

    Raises:
        ValueError: a name that our models have not.
    """
    tensors = _renamed(ours, tuple((b, a) for a, b in ENCODER + HEADS), "our Nyströmformer")
    tensors.pop(SAME_TOKENS, None)
    if SAME_BIAS in tensors:
        tensors[BIAS] = tensors.pop(SAME_BIAS)
    return tensors


def _renamed(tensors: Mapping[str, Tensor], table: tuple[tuple[str, str], ...], whose: str) -> dict[str, Tensor]:
    patterns = [(re.compile(re.escape(a).replace(r"\{i\}", r"(\d+)")), b) for a, b in table]
    out, unknown = {}, []
    for name, tensor in tensors.items():
        base = BASE if name.startswith(BASE) else ""
        module, _, kind = name.removeprefix(base).rpartition(".")
        found = [(match, b) for a, b in patterns if (match := a.fullmatch(module))]
        if not found or kind not in ("weight", "bias"):
            unknown.append(name)
            continue
        ((match, to),) = found
        out[f"{base}{to.replace('{i}', match[1]) if match.groups() else to}.{kind}"] = tensor
    if unknown:
        raise ValueError(f"not names of {whose}: {', '.join(sorted(unknown))}")
    return out
