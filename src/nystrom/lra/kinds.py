"""The kinds of attention that Long Range Arena compares here, and which settings each reads."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nystrom import baselines
from nystrom.functional import nystrom_attention
from nystrom.lra.model import Attend, Sizes
from nystrom.residual import residual_nystrom_attention
from nystrom.spectral import spectral_shift_attention

Kind = Literal[
    "softmax",
    "softmax_matrix",
    "nystrom",
    "nystrom_shift",
    "nystrom_residual",
    "linformer",
    "performer",
    "performer_relu",
    "reformer",
    "linear",
    "longformer",
    "bigbird",
    "skyformer",
    "none",
]


class Settings(NamedTuple):
    """Of the attention; each kind reads those that `DEFAULTS` has for it."""

    num_landmarks: int | None = None
    """nystrom, nystrom_shift, nystrom_residual (clusters), skyformer (count)."""
    num_pinv_iters: int | None = None
    """Steps of the inverse: nystrom, nystrom_shift (count)."""
    num_features: int | None = None
    """linformer (projected tokens), both performers (random features) (count)."""
    num_hashes: int | None = None
    """Rounds of hashing: reformer (count)."""
    window: int | None = None
    """Tokens read around each: longformer (count)."""
    block: int | None = None
    """Tokens of a block: bigbird (count)."""
    conv_kernel_size: int | None = None
    """Tokens spanned by the convolution skip; 0: none. All."""


DEFAULTS: dict[str, dict[str, int]] = {
    "softmax": {"conv_kernel_size": 0},
    "softmax_matrix": {"conv_kernel_size": 0},
    "nystrom": {"num_landmarks": 64, "num_pinv_iters": 6, "conv_kernel_size": 35},
    "nystrom_shift": {"num_landmarks": 64, "num_pinv_iters": 6, "conv_kernel_size": 35},
    "nystrom_residual": {"num_landmarks": 64, "conv_kernel_size": 35},
    "linformer": {"num_features": 256, "conv_kernel_size": 0},
    "performer": {"num_features": 256, "conv_kernel_size": 0},
    "performer_relu": {"num_features": 256, "conv_kernel_size": 0},
    "reformer": {"num_hashes": 2, "conv_kernel_size": 0},
    "linear": {"conv_kernel_size": 0},
    "longformer": {"window": 128, "conv_kernel_size": 0},
    "bigbird": {"block": 64, "conv_kernel_size": 0},
    "skyformer": {"num_landmarks": 128, "conv_kernel_size": 0},
    "none": {"conv_kernel_size": 35},
}
"""Those of Nyströmformer's authors where they ran the kind (the first two too), else its own paper's."""


def resolve(kind: str, given: Settings) -> dict[str, int]:
    """The settings that the kind reads, each as given or else its default.

    Raises:
        ValueError: one is given that it does not read.
    """
    for name, value in given._asdict().items():
        if value is not None and name not in DEFAULTS[kind]:
            read = ", ".join(DEFAULTS[kind])
            raise ValueError(f"attention {kind} does not read {name}, but {read}: got {value}; leave it out")
    return {
        name: value if (value := getattr(given, name)) is not None else DEFAULTS[kind][name] for name in DEFAULTS[kind]
    }


def make_attend(kind: str, sizes: Sizes, settings: dict[str, int]) -> Callable[[int], Attend]:
    """What makes the attention of layer 0, 1 and so on."""
    d = sizes.embed_dim // sizes.num_heads
    m = settings.get("num_landmarks", 0)
    makers: dict[str, Callable[[int], Any]] = {
        "softmax": lambda _: softmax_attention,
        "softmax_matrix": lambda _: softmax_matrix_attention,
        "nystrom": lambda _: partial(_of_ours, nystrom_attention, **_inverse(settings)),
        "nystrom_shift": lambda _: partial(_of_ours, spectral_shift_attention, **_inverse(settings)),
        "nystrom_residual": lambda _: partial(_of_ours, residual_nystrom_attention, num_landmarks=m),
        "linformer": lambda _: baselines.LinformerAttention(
            sizes.num_heads, sizes.max_length, settings["num_features"]
        ),
        "performer": lambda layer: baselines.PerformerAttention(d, settings["num_features"], seed=layer),
        "performer_relu": lambda layer: baselines.PerformerReLUAttention(d, settings["num_features"], seed=layer),
        "reformer": lambda _: baselines.ReformerAttention(num_hashes=settings["num_hashes"]),
        "linear": lambda _: baselines.linear_attention,
        "longformer": lambda _: partial(baselines.window_attention, window=settings["window"], num_global=1),
        "bigbird": lambda layer: baselines.BigBirdAttention(block=settings["block"], seed=layer),
        "skyformer": lambda _: baselines.SkyformerAttention(num_landmarks=m),
        "none": lambda _: no_attention,
    }
    return makers[kind]


def _inverse(settings: dict[str, int]) -> dict[str, int]:
    return {name: settings[name] for name in ("num_landmarks", "num_pinv_iters")}


def _of_ours(
    function: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: int
) -> Tensor:
    return function(query, key, value, mask, **options)


def softmax_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n d"],
    mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n d"]:
    """Exact attention by torch's fused kernel: time O(b h n² d), memory O(b h n d)."""
    return F.scaled_dot_product_attention(query, key, value, None if mask is None else mask[:, None, None])


def softmax_matrix_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n d"],
    mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n d"]:
    """Exact attention that keeps its n x n matrix, as the paper's comparison did: time and memory O(b h n²)."""
    logits = query @ key.mT * query.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -1e9)  # finite: a sample may have no token
    return logits.softmax(-1) @ value


def no_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n d"],
    mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b h n d"]:
    """Every token reads itself alone: what the convolution skip and the feed-forward parts do by themselves."""
    return value
