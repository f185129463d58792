"""The attention forms that are measured: ours, exact, the plain form, and peers where they are installed."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nystrom.functional import nystrom_attention
from nystrom.residual import residual_nystrom_attention
from nystrom.spectral import spectral_shift_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""query, key, value, all (b, h, n, d), to the output (b, h, n, d)."""

Form = Literal["nystrom", "shift", "residual", "exact", "three_factor", "hf", "lucidrains"]
NAMES: dict[str, str] = {
    "nystrom": "nystrom",
    "shift": "spectral shift",
    "residual": "residual",
    "exact": "exact (SDPA)",
    "three_factor": "three factors",
    "hf": "Hugging Face",
    "lucidrains": "lucidrains",
}
"""Each form as tables head it."""
PINV_ITERS = 6
"""Steps of the inverse iteration, for every form; transformers' is fixed at this."""


def check_sizes(**sizes: int | tuple[int, ...]) -> None:
    """Raise ValueError unless every size, and every entry of a tuple of sizes, is at least 1."""
    for name, value in sizes.items():
        entries = value if isinstance(value, tuple) else (value,)
        if not entries or min(entries) < 1:
            raise ValueError(f"{name} must be at least 1: got {value}")


def methods(h: int, n: int, d: int, num_landmarks: int) -> dict[str, Attend]:
    """Every form that can run here, ours first; a peer where it is installed and computes what the paper says."""
    forms: dict[str, Attend] = {
        "nystrom": lambda q, k, v: nystrom_attention(q, k, v, num_landmarks=num_landmarks, num_pinv_iters=PINV_ITERS),
        "shift": lambda q, k, v: spectral_shift_attention(
            q, k, v, num_landmarks=num_landmarks, num_pinv_iters=PINV_ITERS
        ),
        "residual": lambda q, k, v: residual_nystrom_attention(q, k, v, num_landmarks=num_landmarks),
        "exact": F.scaled_dot_product_attention,
    }
    whole_segments = n % num_landmarks == 0
    if whole_segments:
        forms["three_factor"] = lambda q, k, v: three_factor(q, k, v, num_landmarks)
    if find_spec("transformers") and whole_segments and n > num_landmarks:  # at n = m it runs exact attention
        forms["hf"] = hugging_face(h, n, d, num_landmarks)
    if find_spec("nystrom_attention") and whole_segments:  # else it lets zero padding into landmarks and keys
        forms["lucidrains"] = lucidrains(h, d, num_landmarks)
    return forms


def three_factor(
    query: Float[Tensor, "b h n d"], key: Float[Tensor, "b h n d"], value: Float[Tensor, "b h n d"], num_landmarks: int
) -> Float[Tensor, "b h n d"]:
    """Nyström attention as the formula is written, (F A⁺) (B V), in plain torch: it stores both n x m factors.

    m must divide n.
    """
    query = query * query.shape[-1] ** -0.5
    query_landmarks, key_landmarks = (x.unflatten(2, (num_landmarks, -1)).mean(3) for x in (query, key))
    left = (query @ key_landmarks.mT).softmax(-1)
    core = (query_landmarks @ key_landmarks.mT).softmax(-1)
    right = (query_landmarks @ key.mT).softmax(-1)
    eye = torch.eye(num_landmarks, dtype=core.dtype)
    pinv = core.mT / core.sum(-2).amax(-1)[..., None, None]  # rows sum to one
    for _ in range(PINV_ITERS):
        product = core @ pinv
        pinv = 0.25 * pinv @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
    return (left @ pinv) @ (right @ value)


def hugging_face(h: int, n: int, d: int, num_landmarks: int) -> Attend:
    """The attention core of transformers' Nyströmformer, without its projections, its convolution and its dropout."""
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    config = NystromformerConfig(
        hidden_size=h * d, num_attention_heads=h, num_landmarks=num_landmarks, segment_means_seq_len=n
    )
    core = NystromformerSelfAttention(config).eval()
    for place, name in enumerate(("query", "key", "value")):
        setattr(core, name, Pick(place))
    core.conv_kernel_size = None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return core(Projected(query, key, value))[0].unflatten(2, (h, d)).transpose(1, 2)

    return attend


def lucidrains(h: int, d: int, num_landmarks: int) -> Attend:
    """The attention core of the PyPI package nystrom-attention, without its projections, convolution and dropout."""
    from nystrom_attention import NystromAttention

    core = NystromAttention(
        h * d, dim_head=d, heads=h, num_landmarks=num_landmarks, pinv_iterations=PINV_ITERS, residual=False
    ).eval()
    for name in ("to_qkv", "to_out"):  # it cuts what to_qkv gives with `chunk`, which Projected has
        setattr(core, name, nn.Identity())

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return core(Projected(query, key, value)).unflatten(2, (h, d)).transpose(1, 2)

    return attend


class Projected:
    """Query, key and value, all (b, h, n, d), in the place of a peer module's input and of what it projects it to.

    The peers' modules want (b, n, h d): a view of inputs whose tokens come first in memory, a copy of others.
    """

    def __init__(self, *heads: Tensor) -> None:
        self.parts = [x.transpose(1, 2).flatten(2) for x in heads]
        self.shape = self.parts[0].shape

    def chunk(self, chunks: int, dim: int) -> list[Tensor]:
        """As `Tensor.chunk`: query, key and value."""
        assert (chunks, dim) == (3, -1)
        return self.parts


class Pick(nn.Module):
    """Instead of a projection: one of the three tensors that are already there."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, projected: Projected) -> Tensor:
        return projected.parts[self.place]


def random_inputs(
    b: int, h: int, n: int, d: int, layout: str = "heads_first", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal query, key and value (b, h, n, d); "tokens_first" lies in memory as a model's projections do."""
    if layout == "heads_first":
        query, key, value = (torch.randn(b, h, n, d, dtype=dtype) for _ in range(3))
    else:
        query, key, value = (torch.randn(b, n, h, d, dtype=dtype).transpose(1, 2) for _ in range(3))
    return query, key, value
