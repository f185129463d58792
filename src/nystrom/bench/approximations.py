"""The approximations of attention that are measured on a real model, each with its settings. Add a method here."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor

from nystrom.analysis import exact_attention
from nystrom.bench.baselines import no_inverse, pooled, window
from nystrom.bench.monarch import monarch
from nystrom.functional import nystrom_attention
from nystrom.residual import residual_nystrom_attention
from nystrom.spectral import spectral_shift_attention

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""query, key, value (b, h, n, d), mask (b, n) or None and scale, to the output (b, h, n, d)."""

Family = Literal["exact", "ours", "nystrom", "other"]


class Approximation(NamedTuple):
    """A method with its settings."""

    name: str
    label: str
    """What tables and pictures call it; tells settings apart."""
    family: Family
    """exact; ours, beyond what is published; nystrom, the published form and its variants; other methods."""
    attend: Attend
    settings: dict[str, Any]
    """What it was run with, for the record."""


def approximations(num_landmarks: int) -> list[Approximation]:
    """Every method, those with landmarks at so many."""
    m = num_landmarks
    return [
        Approximation("exact", "exact", "exact", exact_attention, {}),
        _nystrom("nystrom", f"Nyström m{m}", m),
        _nystrom("chebyshev", f"chebyshev m{m}", m, pinv="chebyshev"),
        _nystrom("ridge", f"ridge m{m}", m, pinv="ridge"),
        _nystrom("svd", f"svd m{m}", m, pinv="svd"),
        _nystrom("kmeans", f"k-means m{m}", m, landmarks="kmeans"),
        _nystrom("strided", f"strided m{m}", m, landmarks="strided"),
        _like_sdpa("shift", f"spectral shift m{m}", "ours", spectral_shift_attention, num_landmarks=m),
        _residual("residual_g64", m, block=64, top_k=32),
        _residual("residual", m, block=32, top_k=64),
        _residual("residual_g16", m, block=16, top_k=80),
        _other("no_inverse", f"no inverse m{m}", no_inverse, num_landmarks=m),
        _other("pooled", f"pooled m{m}", pooled, num_landmarks=m),
        _other("window", "window 3x32", window, width=32),
        _other("monarch_t2_b8", "Monarch T2 b8", monarch, num_steps=2, block=8),
        _other("monarch_t2_b16", "Monarch T2 b16", monarch, num_steps=2, block=16),
        _other("monarch_t2_b32", "Monarch T2 b32", monarch, num_steps=2, block=32),
        _other("monarch_t2_b64", "Monarch T2 b64", monarch, num_steps=2, block=64),
        _other("monarch_t3_b16", "Monarch T3 b16", monarch, num_steps=3, block=16),
    ]


def _nystrom(name: str, label: str, num_landmarks: int, **options: Any) -> Approximation:
    settings = {"num_landmarks": num_landmarks, "landmarks": "segment_means", "pinv": "iterative", **options}
    return _like_sdpa(name, label, "nystrom", nystrom_attention, **settings)


def _residual(name: str, num_landmarks: int, *, block: int, top_k: int) -> Approximation:
    settings = {"num_landmarks": num_landmarks, "block": block, "top_k": top_k}
    label = f"residual g{block} t{top_k} m{num_landmarks}"
    return _like_sdpa(name, label, "ours", residual_nystrom_attention, **settings)


def _like_sdpa(name: str, label: str, family: Family, method: Callable[..., Tensor], **settings: Any) -> Approximation:
    """A method with the parameters of torch's scaled_dot_product_attention: mask and scale have other places there."""

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        return method(query, key, value, mask, scale=scale, **settings)

    return Approximation(name, label, family, attend, settings)


def _other(name: str, label: str, method: Callable[..., Tensor], **settings: Any) -> Approximation:
    return Approximation(name, label, "other", partial(method, **settings), settings)
