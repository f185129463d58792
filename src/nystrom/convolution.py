"""Nyströmformer's skip connection: a convolution over the tokens, one filter for each head."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nystrom._cpu import usable

BLOCK = 64  # tokens of one product


class TokenConvolution(nn.Conv2d):
    """Each head's values, smoothed along the tokens by a filter of the head's own; zeros beyond the ends; no bias.

    torch's convolution, but for eager CPU tensors, where the same sum is a product with a banded matrix: for few heads
    that takes an eighth of the time.

    Args:
        num_heads: h (count).
        kernel_size: k, tokens that a filter spans; odd.

    Raises:
        ValueError: an even kernel_size, or one below 1.

    Source: Xiong et al. 2021, arXiv:2102.03902, section 3 and Figure 2, which give no size; the authors' code has 33 to
    65.
    """

    def __init__(self, num_heads: int, kernel_size: int) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size must be odd, so that it has a centre, or None: got {kernel_size}")
        super().__init__(num_heads, num_heads, (kernel_size, 1), padding="same", groups=num_heads, bias=False)

    def forward(self, value: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Smooth. Cost O(b h n k d)."""
        return banded(value, self.weight[:, 0, :, 0]) if usable(value, self.weight) else super().forward(value)


def banded(value: Float[Tensor, "b h n d"], filters: Float[Tensor, "h k"]) -> Float[Tensor, "b h n d"]:
    """The convolution as products: a block of tokens is a banded matrix times the tokens that it reads."""
    (b, h, n, d), k = value.shape, filters.shape[1]
    blocks, reach = -(-n // BLOCK), BLOCK + k - 1
    padded = F.pad(value, (0, 0, k // 2, blocks * BLOCK - n + k // 2))
    read = padded.unfold(2, reach, BLOCK).permute(1, 4, 0, 2, 3).reshape(h, reach, b * blocks * d)
    tap = torch.arange(reach) - torch.arange(BLOCK)[:, None]
    tap = tap.masked_fill((tap < 0) | (tap >= k), k)  # the zero after the last
    matrix = F.pad(filters, (0, 1))[:, tap]  # (h, BLOCK, reach)
    out = torch.bmm(matrix, read).unflatten(2, (b, blocks, d))
    return out.permute(2, 0, 3, 1, 4).reshape(b, h, blocks * BLOCK, d)[:, :, :n]
