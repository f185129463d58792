"""How long attention takes at the user's lengths, here: measured as far as that takes seconds, and continued beyond."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from nystrom.bench.timing import Step, take_turns
from nystrom.inspect.measure import Numbers, hidden, short
from nystrom.inspect.settings import EXACT, Setting, attend_by
from nystrom.models import Layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST_MS = 3000.0
"""What is expected to take longer in one layer is not measured."""
ROUNDS, SECONDS = 3, 0.05
"""Times that each is measured, in turns, and for how long at least; the fastest counts, for noise only adds."""


def times(layer: Layer, known: dict[str, Setting], lengths: tuple[int, ...], threads: int) -> Numbers:
    """Milliseconds of one layer's attention, of one text, on random tensors of the layer's shape, by id and length.

    Exact attention is continued with the square of the length, all others in proportion to it, from the last length
    that was measured.
    """
    lengths = tuple(sorted({*lengths}))
    ms: dict[str, list[float]] = {choice: [] for choice in (EXACT, *known)}
    measured: dict[str, list[bool]] = {choice: [] for choice in ms}
    for place, n in enumerate(lengths):
        steps: dict[str, Step] = {}
        inputs = _random_like(layer, n)
        for choice in ms:
            grown = (n / lengths[place - 1]) ** (2 if choice == EXACT else 1) * ms[choice][-1] if place else 0.0
            measured[choice].append(grown <= LONGEST_MS)
            ms[choice].append(short(grown))
            if grown <= LONGEST_MS:
                steps[choice] = _step(attend_by(choice, known), inputs, layer.scale)
        for choice, rounds in take_turns(steps, ROUNDS, SECONDS, threads).items():
            ms[choice][-1] = short(min(rounds))
    return {"lengths": list(lengths), "ms": ms, "measured": measured}


def rest_ms(model: "PreTrainedModel", ids: Int[Tensor, "t n"], threads: int) -> float:
    """Milliseconds per token that the model takes beside its attention: each token's value in the attention's place."""

    def step() -> object:
        return hidden(model, ids[:1], lambda query, key, value, mask, scale, i: value)

    (found,) = take_turns({"rest": step}, ROUNDS, SECONDS, threads).values()
    return short(min(found) / ids.shape[1])


def speed_up(choices: list[str], speed: Numbers) -> Numbers:
    """Milliseconds of all layers' attention by length, whether every layer's was measured, and how many times faster
    it and the whole model are than with exact attention."""
    found: Numbers = {"attention_ms": [], "measured": [], "attention_speed_up": [], "model_speed_up": []}
    for place, n in enumerate(speed["lengths"]):
        exact = len(choices) * speed["ms"][EXACT][place]
        ours = sum(speed["ms"][choice][place] for choice in choices)
        rest = n * speed["rest_ms_per_token"]
        found["attention_ms"].append(short(ours))
        found["measured"].append(all(speed["measured"][choice][place] for choice in choices))
        found["attention_speed_up"].append(short(exact / ours))
        found["model_speed_up"].append(short((rest + exact) / (rest + ours)))
    return found


def _random_like(layer: Layer, n: int) -> list[Tensor]:
    """Query, key and value that lie in memory as a model's projections do."""
    widths = [(x.shape[1], x.shape[3]) for x in (layer.query, layer.key, layer.value)]
    return [torch.randn(1, n, h, d).transpose(1, 2) for h, d in widths]


def _step(attend: Callable[..., Tensor], inputs: list[Tensor], scale: float) -> Step:
    def step() -> object:
        with torch.inference_mode():
            return attend(*inputs, None, scale)

    return step
