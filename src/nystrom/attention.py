"""Multi-head self-attention as a module: project, attend at linear cost, add the convolution skip, project."""

from typing import Literal, get_args

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nystrom._precision import full_precision
from nystrom._validate import check_indices, check_options, key_padding_mask
from nystrom.convolution import TokenConvolution
from nystrom.functional import inverse_of, landmarks_of, nystrom_attention, weights
from nystrom.inverses import Inverse, InverseName
from nystrom.landmarks import Landmarks, LandmarksName
from nystrom.maps import attention_rows
from nystrom.residual import residual_nystrom_attention
from nystrom.spectral import spectral_shift_attention

Kind = Literal["nystrom", "softmax", "shift", "residual"]


class NystromAttention(nn.Module):
    """Self-attention of Nyströmformer: landmark attention plus a depthwise convolution over the values.

    Args:
        embed_dim: c, width of the model; must be a multiple of num_heads.
        num_heads: h (count).
        kind: "nystrom", "shift" (`spectral_shift_attention`) or "residual" (`residual_nystrom_attention`), of linear
            cost; "softmax" is exact attention, for comparison. All with the same weights.
        num_landmarks: m, landmarks per head (count). Unused by "softmax".
        num_pinv_iters: steps of the inverse, where it takes any (count; see `nystrom_attention`). Unused by "softmax",
            refused by "residual", which inverts nothing; so are landmarks and pinv.
        landmarks: how landmarks are made (see `nystrom_attention`).
        pinv: how the core is inverted (see `nystrom_attention`).
        conv_kernel_size: tokens that the convolution skip spans; odd, or None for no skip. One filter per head, without
            bias, for every kind. The paper's text gives no size; the authors' code uses 33 to 65.
        dropout: probability of dropping an attention weight while training (see `nystrom_attention`).
        bias: whether the four projections have one.

    Raises:
        ValueError: embed_dim is no multiple of num_heads; an even conv_kernel_size; an unknown kind, landmarks or
            pinv; a count or dropout out of range; an option that "residual" cannot obey.

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
        check_options(dropout, False, None, num_landmarks, num_pinv_iters)
        inverse_of(pinv, num_pinv_iters)
        landmarks_of(landmarks)
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be 'nystrom', 'softmax', 'shift' or 'residual': got {kind!r}")
        if kind == "residual" and (num_pinv_iters, landmarks, pinv) != (None, "segment_means", "iterative"):
            raise ValueError(
                "kind 'residual' clusters the keys and inverts nothing, so num_pinv_iters, landmarks and pinv must be "
                f"left out: got {num_pinv_iters!r}, {landmarks!r} and {pinv!r}"
            )
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
        self.conv = None if conv_kernel_size is None else TokenConvolution(num_heads, conv_kernel_size)

    def forward(self, x: Float[Tensor, "b n c"], attn_mask: Tensor | None = None) -> Float[Tensor, "b n c"]:
        """Attend within each sample.

        Args:
            x: token states.
            attn_mask: True = real token; any key-padding form that `nystrom_attention` accepts. Padding that is finite
                reaches no valid output, through the convolution included; the outputs at padded tokens mean nothing.

        Raises:
            ValueError: x is not (b, n, c); attn_mask is not a key-padding mask.
        """
        mask = self._check(x, attn_mask)
        query, key, value = (self._heads(project(x)) for project in (self.query, self.key, self.value))
        dropout_p = self.dropout if self.training else 0.0
        if self.kind == "softmax":
            sdpa_mask = None if mask is None else mask[:, None, None, :]
            attended = F.scaled_dot_product_attention(query, key, value, sdpa_mask, dropout_p)
        elif self.kind == "residual":
            attended = residual_nystrom_attention(query, key, value, mask, dropout_p, num_landmarks=self.num_landmarks)
        else:
            attend = spectral_shift_attention if self.kind == "shift" else nystrom_attention
            attended = attend(
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

    def rows(
        self, x: Float[Tensor, "b n c"], indices: Int[Tensor, "..."], attn_mask: Tensor | None = None
    ) -> Float[Tensor, "b h r n"]:
        """What chosen tokens read of every token, in each head: rows of the attention matrix, which is never made.

        Args:
            x: token states, as `forward` gets them.
            indices: places of the chosen tokens, 0 to n - 1: the same for every sample (r,), or each its own (b, r).
            attn_mask: as in `forward`.

        Returns:
            The rows, without dropout and without the convolution skip, in float32 or wider. Masked tokens get 0.

        Raises:
            ValueError: the kind is "shift" or "residual"; indices are not integers in [0, n); and as `forward`.
        """
        if self.kind not in ("nystrom", "softmax"):
            raise ValueError(f"only the kinds 'nystrom' and 'softmax' can show attention rows: got {self.kind!r}")
        mask = self._check(x, attn_mask)
        query, key = self._heads(self.query(x)), self._heads(self.key(x))
        if self.kind == "nystrom":
            return attention_rows(
                query,
                key,
                indices,
                mask,
                num_landmarks=self.num_landmarks,
                num_pinv_iters=self.num_pinv_iters,
                landmarks=self.landmarks,
                pinv=self.pinv,
            )
        b, h, n, d = query.shape
        index = check_indices(indices, b, n)[:, None, :, None]
        with full_precision(x.device):
            chosen = query.gather(2, index.expand(-1, h, -1, d))
            return weights(chosen, key, None if mask is None else mask[:, None], d**-0.5)

    def _check(self, x: Tensor, attn_mask: Tensor | None) -> Bool[Tensor, "b n"] | None:
        """The mask as bool (b, n); ValueError unless it and x fit."""
        if x.ndim != 3 or x.shape[2] != self.query.in_features:
            raise ValueError(f"x must be (batch, length, {self.query.in_features}): got shape {tuple(x.shape)}")
        b, n, _ = x.shape
        return None if attn_mask is None else key_padding_mask(attn_mask, b, n, n)

    def _heads(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n d"]:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        options = ("kind", "num_landmarks", "num_pinv_iters", "landmarks", "pinv")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in options)
