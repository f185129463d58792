"""The attention forms that are measured: ours, exact, the plain form, and peers where they are installed."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nystrom.functional import iterative_pinv, nystrom_attention, segment_means

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""query, key, value, all (b, h, n, d), to the output (b, h, n, d)."""

Form = Literal["nystrom", "exact", "three_factor", "hf"]
NAMES: dict[str, str] = {
    "nystrom": "nystrom",
    "exact": "exact (SDPA)",
    "three_factor": "three factors",
    "hf": "Hugging Face",
}
"""Each form as tables head it."""


def check_sizes(**sizes: int | tuple[int, ...]) -> None:
    """Raise ValueError unless every size, and every entry of a tuple of sizes, is at least 1."""
    for name, value in sizes.items():
        entries = value if isinstance(value, tuple) else (value,)
        if not entries or min(entries) < 1:
            raise ValueError(f"{name} must be at least 1: got {value}")


def methods(h: int, n: int, d: int, num_landmarks: int) -> dict[str, Attend]:
    """Every form that can run here, ours first; `hf` only where transformers is installed."""
    forms: dict[str, Attend] = {
        "nystrom": lambda q, k, v: nystrom_attention(q, k, v, num_landmarks=num_landmarks),
        "exact": F.scaled_dot_product_attention,
        "three_factor": lambda q, k, v: three_factor(q, k, v, num_landmarks),
    }
    if find_spec("transformers") and n % num_landmarks == 0 and n > num_landmarks:  # all that it can run
        forms["hf"] = hugging_face(h, n, d, num_landmarks)
    return forms


def three_factor(
    query: Float[Tensor, "b h n d"], key: Float[Tensor, "b h n d"], value: Float[Tensor, "b h n d"], num_landmarks: int
) -> Float[Tensor, "b h n d"]:
    """Nyström attention as the formula is written, (F A⁺) (B V): it stores both n x m factors."""
    query = query * query.shape[-1] ** -0.5
    query_landmarks, _ = segment_means(query, num_landmarks)
    key_landmarks, _ = segment_means(key, num_landmarks)
    left = (query @ key_landmarks.mT).softmax(-1)
    core = (query_landmarks @ key_landmarks.mT).softmax(-1)
    right = (query_landmarks @ key.mT).softmax(-1)
    return (left @ iterative_pinv(core)) @ (right @ value)


def hugging_face(h: int, n: int, d: int, num_landmarks: int) -> Attend:
    """The attention core of transformers' Nyströmformer: its projections made the identity, its convolution left out.

    It projects one input three ways, so here query, key and value are all `query`; its cost does not depend on that.
    """
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    config = NystromformerConfig(
        hidden_size=h * d, num_attention_heads=h, num_landmarks=num_landmarks, segment_means_seq_len=n
    )
    core = NystromformerSelfAttention(config).eval()
    for name in ("query", "key", "value"):
        setattr(core, name, nn.Identity())
    core.conv_kernel_size = None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        hidden = query.transpose(1, 2).flatten(2)
        return core(hidden)[0].unflatten(2, (h, d)).transpose(1, 2)

    return attend


def random_inputs(
    b: int, h: int, n: int, d: int, layout: str = "heads_first", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal query, key and value (b, h, n, d); "tokens_first" lies in memory as a model's projections do."""
    if layout == "heads_first":
        query, key, value = (torch.randn(b, h, n, d, dtype=dtype) for _ in range(3))
    else:
        query, key, value = (torch.randn(b, n, h, d, dtype=dtype).transpose(1, 2) for _ in range(3))
    return query, key, value
