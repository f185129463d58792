"""What exchanged attention does to a model on a text: the error of each layer, of the states and of the embedding."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from nystrom.analysis import layer_error

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NEVER = 1 << 60
"""As `exact_below`: longer than any text."""


def measure(model: PreTrainedModel, ids: Int[Tensor, "1 n"], attention: str) -> dict[str, Any]:
    """Against exact attention, which reads the same positions; the model's own settings but for `exact_below`.

    Args:
        model: with its settings, in float32 and eval mode; unchanged afterwards.
        ids: one text, special tokens included.
        attention: one of `ATTENTIONS`.

    Returns:
        tokens (count); layer_errors, ‖approximate - exact‖ / ‖exact‖ of each layer's attention output where the layers
        before it are exact; hidden_error, the same of the last hidden states where all layers are approximate; cosine
        of the mean over the tokens of these states.

    Raises:
        ValueError: the model asks for what this attention cannot give; its layers do not know its config.
    """
    errors: list[float] = []
    attend = AttentionInterface()[attention]

    def both(module: nn.Module, *given: Any, **options: Any) -> tuple[Tensor, None]:
        config = getattr(module, "config", None)
        if config is None:
            raise ValueError(f"{type(module).__name__} has no config to take its settings from")
        with exact_below(config, 0):
            approximate, _ = attend(module, *given, **options)
        with exact_below(config, NEVER):
            exact, _ = attend(module, *given, **options)
        errors.append(layer_error(approximate, exact))
        return exact, None

    encoder: Any = model.base_model
    AttentionInterface.register(attention, both)
    try:
        with torch.no_grad():
            exact = encoder(input_ids=ids).last_hidden_state
    finally:
        AttentionInterface.register(attention, attend)
    with exact_below(encoder.config, 0), torch.no_grad():
        approximate = encoder(input_ids=ids).last_hidden_state
    if not errors:
        raise ValueError(f"no layer of {type(model).__name__} asked transformers' AttentionInterface for its attention")
    return {
        "tokens": ids.shape[1],
        "layer_errors": [short(error) for error in errors],
        "hidden_error": short(((approximate - exact).norm() / exact.norm()).item()),
        "cosine": short(F.cosine_similarity(approximate.mean(1), exact.mean(1)).item()),
    }


def difference(model: PreTrainedModel, other: PreTrainedModel, ids: Int[Tensor, "1 n"]) -> float:
    """‖model's - other's‖ / ‖other's‖ of the last hidden states, the other never being exact."""
    with torch.no_grad():
        found = model.base_model(input_ids=ids).last_hidden_state
        with exact_below(other.config, 0):
            wanted = other.base_model(input_ids=ids).last_hidden_state
    return short(((found - wanted).norm() / wanted.norm()).item())


@contextmanager
def exact_below(config: "PreTrainedConfig", tokens: int) -> Iterator[None]:
    """Another such length for a while."""
    before = config.nystrom
    config.nystrom = before | {"exact_below": tokens}
    try:
        yield
    finally:
        config.nystrom = before


def short(x: float) -> float:
    """Six digits: no measurement here is good for more."""
    return float(f"{x:.6g}")
