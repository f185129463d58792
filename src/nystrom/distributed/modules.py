"""Encoders whose sequences are split over ranks: what in them looks beyond a token is told to look beyond the rank."""

from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nystrom.attention import NystromAttention
from nystrom.convolution import TokenConvolution
from nystrom.distributed.exchange import Group, edges, gather, total
from nystrom.distributed.functional import sequence_parallel_nystrom_attention
from nystrom.distributed.spectral import sequence_parallel_spectral_shift_attention
from nystrom.encoder import Block, Embeddings, MaskedLM, MaskedLMOutput, SequenceClassifier

Model = TypeVar("Model", bound=nn.Module)

KINDS = {"nystrom": sequence_parallel_nystrom_attention, "shift": sequence_parallel_spectral_shift_attention}


def split_sequence(model: Model, group: Group = None) -> Model:
    """Let an encoder run on stretches: from now on each rank gives it its own part of input_ids and masks.

    The ranks hold the tokens in their order, a stretch each, of any lengths. Parameters, their names and the state dict
    stay as they are. The states and the scores of tokens are those of the tokens given; what is pooled is the same on
    all ranks. The mean over the ranks of their losses is the loss of the whole batch, so that parameters get the right
    gradients from `torch.nn.parallel.DistributedDataParallel`, or whatever else averages them over the ranks. Dropout
    draws on each rank's own generator: give the ranks different seeds.

    Args:
        model: with an `Encoder`, a `MaskedLM`, a `SequenceClassifier` or `NystromAttention` anywhere in it; changed in
            place. It cannot be copied by `copy.deepcopy` or pickled afterwards, but for its state dict.
        group: the ranks that share each sequence; None: all ranks.

    Returns:
        The model.

    Raises:
        ValueError: nothing in it attends as `NystromAttention`; its attention cannot be split: kinds "softmax" and
            "residual", and landmarks other than segment means; it went through `stream_blocks`.
    """
    attentions = [module for module in model.modules() if isinstance(module, NystromAttention)]
    if not attentions:
        raise ValueError(f"no NystromAttention in the model, so nothing to split: got {type(model).__name__}")
    if any(base.__name__ == "PreTrainedModel" for module in model.modules() for base in type(module).__mro__):
        raise ValueError(
            "a transformers model is for nystrom.hf.spread.spread_sequence, which gives its head the states of all "
            f"tokens: got {type(model).__name__}"
        )
    if any(isinstance(module, Block) and "forward" in vars(module) for module in model.modules()):
        raise ValueError("the model's blocks are streamed already; they cannot be split over ranks as well")
    for attention in attentions:
        _check(attention)
    for module in model.modules():
        for kind, name, instead in INSTEAD:
            if isinstance(module, kind):
                setattr(module, name, partial(instead, module, group))
    return model


def sequence_parallel_convolution(
    value: Float[Tensor, "b h n d"], conv: TokenConvolution, group: Group = None
) -> Float[Tensor, "b h n d"]:
    """The convolution skip over a sequence of which this rank holds a stretch, and the other ranks the rest.

    A rank sends its first and last k // 2 tokens: O(k d) numbers for each head, sample and rank. Where value is zero
    for masked tokens the result is that of one process, whatever the lengths.

    Args:
        value: of this rank's tokens.
        conv: of k tokens; the same on all ranks.
        group: the ranks that share the sequence; None: all ranks.
    """
    reach = conv.kernel_size[0] // 2
    before, after = edges(value, reach, _lengths(value, 2, group), group)
    return conv(torch.cat([before, value, after], 2))[:, :, reach : reach + value.shape[2]]


def _check(attention: NystromAttention) -> None:
    if attention.kind == "residual":
        raise ValueError(
            "kind 'residual' cannot be split over ranks: it picks single keys for each block of queries from all keys, "
            "so what ranks send would grow with the length; use kind 'nystrom' or 'shift'"
        )
    if attention.kind not in KINDS:
        raise ValueError(
            f"kind must be one of {', '.join(KINDS)} to be split over ranks: got {attention.kind!r}; for exact "
            "attention see torch.distributed.tensor.experimental.context_parallel"
        )
    if attention.landmarks != "segment_means":
        raise ValueError(f"landmarks must be segment_means to be split over ranks: got {attention.landmarks!r}")


def _attend(
    self: NystromAttention, group: Group, x: Float[Tensor, "b n c"], attn_mask: Tensor | None = None
) -> Float[Tensor, "b n c"]:
    """`NystromAttention.forward`."""
    mask = self._check(x, attn_mask)
    query, key, value = (self._heads(project(x)) for project in (self.query, self.key, self.value))
    attended = KINDS[self.kind](
        query,
        key,
        value,
        mask,
        self.dropout if self.training else 0.0,
        group=group,
        num_landmarks=self.num_landmarks,
        num_pinv_iters=self.num_pinv_iters,
        pinv=self.pinv,
    )
    if self.conv is not None:
        visible = value if mask is None else value.masked_fill(~mask[:, None, :, None], 0.0)
        attended = attended + sequence_parallel_convolution(visible, self.conv, group)
    return self.out(attended.transpose(1, 2).flatten(2))


def _of_vectors(
    self: Embeddings, group: Group, x: Float[Tensor, "b n c"], token_type_ids: Int[Tensor, "b n"] | None = None
) -> Float[Tensor, "b n c"]:
    """`Embeddings.of_vectors`."""
    return Embeddings.of_vectors(self, x, token_type_ids, first=sum(_lengths(x, 1, group)[: dist.get_rank(group)]))


def _masked_lm(
    self: MaskedLM,
    group: Group,
    input_ids: Int[Tensor, "b n"],
    attn_mask: Tensor | None = None,
    labels: Int[Tensor, "b n"] | None = None,
) -> MaskedLMOutput:
    """`MaskedLM.forward`."""
    out = MaskedLM.forward(self, input_ids, attn_mask, labels)
    if labels is None or out.loss is None:
        return out
    counts = gather((labels != -100).sum(), group).to(out.loss.dtype)
    part = counts[dist.get_rank(group)] * len(counts) / counts.sum().clamp_min(1)
    return out._replace(loss=out.loss * part)


def _pool(
    self: SequenceClassifier, group: Group, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"]
) -> Float[Tensor, "b c"]:
    """`SequenceClassifier.pool`."""
    counts = gather(mask.sum(1), group).to(torch.promote_types(x.dtype, torch.float32))  # (ranks, b)
    own = SequenceClassifier.pool(self, x, mask)
    rank = dist.get_rank(group)
    if self.pooling == "mean":
        part = counts[rank] / counts.sum(0).clamp_min(1)
    else:  # the first rank with a valid token, or the first of all
        part = (counts > 0).int().argmax(0) == rank
    return total(own * part.to(own.dtype)[:, None], group)


def _rows(self: NystromAttention, group: Group, *_: object, **__: object) -> Tensor:
    raise ValueError(
        f"an encoder that is split over ranks cannot show attention rows: this rank holds a part of one of "
        f"{dist.get_world_size(group)}; load its state dict into a model that is not"
    )


def _lengths(x: Tensor, axis: int, group: Group) -> list[int]:
    return gather(torch.tensor(x.shape[axis], device=x.device), group).tolist()


INSTEAD = [
    (NystromAttention, "forward", _attend),
    (NystromAttention, "rows", _rows),
    (Embeddings, "of_vectors", _of_vectors),
    (MaskedLM, "forward", _masked_lm),
    (SequenceClassifier, "pool", _pool),
]
"""Of which modules which method becomes what."""
