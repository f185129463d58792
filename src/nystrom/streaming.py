"""An encoder's blocks, chunk by chunk: memory for little more than a block's input and output, a million tokens long.

Of the whole sequence landmark attention needs only what is as long as the landmarks, so three passes over chunks do:

    1. each chunk adds its part to the segment sums            -> Q~, K~, A⁺
    2. the landmarks read each chunk, and merge what they read -> B V
    3. each chunk reads the landmarks, its neighbours by the convolution, and goes through the rest of the block

Nothing of a chunk is kept for the backward pass, which makes it again.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import TypeVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nystrom._precision import full_precision
from nystrom._stream import read
from nystrom._stretches import Split, means, segment_sums, unmasked
from nystrom.attention import NystromAttention
from nystrom.encoder import Block
from nystrom.functional import Summary, attend, core, inverse_of

Model = TypeVar("Model", bound=nn.Module)
Mask = Bool[Tensor, "b _"] | None


def stream_blocks(model: Model, chunk: int = 16384) -> Model:
    """Let every `Block` in a model work on so many tokens at a time, forward and backward.

    Outputs and gradients stay the same up to rounding. Time O(n) as before, but more of it: projections are
    made twice, and once more in the backward pass. Memory beyond a block's input, output and their gradients is that of
    a chunk. Parameters, their names and the state dict stay as they are.

    Args:
        model: with `Block`s in it, such as an `Encoder` or a `MaskedLM`; changed in place.
        chunk: tokens at a time (count), at least the width of the convolution.

    Returns:
        The model.

    Raises:
        ValueError: no `Block` in the model; chunk below 1, or below the convolution's width; a kind of attention other
            than "nystrom", or landmarks other than segment means; the model went through `split_sequence`.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if not blocks:
        raise ValueError(f"no Block in the model, so nothing to stream: got {type(model).__name__}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1: got {chunk}")
    for block in blocks:
        attention = block.attention
        if "forward" in vars(attention):
            raise ValueError("the model's sequence is split over ranks already; it cannot be streamed as well")
        if attention.kind != "nystrom" or attention.landmarks != "segment_means":
            raise ValueError(
                "only kind 'nystrom' with landmarks 'segment_means' can be streamed: "
                f"got {attention.kind!r} and {attention.landmarks!r}"
            )
        if attention.conv is not None and chunk < attention.conv.kernel_size[0]:
            raise ValueError(
                f"chunk must be at least the convolution's width: got {chunk} and {attention.conv.kernel_size[0]}"
            )
    for block in blocks:
        block.forward = partial(_forward, block, chunk)
    return model


def _forward(
    self: Block, chunk: int, x: Float[Tensor, "b n c"], attn_mask: Tensor | None = None
) -> Float[Tensor, "b n c"]:
    """`Block.forward`."""
    mask = self.attention._check(x, attn_mask)
    parts = x.split(chunk, 1)
    masks: Sequence[Mask] = [None] * len(parts) if mask is None else mask.split(chunk, 1)
    splits = _splits(parts, masks)
    m = min(self.attention.num_landmarks, x.shape[1])
    again = partial(checkpoint, use_reentrant=False)
    sums = [again(_segment_sums, self, part, split, m) for part, split in zip(parts, splits, strict=True)]
    at = _summarise(torch.stack(sums).sum(0), splits[0], m)
    found = [again(_read, self, at, part, mask) for part, mask in zip(parts, masks, strict=True)]
    landmark_value = _landmark_value(self.attention, at, found)
    parts, masks = [None, *parts, None], [None, *masks, None]
    return torch.cat(
        [again(_finish, self, at, landmark_value, parts[i : i + 3], masks[i : i + 3]) for i in range(len(splits))], 1
    )


