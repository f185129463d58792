"""`xformers.components.attention.NystromAttention` of xFormers 0.0.28, which removed it in 0.0.29."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nystrom._validate import key_padding_mask as as_key_mask
from nystrom.convolution import TokenConvolution
from nystrom.functional import nystrom_attention


class NystromAttention(nn.Module):
    """Attention between projected heads, with the original's arguments, call and state dict.

    Without a mask, and with more than num_landmarks keys, equal to the original. Different, on purpose:

    - With at most num_landmarks keys the original ran exact attention instead. Here every length runs the one method,
      whose landmarks are then the tokens themselves: near exact attention, not equal to it. `exact_below` brings the
      original's switch back.
    - With a mask the original averaged masked tokens, as zeros, into the landmarks, attended to the landmarks they
      left empty, and showed them to the skip connection. Here a masked token reaches nothing.

    Args:
        dropout: probability of dropping an output entry.
        num_heads: h (count); the first axis of every input is batch * h.
        num_landmarks: m, landmarks per head (count).
        landmark_pooling: must be None: landmarks are segment means.
        causal: must be False. The original's causal form read the future and only the first m keys.
        use_razavi_pinverse: must be True: the inverse is the iterative one.
        pinverse_original_init: must be False: that start makes an output depend on its batch mates.
        inv_iterations: steps of the inverse iteration (count).
        v_skip_connection: a module from (b, h, n, d) values to what is added to the output.
        conv_kernel_size: tokens that a depthwise convolution over the values spans, as v_skip_connection; odd.
        exact_below: key lengths below this run exact attention; num_landmarks + 1 is the original's behaviour.

    Raises:
        ValueError: an argument that must keep its default; both skip connections; an even conv_kernel_size; a count
            out of range.

    Source: Xiong et al. 2021, arXiv:2102.03902; interface of xFormers 0.0.28.

    >>> import torch
    >>> attention = NystromAttention(dropout=0.1, num_heads=4, num_landmarks=16).eval()
    >>> query, key, value = torch.randn(3, 2 * 4, 100, 32).unbind()
    >>> attention(query, key, value).shape
    torch.Size([8, 100, 32])
    """

    def __init__(
        self,
        dropout: float,
        num_heads: int,
        num_landmarks: int = 64,
        landmark_pooling: nn.Module | None = None,
        causal: bool = False,
        use_razavi_pinverse: bool = True,
        pinverse_original_init: bool = False,
        inv_iterations: int = 6,
        v_skip_connection: nn.Module | None = None,
        conv_kernel_size: int | None = None,
        *,
        exact_below: int = 0,
    ) -> None:
        super().__init__()
        if causal:
            raise ValueError(
                "causal must be False: got True. A landmark averages a whole segment, so it would read the future; use "
                "torch.nn.functional.scaled_dot_product_attention for causal attention"
            )
        for name, count in dict(
            num_heads=num_heads, num_landmarks=num_landmarks, inv_iterations=inv_iterations
        ).items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1: got {count}")
        if exact_below < 0:
            raise ValueError(f"exact_below must be at least 0: got {exact_below}")
        if landmark_pooling is not None:
            raise ValueError(f"landmark_pooling must be None (segment means): got {landmark_pooling}")
        if not use_razavi_pinverse or pinverse_original_init:
            raise ValueError(
                f"use_razavi_pinverse must be True and pinverse_original_init False: got {use_razavi_pinverse} and "
                f"{pinverse_original_init}. The inverse is iterated, from each matrix's own norms"
            )
        if v_skip_connection is not None and conv_kernel_size is not None:
            raise ValueError(f"v_skip_connection must be None with conv_kernel_size={conv_kernel_size}: pass one")
        self.num_heads = num_heads
        self.num_landmarks = num_landmarks
        self.inv_iterations = inv_iterations
        self.exact_below = exact_below
        self.attn_drop = nn.Dropout(dropout)
        self.skip_connection = v_skip_connection
        if conv_kernel_size is not None:
            self.skip_connection = TokenConvolution(num_heads, conv_kernel_size)

    def forward(
        self,
        q: Float[Tensor, "bh n d"],
        k: Float[Tensor, "bh s d"],
        v: Float[Tensor, "bh s v"],
        key_padding_mask: Tensor | None = None,
    ) -> Float[Tensor, "bh n v"]:
        """Attend per head, in time linear in both lengths.

        Args:
            q: queries, (b h, n, d): the heads of a sample follow one another.
            k: keys.
            v: values.
            key_padding_mask: which keys take part: bool (True = takes part, the opposite of
                `torch.nn.MultiheadAttention`) or additive float (0, or <= -1e4 for masked), of shape (b, s) or
                (b h, 1, s). Where n = s it also says which queries enter the landmarks. A finite value such as -1e9,
                which the original took for a real token, is masked here.

        Raises:
            ValueError: an input is not 3-D, or its first axis no multiple of num_heads; shapes disagree; the mask is of
                another shape or holds a bias; a skip connection with n != s.
        """
        self._check_inputs(q, k, v)
        b, h, (n, s) = q.shape[0] // self.num_heads, self.num_heads, (q.shape[1], k.shape[1])
        mask = None if key_padding_mask is None else self._key_mask(key_padding_mask, b, n, s)  # (b h, s)
        query, key, value = (x[:, None] for x in (q, k, v))  # a head is a sample of its own, as masks may differ
        if s < self.exact_below:
            sdpa_mask = None if mask is None else mask[:, None, None, :]
            attended = F.scaled_dot_product_attention(query, key, value, sdpa_mask)
        else:
            m, iters = self.num_landmarks, self.inv_iterations
            attended = nystrom_attention(query, key, value, mask, num_landmarks=m, num_pinv_iters=iters)
        attended = attended[:, 0]
        if self.skip_connection is not None:
            visible = v if mask is None else v.masked_fill(~mask[:, :, None], 0.0)
            attended = attended + self.skip_connection(visible.unflatten(0, (b, h))).flatten(0, 1)
        return self.attn_drop(attended)

    def _check_inputs(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.ndim == 4:
                raise ValueError(
                    f"{name} must be (batch * num_heads, length, width): got shape {tuple(x.shape)}. Given (batch, "
                    f"length, heads, width), xFormers attended over the heads of each token and never across tokens. "
                    f"For attention across tokens pass {name}.transpose(1, 2).flatten(0, 1); to keep what xFormers "
                    f"computed, call torch.nn.functional.scaled_dot_product_attention(q, k, v)"
                )
            if x.ndim != 3 or x.shape[0] % self.num_heads != 0:
                raise ValueError(
                    f"{name} must be (batch * num_heads, length, width) with num_heads = {self.num_heads}: "
                    f"got shape {tuple(x.shape)}"
                )
        if self.skip_connection is not None and q.shape[1] != v.shape[1]:
            raise ValueError(
                f"a skip connection needs as many queries as values: got {q.shape[1]} and {v.shape[1]}; "
                f"leave out conv_kernel_size and v_skip_connection for cross-attention"
            )

    def _key_mask(self, mask: Tensor, b: int, n: int, s: int) -> Bool[Tensor, "bh s"]:
        """Either form of the original's mask as bool (b h, s), True = takes part."""
        h = self.num_heads
        if tuple(mask.shape) not in ((b, s), (b * h, 1, s)):
            raise ValueError(
                f"key_padding_mask must have shape {(b, s)} or {(b * h, 1, s)}: got {tuple(mask.shape)} with "
                f"num_heads = {h}"
            )
        per_head = mask.repeat_interleave(h, dim=0) if mask.ndim == 2 else mask[:, 0]
        try:
            return as_key_mask(per_head, b * h, n, s)
        except ValueError as error:
            raise ValueError(f"key_padding_mask: {error}. Pass it as bool, True = takes part") from None
