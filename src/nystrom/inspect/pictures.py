"""Attention matrices of single heads, exact and approximate, small enough to be drawn in a page."""

import base64
from statistics import median_low

import torch
from jaxtyping import Float
from torch import Tensor

from nystrom.analysis import attention_matrix, softmax_matrix
from nystrom.inspect.measure import Numbers
from nystrom.inspect.settings import Setting
from nystrom.models import Layer

SIDE = 128
"""Rows and columns of a drawn matrix, at most (count)."""
LARGEST = 65504.0
"""Of the numbers that two bytes hold."""


def default_heads(layers: list[Numbers]) -> dict[tuple[int, int], str]:
    """The heads with the largest, the median and the smallest error at what their layer is shown with, and why."""
    errors = {
        (layer["index"], head): error
        for layer in layers
        for head, error in enumerate(layer["head_error"][layer["shown"]])
    }
    middle = median_low(errors.values())
    why: dict[tuple[int, int], str] = {}
    for error, reason in ((max(errors.values()), "largest"), (middle, "median"), (min(errors.values()), "smallest")):
        why.setdefault(next(head for head, found in errors.items() if found == error), f"{reason} error of all heads")
    return why


def picture(layer: Layer, head: int, choices: list[str], known: dict[str, Setting]) -> Numbers:
    """A head's exact matrix and what the settings of the given ids make of it, as `groups` and `encode` leave them."""
    query, key = (x[:, head : head + 1] for x in (layer.query, layer.key))
    n = query.shape[2]
    group = -(-n // SIDE)

    def draw(matrix: Tensor) -> str:
        return encode(groups(matrix[0, 0], group))

    return {
        "layer": layer.index,
        "head": head,
        "group": group,
        "side": -(-n // group),
        "exact": draw(softmax_matrix(query, key, None, layer.scale)),
        "approximate": {
            choice: draw(
                attention_matrix(lambda q, k, v, at=known[choice]: at.attend(q, k, v, None, layer.scale), query, key)
            )
            for choice in choices
        },
    }


def groups(matrix: Float[Tensor, "n n"], group: int) -> Float[Tensor, "c c"]:
    """What a group of neighbouring queries reads, on average, of a group of keys together: rows keep their sum."""
    n = len(matrix)
    member = torch.eye(-(-n // group), dtype=matrix.dtype).repeat_interleave(group, dim=0)[:n]  # (n, c)
    return (member / member.sum(0)).mT @ matrix @ member


def encode(matrix: Float[Tensor, "c c"]) -> str:
    """Row by row, as two-byte floats, little-endian, in base64."""
    return base64.b64encode(matrix.clamp(-LARGEST, LARGEST).half().numpy().astype("<f2").tobytes()).decode()


def decode(text: str) -> Float[Tensor, "c c"]:
    """The matrix that `encode` was given, to three digits."""
    halves = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float16).float()
    return halves.unflatten(0, (round(len(halves) ** 0.5), -1))
