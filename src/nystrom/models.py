"""Pretrained Hugging Face encoders: what their layers' attention gets, and another attention in its place.

Any encoder that takes its attention from transformers' AttentionInterface will do: BERT, RoBERTa, DistilBERT, ELECTRA,
ModernBERT at short lengths and many more. transformers is loaded by the first call, not by the import.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nystrom._validate import key_padding_mask
from nystrom.analysis import exact_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, int], Tensor]
"""query, key, value (b, h, n, d), mask (b, n) or None, scale and the layer's index, to the output (b, h, n, d)."""

_NUMBER = count()


@dataclass(frozen=True)
class Layer:
    """What the attention of one layer got."""

    query: Float[Tensor, "b h n d"]
    key: Float[Tensor, "b h n d"]
    """Repeated over the heads that share it, where some do."""
    value: Float[Tensor, "b h n v"]
    mask: Bool[Tensor, "b n"] | None
    """True = a real token; None where the model was given no mask."""
    scale: float
    """Factor on the logits."""
    index: int
    """Which layer, from 0."""


def load(path: str | Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A pretrained encoder in float32 and eval mode, without its task head, and its tokenizer.

    Args:
        path: a folder that `save_pretrained` wrote, or a name on the Hugging Face Hub.

    Raises:
        OSError: there is no such model, or a file of it is missing.
        ValueError: it is not an encoder whose attention can be exchanged.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'}: no such file; is {folder} a Hugging Face model's folder?")
    if not folder.is_dir() and (folder.exists() or folder.is_absolute() or str(path).startswith(".")):
        raise FileNotFoundError(f"{path}: no such folder")
    if folder.is_dir() and not any(any(folder.glob(name)) for name in ("tokenizer*", "vocab*", "*.model")):
        raise FileNotFoundError(f"{folder}: no tokenizer in this folder")  # transformers would make up an empty one
    model = AutoModel.from_pretrained(path, dtype=torch.float32)
    check_encoder(model)
    return model, AutoTokenizer.from_pretrained(path)


def check_encoder(model: "PreTrainedModel") -> None:
    """Raise ValueError unless the model is an encoder whose attention can be exchanged, as far as its class says."""
    name = type(model).__name__
    if model.config.is_encoder_decoder or getattr(model.config, "add_cross_attention", False):
        raise ValueError(f"{name} has cross-attention; only the self-attention of encoders can be exchanged")
    if not model.is_backend_compatible():
        raise ValueError(
            f"{name} does not take its attention from transformers' AttentionInterface: it cannot be exchanged"
        )
    causal = [place for place, module in model.named_modules() if getattr(module, "is_causal", False)]
    if causal:
        raise ValueError(
            f"{name} is causal ({causal[0]}.is_causal is True); landmarks would let its tokens read the future"
        )


@contextmanager
def replaced(model: "PreTrainedModel", attend: Attend) -> Iterator[None]:
    """Let every layer of the model run `attend` instead of its own attention, for a while.

    ``attend(query, key, value, mask, scale, layer_index)`` gets (b, h, n, d) tensors, mask (b, n) or None, and returns
    (b, h, n, d). The model is as before afterwards, also after an exception. Layers are numbered in the order in which
    a forward pass of the model calls them, so gradient checkpointing, which calls some again, is not for this.

    Args:
        model: an encoder; it runs inside as `model(...)` always does.
        attend: the attention.

    Raises:
        ValueError: the model cannot have its attention exchanged; inside, on its forward pass: it uses what `attend`
            is not told of (a window shorter than the text, a position bias, attention dropout), or a mask that says
            more than which keys are real.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    check_encoder(model)
    calls = 0

    def start_counting(*_: object) -> None:
        nonlocal calls
        calls = 0

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[Tensor, None]:
        nonlocal calls
        index, calls = calls, calls + 1
        b, h, n, d = query.shape
        s = key.shape[2]
        _check_call(module, n, s, dropout, options)
        mask = None if attention_mask is None else key_padding_mask(attention_mask, b, n, s)
        key, value = (x.repeat_interleave(h // x.shape[1], dim=1) if x.shape[1] != h else x for x in (key, value))
        out = attend(query, key, value, mask, d**-0.5 if scaling is None else scaling, index)
        return out.transpose(1, 2).contiguous(), None

    def as_given(*_: object, attention_mask: Tensor | None = None, **__: object) -> Tensor | None:
        return attention_mask

    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    before = [(part.config, part.config._attn_implementation) for part in parts]
    name = f"nystrom_{next(_NUMBER)}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, as_given)  # without it transformers drops the mask and does not say so
    hooks = [part.register_forward_pre_hook(start_counting) for part in parts]
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
        for hook in hooks:
            hook.remove()
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(name)


def _check_call(module: nn.Module, n: int, s: int, dropout: float, options: dict[str, Any]) -> None:
    """Raise ValueError for what a stand-in would have to obey and is not told."""
    name = type(module).__name__
    is_causal = options.get("is_causal")
    if getattr(module, "is_causal", True) if is_causal is None else is_causal:  # as transformers' own reads it
        raise ValueError(f"{name} is causal; landmarks would let its tokens read the future")
    if n != s:
        raise ValueError(f"{name} is cross-attention ({n} queries, {s} keys); only self-attention can be exchanged")
    window = options.get("sliding_window")
    if window is not None and n > window:
        raise ValueError(f"{name} reads a window of {window} tokens: got {n}; a window's cost is linear already")
    for extra in ("position_bias", "softcap", "s_aux"):
        if options.get(extra) is not None:
            raise ValueError(f"{name} changes its logits by {extra}, which the attention in its place cannot know")
    if dropout != 0.0:
        raise ValueError(f"{name} drops attention weights: got dropout = {dropout}; call model.eval() first")


def capture(
    model: "PreTrainedModel", input_ids: Int[Tensor, "b n"], attention_mask: Tensor | None = None
) -> list[Layer]:
    """What each layer's attention gets when the model reads these tokens with its exact attention.

    Args:
        model: an encoder.
        input_ids: tokens, padded to one length.
        attention_mask: (b, n), 1 or True for a real token; None where all are.

    Returns:
        One entry per layer, first to last, without gradients; queries, keys and values lie in memory as the model's
        projections made them.

    Raises:
        ValueError: as `replaced`; no layer took its attention from transformers' interface.
    """
    layers: list[Layer] = []

    def record(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, index: int) -> Tensor:
        layers.append(Layer(query, key, value, mask, scale, index))
        return exact_attention(query, key, value, mask, scale)

    with replaced(model, record), torch.no_grad():
        model(input_ids=input_ids, attention_mask=attention_mask)
    if not layers:
        raise ValueError(f"no layer of {type(model).__name__} asked transformers' AttentionInterface for its attention")
    return layers


def num_positions(model: "PreTrainedModel") -> int | None:
    """How many tokens the model's learnt position embeddings reach; None where it has none that we know of."""
    table = _position_table(model)
    return None if table is None else table.num_embeddings - _offset(table)


def tile_positions(model: "PreTrainedModel", length: int) -> "PreTrainedModel":
    """A copy of the model that reads `length` tokens, its learnt position embeddings repeated as often as needed.

    The position after the last one is again the first: an approximation, without training, of a model trained at that
    length. Rows before the first position (RoBERTa's padding) are not repeated; a model that reads as much already is
    copied unchanged.

    Args:
        model: an encoder with a table `embeddings.position_embeddings`.
        length: tokens to read (count).

    Raises:
        ValueError: the model has no such table; length is below 1.
    """
    table = _position_table(model)
    if table is None:
        raise ValueError(
            f"{type(model).__name__} has no learnt position embeddings at embeddings.position_embeddings to tile; "
            f"with rotary or relative positions it needs none"
        )
    if length < 1:
        raise ValueError(f"length must be at least 1: got {length}")
    offset = _offset(table)
    places = table.num_embeddings - offset
    model = copy.deepcopy(model)
    if length <= places:
        return model
    rows = torch.cat([torch.arange(offset), offset + torch.arange(length) % places])
    embeddings = model.base_model.get_submodule("embeddings")
    longer = nn.Embedding(len(rows), table.embedding_dim, table.padding_idx).to(table.weight)
    longer.weight.data = table.weight.detach()[rows.to(table.weight.device)]
    embeddings.position_embeddings = longer
    for name, buffer in list(embeddings.named_buffers(recurse=False)):
        if name in ("position_ids", "token_type_ids"):
            fresh = torch.arange(len(rows)) if name == "position_ids" else torch.zeros(len(rows), dtype=torch.long)
            setattr(embeddings, name, fresh[None].to(buffer.device))
    model.config.max_position_embeddings = len(rows)
    return model


def _position_table(model: "PreTrainedModel") -> nn.Embedding | None:
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    return table if isinstance(table, nn.Embedding) else None


def _offset(table: nn.Embedding) -> int:
    """Rows before the first position: RoBERTa counts from after its padding's."""
    return 0 if table.padding_idx is None else table.padding_idx + 1
