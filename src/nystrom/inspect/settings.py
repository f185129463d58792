"""The attentions that a report compares, each with one option that is swept, and the Python that uses them."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from nystrom.analysis import exact_attention
from nystrom.functional import nystrom_attention
from nystrom.residual import residual_nystrom_attention
from nystrom.spectral import spectral_shift_attention

EXACT = "exact"
"""The id of the model's own attention, beside those of the settings."""
MOST_RESIDUAL_LANDMARKS = 64
"""The residual method runs at the largest landmark count of a report that is not above this one."""


class Method(NamedTuple):
    """An attention function, and what the report says of it."""

    name: str
    title: str
    function: Callable[..., Tensor]
    module: str
    """Where a user imports it from."""
    swept: str
    """The option that the report varies."""


class Setting(NamedTuple):
    """A method with its options."""

    method: Method
    options: dict[str, int]

    @property
    def id(self) -> str:
        """Names it in the JSON file."""
        return f"{self.method.name}-{self.options[self.method.swept]}"

    @property
    def label(self) -> str:
        """Names it for a reader."""
        words = {"num_landmarks": "{} landmarks", "top_k": "top {}"}
        return ", ".join([self.method.title, *(words[name].format(n) for name, n in self.options.items())])

    @property
    def arguments(self) -> str:
        """The options as Python writes them."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())

    @property
    def code(self) -> str:
        """The call, one line."""
        return f"{self.method.function.__name__}(query, key, value, mask, scale=scale, {self.arguments})"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """(b, h, n, d) tensors, mask (b, n) or None and scale, to the output (b, h, n, d)."""
        return self.method.function(query, key, value, mask, scale=scale, **self.options)


METHODS = (
    Method("nystrom", "Nyström", nystrom_attention, "nystrom", "num_landmarks"),
    Method("spectral_shift", "Spectral shift", spectral_shift_attention, "nystrom.spectral", "num_landmarks"),
    Method("residual", "Residual", residual_nystrom_attention, "nystrom.residual", "top_k"),
)


def settings(landmarks: tuple[int, ...], top_k: tuple[int, ...]) -> dict[str, Setting]:
    """Every setting to compare, by id, a method's in ascending order."""
    nystrom, shift, residual = METHODS
    fixed = max((m for m in landmarks if m <= MOST_RESIDUAL_LANDMARKS), default=min(landmarks))
    found = [Setting(method, {"num_landmarks": m}) for method in (nystrom, shift) for m in sorted({*landmarks})]
    found += [Setting(residual, {"num_landmarks": fixed, "top_k": k}) for k in sorted({*top_k})]
    return {setting.id: setting for setting in found}


def attend_by(choice: str, known: dict[str, Setting]) -> Callable[..., Tensor]:
    """The attention of an id: a setting's, or the exact one."""
    return exact_attention if choice == EXACT else known[choice].attend


def paste(choices: list[str], known: dict[str, Setting]) -> str:
    """The Python that gives each layer, first to last, the attention of its id."""
    used = [known[choice].method for choice in dict.fromkeys(choices) if choice != EXACT]
    sources = {("nystrom.models", "replaced"), *((x.module, x.function.__name__) for x in used)}
    if len({*choices}) == 1 and used:
        lines = ["", "", "def attend(query, key, value, mask, scale, layer):", f"    return {known[choices[0]].code}"]
    else:
        if EXACT in choices:
            sources.add(("nystrom.analysis", "exact_attention"))
        each = [f"    {_partial(choice, known)},  # layer {i}" for i, choice in enumerate(choices)]
        lines = ["", "LAYERS = [", *each, "]", "", "", "def attend(query, key, value, mask, scale, layer):"]
        lines.append("    return LAYERS[layer](query, key, value, mask, scale=scale)")
    imports = [f"from {module} import {name}" for module, name in sorted(sources)]
    standard = ["from functools import partial", ""] if "LAYERS = [" in lines else []
    end = ["", "", "with replaced(model, attend):", "    outputs = model(**batch)", ""]
    return "\n".join([*standard, *imports, *lines, *end])


def _partial(choice: str, known: dict[str, Setting]) -> str:
    if choice == EXACT:
        return "exact_attention"
    return f"partial({known[choice].method.function.__name__}, {known[choice].arguments})"
