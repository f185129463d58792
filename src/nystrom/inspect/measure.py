"""The numbers of a report: spectra and errors of each layer, and what the model makes of another attention."""

from collections.abc import Callable
from statistics import median_low
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nystrom.analysis import (
    diagonal_weight,
    exact_attention,
    layer_error,
    output_error,
    singular_values,
    softmax_matrix,
)
from nystrom.bench.embeddings import compare
from nystrom.inspect.settings import EXACT, Setting, attend_by
from nystrom.models import Layer, replaced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Numbers = dict[str, Any]
"""Part of a report, as JSON takes it."""
RANKS = 160
"""Points on a curve of singular values, at most (count)."""


def layer_numbers(texts: list[Layer], known: dict[str, Setting]) -> Numbers:
    """Spectrum, diagonal and errors of one layer that read several texts."""
    exact = torch.cat([exact_attention(x.query, x.key, x.value, None, x.scale) for x in texts])
    error, head_error = {}, {}
    for name, setting in known.items():
        approx = torch.cat([setting.attend(x.query, x.key, x.value, None, x.scale) for x in texts])
        error[name] = short(layer_error(approx, exact))
        head_error[name] = short(output_error(approx, exact).tolist())
    own, values = [], []
    for x in texts:  # one matrix per head at a time is all that fits for a long text
        matrix = softmax_matrix(x.query, x.key, None, x.scale)
        own.append(diagonal_weight(matrix))
        values.append(singular_values(matrix))
    about = {"index": texts[0].index, "diagonal": short(torch.stack(own).mean().item())}
    return about | spectrum(torch.cat(values)) | {"error": error, "head_error": head_error}


def spectrum(values: Float[Tensor, "t h n"]) -> Numbers:
    """Singular values over the largest one: median, least and most over texts and heads; and the ranks that hold 90
    and 99 % of the energy, the sum of squares, in the median head."""
    n = values.shape[-1]
    ranks = sorted({round(1 + (n - 1) * (i / (RANKS - 1)) ** 2) for i in range(RANKS)})
    shown = (values / values[..., :1]).flatten(0, 1)[:, [rank - 1 for rank in ranks]]
    energy = values.double().square().flatten(0, 1).cumsum(-1)
    held = {
        f"rank{percent}": median_low(((energy < percent / 100 * energy[:, -1:]).sum(-1) + 1).tolist())
        for percent in (90, 99)
    }
    curves = {"median": shown.median(0).values, "least": shown.amin(0), "most": shown.amax(0)}
    return held | {"singular_values": {"rank": ranks} | {name: short(x.tolist()) for name, x in curves.items()}}


def states(
    model: "PreTrainedModel", ids: Int[Tensor, "t n"], choices: list[str], known: dict[str, Setting]
) -> Float[Tensor, "t n c"]:
    """The last hidden states, text by text, each layer with the attention of its id."""
    layers = [attend_by(choice, known) for choice in choices]
    return hidden(model, ids, lambda query, key, value, mask, scale, i: layers[i](query, key, value, mask, scale))


def hidden(model: "PreTrainedModel", ids: Int[Tensor, "t n"], attend: Callable[..., Tensor]) -> Float[Tensor, "t n c"]:
    """The last hidden states with `attend`, as `replaced` takes it, in every layer."""
    with replaced(model, attend), torch.no_grad():
        return torch.cat([model(input_ids=each[None]).last_hidden_state for each in ids])


def fidelity(
    model: "PreTrainedModel", ids: Int[Tensor, "t n"], options: dict[str, list[str]], known: dict[str, Setting]
) -> dict[str, Numbers]:
    """Of each option, a list of ids per layer: how far the states and the texts' embeddings come from the exact ones.

    Embeddings are means over tokens.
    """
    (layers,) = {len(choices) for choices in options.values()}
    exact = states(model, ids, [EXACT] * layers, known)
    found = {}
    for name, choices in options.items():
        apart = compare(states(model, ids, choices, known), exact)
        found[name] = {key: short(apart[key]) for key in ("hidden_error", "cosine_mean", "cosine_min")}
    return found


def short(x: Any) -> Any:
    """Numbers of six digits, in lists too: no measurement here is good for more."""
    return [short(each) for each in x] if isinstance(x, list) else float(f"{x:.6g}")