def _splits(parts: Sequence[Tensor], masks: Sequence[Mask]) -> list[Split]:
    """Where each chunk's valid tokens stand."""
    if masks[0] is None:
        ends = list(accumulate(part.shape[1] for part in parts))
        starts = [0, *ends[:-1]]
        return [unmasked(start, ends[-1], parts[0].device) for start in starts]
    counts = torch.stack([cast(Tensor, mask).sum(1, keepdim=True) for mask in masks])  # (chunks, b, 1)
    before, num_valid = counts.cumsum(0) - counts, counts.sum(0)
    return [Split(mask, own, num_valid, None) for mask, own in zip(masks, before, strict=True)]


def _segment_sums(self: Block, x: Float[Tensor, "b n c"], split: Split, m: int) -> Float[Tensor, "two b h m d"]:
    """What a chunk adds to the segment sums of the queries and of the keys."""
    attention, x = self.attention, self.before_attention(x)
    query, key = attention._heads(attention.query(x)), attention._heads(attention.key(x))
    with full_precision(x.device):
        return torch.stack([segment_sums(tokens, split, m)[1] for tokens in (query, key)])


def _summarise(sums: Float[Tensor, "two b h m d"], split: Split, m: int) -> Summary:
    """The landmarks; of single tokens the rest of the block asks elsewhere."""
    (query, exists), (key, _) = (means(one, split, m) for one in sums)
    return Summary(query, key, None, query, key, exists, exists, query.shape[3] ** -0.5)


def _read(
    self: Block, at: Summary, x: Float[Tensor, "b n c"], mask: Mask
) -> tuple[Float[Tensor, "b h m d"], Float[Tensor, "b h m"]]:
    """What the landmarks read in a chunk, and how much they found there."""
    attention, x = self.attention, self.before_attention(x)
    key, value = attention._heads(attention.key(x)), attention._heads(attention.value(x))
    with full_precision(x.device):
        wide = at.query_landmarks.dtype
        return read(at.query_landmarks, key.to(wide), value.to(wide), mask, at.scale)


def _landmark_value(self: NystromAttention, at: Summary, found: list[tuple[Tensor, Tensor]]) -> Tensor:
    """``A⁺ (B V)`` (eq 13)."""
    outs, log_masses = (torch.stack(every) for every in zip(*found, strict=True))  # (chunks, b, h, m, d)
    with full_precision(outs.device):
        part = log_masses.clamp_min(torch.finfo(outs.dtype).min).softmax(0)  # finite, as a sample may have no token
        return inverse_of(self.pinv, self.num_pinv_iters)(core(at)).to(outs.dtype) @ (part[..., None] * outs).sum(0)


def _finish(
    self: Block,
    at: Summary,
    landmark_value: Float[Tensor, "b h m d"],
    parts: Sequence[Float[Tensor, "b _ c"] | None],
    masks: Sequence[Mask],
) -> Float[Tensor, "b _ c"]:
    """A chunk, given with the chunk before it and the one after, through the block."""
    attention, own = self.attention, cast(Tensor, parts[1])
    reach = 0 if attention.conv is None else attention.conv.kernel_size[0] // 2
    edges = slice(-reach, None) if reach else slice(0), slice(None), slice(reach)
    near = [part[:, edge] for part, edge in zip(parts, edges, strict=True) if part is not None]
    seen = [mask[:, edge] for mask, edge in zip(masks, edges, strict=True) if mask is not None]
    start = 0 if parts[0] is None else reach
    here = slice(start, start + own.shape[1])
    x = self.before_attention(torch.cat(near, 1))
    query, value = attention._heads(attention.query(x[:, here])), attention._heads(attention.value(x))
    dropout_p = attention.dropout if attention.training else 0.0
    with full_precision(x.device):
        out = attend(query, at.key_landmarks, landmark_value, at.key_exists, at.scale, dropout_p).to(query.dtype)
    if attention.conv is not None:
        visible = value.masked_fill(~torch.cat(seen, 1)[:, None, :, None], 0.0) if seen else value
        out = out + attention.conv(visible)[:, :, here]
    return self.after_attention(own, attention.out(out.transpose(1, 2).flatten(2)))
