"""Multi-head self-attention as a module: project, attend at linear cost, add the convolution skip, project."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nystrom._validate import check_options, key_padding_mask
from nystrom.functional import inverse_of, landmarks_of, nystrom_attention
from nystrom.inverses import Inverse, InverseName
from nystrom.landmarks import Landmarks, LandmarksName

Kind = Literal["nystrom", "softmax"]


class NystromAttention(nn.Module):
    """Self-attention of Nyströmformer: landmark attention plus a depthwise convolution over the values.

    Args:
        embed_dim: c, width of the model; must be a multiple of num_heads.
        num_heads: h (count).
        kind: "nystrom" for linear cost; "softmax" runs exact attention with the same weights, for comparison.
        num_landmarks: m, landmarks per head (count). Unused by "softmax".
        num_pinv_iters: steps of the inverse, where it takes any (count; see `nystrom_attention`). Unused by "softmax".
        landmarks: how landmarks are made (see `nystrom_attention`). Unused by "softmax".
        pinv: how the core is inverted (see `nystrom_attention`). Unused by "softmax".
        conv_kernel_size: tokens that the convolution skip spans; odd, or None for no skip. One filter per head, without
            bias, for either kind. The paper's text gives no size; the authors' code uses 33 to 65.
        dropout: probability of dropping an attention weight while training (see `nystrom_attention`).
        bias: whether the four projections have one.

    Raises:
        ValueError: embed_dim is no multiple of num_heads; an even conv_kernel_size; an unknown kind, landmarks or
            pinv; a count or dropout out of range.

    Source: Xiong et al. 2021, arXiv:2102.03902, section 3 and Figure 2.

    >>> import torch
    >>> attention = NystromAttention(embed_dim=64, num_heads=4, num_landmarks=16)
    >>> attention(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kind: Kind = "nystrom",
        num_landmarks: int = 64,
        num_pinv_iters: int | None = None,
        landmarks: LandmarksName | Landmarks = "segment_means",
        pinv: InverseName | Inverse = "iterative",
        conv_kernel_size: int | None = 33,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads != 0:
            raise ValueError(f"embed_dim must be a positive multiple of num_heads: got {embed_dim} and {num_heads}")
        if conv_kernel_size is not None and (conv_kernel_size < 1 or conv_kernel_size % 2 == 0):
            raise ValueError(f"conv_kernel_size must be odd, so that it has a centre, or None: got {conv_kernel_size}")
        check_options(dropout, False, None, num_landmarks, num_pinv_iters)
        inverse_of(pinv, num_pinv_iters)
        landmarks_of(landmarks)
        if kind not in ("nystrom", "softmax"):
            raise ValueError(f"kind must be 'nystrom' or 'softmax': got {kind!r}")
        self.num_heads = num_heads
        self.kind: Kind = kind
        self.num_landmarks = num_landmarks
        self.num_pinv_iters = num_pinv_iters
        self.landmarks: LandmarksName | Landmarks = landmarks
        self.pinv: InverseName | Inverse = pinv
        self.dropout = dropout
        self.query = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.key = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.value = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.out = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.conv = None
        if conv_kernel_size is not None:
            window = (conv_kernel_size, 1)  # over tokens, one filter for all channels of a head
            self.conv = nn.Conv2d(num_heads, num_heads, window, padding="same", groups=num_heads, bias=False)

    def forward(self, x: Float[Tensor, "b n c"], attn_mask: Tensor | None = None) -> Float[Tensor, "b n c"]:
        """Attend within each sample.

        Args:
            x: token states.
            attn_mask: True = real token; any key-padding form that `nystrom_attention` accepts. Padding that is finite
                reaches no valid output, through the convolution included; the outputs at padded tokens mean nothing.

        Raises:
            ValueError: x is not (b, n, c); attn_mask is not a key-padding mask.
        """
        if x.ndim != 3 or x.shape[2] != self.query.in_features:
            raise ValueError(f"x must be (batch, length, {self.query.in_features}): got shape {tuple(x.shape)}")
        b, n, _ = x.shape
        mask = None if attn_mask is None else key_padding_mask(attn_mask, b, n, n)
        query, key, value = (self._heads(project(x)) for project in (self.query, self.key, self.value))
        dropout_p = self.dropout if self.training else 0.0
        if self.kind == "softmax":
            sdpa_mask = None if mask is None else mask[:, None, None, :]
            attended = F.scaled_dot_product_attention(query, key, value, sdpa_mask, dropout_p)
        else:
            attended = nystrom_attention(
                query,
                key,
                value,
                mask,
                dropout_p,
                num_landmarks=self.num_landmarks,
                num_pinv_iters=self.num_pinv_iters,
                landmarks=self.landmarks,
                pinv=self.pinv,
            )
        if self.conv is not None:
            visible = value if mask is None else value.masked_fill(~mask[:, None, :, None], 0.0)
            attended = attended + self.conv(visible)
        return self.out(attended.transpose(1, 2).flatten(2))

    def _heads(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n d"]:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        options = ("kind", "num_landmarks", "num_pinv_iters", "landmarks", "pinv")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in options)
