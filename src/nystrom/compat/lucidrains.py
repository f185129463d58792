"""`NystromAttention` of the package nystrom-attention 0.0.14 (github.com/lucidrains/nystrom-attention)."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from nystrom._precision import full_precision
from nystrom._validate import check_token_mask
from nystrom.convolution import TokenConvolution
from nystrom.functional import nystrom_attention
from nystrom.maps import attention_factors

EPS = 1e-8  # the original's default


class NystromAttention(nn.Module):
    """Self-attention with the original's arguments, call, initialisation and state dict.

    Equal to the original where n is a multiple of num_landmarks and its inverse iteration starts or ends as ours.
    Different, on purpose, in three places:

    - The original pads other lengths with zeros on the left and, without a mask, attends to them. Here segments are
      uneven instead, so weights trained on such lengths see other (and fewer) landmarks than they did.
    - With a mask it cuts segments by position; here they hold equal shares of each sample's valid tokens.
    - Its inverse starts from the largest column sum of the whole batch; here from each matrix's own, so that no output
      depends on batch mates.

    Args:
        dim: c, width of the model.
        dim_head: d, width of a head; heads * dim_head may differ from dim.
        heads: h (count).
        num_landmarks: m, landmarks per head (count).
        pinv_iterations: steps of the inverse iteration (count).
        residual: whether to add a depthwise convolution over the values.
        residual_conv_kernel: tokens that the convolution spans; odd.
        eps: must be 1e-8. The original adds it to the token count of a masked segment; here the count is exact.
        dropout: probability of dropping an output, after the last projection.

    Raises:
        ValueError: a count below 1; an even residual_conv_kernel; another eps; dropout outside [0, 1].

    Source: Xiong et al. 2021, arXiv:2102.03902; interface of nystrom-attention 0.0.14.

    >>> import torch
    >>> attention = NystromAttention(dim=64, dim_head=8, heads=8, num_landmarks=32)  # TransMIL's shape
    >>> attention(torch.randn(1, 1001, 64)).shape
    torch.Size([1, 1001, 64])
    """

    def __init__(
        self,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        num_landmarks: int = 256,
        pinv_iterations: int = 6,
        residual: bool = True,
        residual_conv_kernel: int = 33,
        eps: float = EPS,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        counts = dict(dim=dim, dim_head=dim_head, heads=heads, num_landmarks=num_landmarks)
        for name, count in (counts | dict(pinv_iterations=pinv_iterations)).items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1: got {count}")
        if residual and (residual_conv_kernel < 1 or residual_conv_kernel % 2 == 0):
            raise ValueError(f"residual_conv_kernel must be odd, so that it has a centre: got {residual_conv_kernel}")
        if eps != EPS:
            raise ValueError(f"eps must be {EPS:g}: got {eps:g}; segment means divide by exact counts, so leave it out")
        self.heads = heads
        self.num_landmarks = num_landmarks
        self.pinv_iterations = pinv_iterations
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))
        self.residual = residual
        if residual:
            self.res_conv = TokenConvolution(heads, residual_conv_kernel)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        mask: Bool[Tensor, "b n"] | None = None,
        return_attn: bool = False,
        return_attn_matrices: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Attend within each sample, in time linear in n.

        Args:
            x: token states.
            mask: True = real token. Padding that is finite reaches no valid output, through the convolution included;
                the outputs at padded tokens mean nothing.
            return_attn: also return the approximate matrix, (b, h, n, n), without the convolution. Rows and columns
                are x's tokens at any n; the original returned them shifted by its padding. Takes O(b h n²) memory.
            return_attn_matrices: also return its three factors, (b, h, n, m), (b, h, m, m) and (b, h, m, n).

        Returns:
            The output, (b, n, c); with either flag, a pair of it and what was asked for.

        Raises:
            ValueError: x is not (b, n, c); mask is not bool (b, n); both flags.
        """
        if x.ndim != 3 or x.shape[2] != self.to_qkv.in_features:
            raise ValueError(f"x must be (batch, length, {self.to_qkv.in_features}): got shape {tuple(x.shape)}")
        if return_attn and return_attn_matrices:
            raise ValueError("return_attn and return_attn_matrices must not both be set: got True and True")
        if mask is not None:
            check_token_mask("mask", mask, *x.shape[:2])
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.to_qkv(x).chunk(3, dim=-1)
        )  # (b, h, n, d)
        m, iters = self.num_landmarks, self.pinv_iterations
        attended = nystrom_attention(query, key, value, mask, num_landmarks=m, num_pinv_iters=iters)
        if self.residual:
            visible = value if mask is None else value.masked_fill(~mask[:, None, :, None], 0.0)
            attended = attended + self.res_conv(visible)
        output = self.to_out(attended.transpose(1, 2).flatten(2))
        if not return_attn and not return_attn_matrices:
            return output
        left, core_pinv, right = attention_factors(query, key, mask, num_landmarks=m, num_pinv_iters=iters)
        if return_attn_matrices:
            return output, (left, core_pinv, right)
        with full_precision(x.device):
            return output, left @ core_pinv @ right
