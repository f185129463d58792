"""Our transformers models on several processes: each is given whole inputs, and computes the states of a stretch."""

from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple

from nystrom.distributed import split_sequence
from nystrom.distributed.exchange import Group, joined
from nystrom.hf.base import NystromformerModel, NystromformerPreTrainedModel, key_mask

Model = TypeVar("Model", bound=NystromformerPreTrainedModel)


def spread_sequence(model: Model, group: Group = None) -> Model:
    """Let ranks share each input of a model: all call it with the same whole inputs, and get the same whole outputs.

    Each computes embeddings and blocks for its own stretch of the tokens, as `nystrom.distributed.split_sequence` has
    it, and the states of the last block are exchanged for the head: of what grows with the length a rank holds its
    part, but for those states and what the head makes of them. For these, ranks send O(b n c) numbers forward and again
    backward, once for the whole model; a block sends what its landmarks need, whatever the length.

    The mean over the ranks of their gradients is the gradient of the loss, as DistributedDataParallel takes it.

    Args:
        model: any model of `nystrom.hf`, of attention "nystrom" or "shift"; changed in place. Parameters, their names
            and what `save_pretrained` writes stay as they are.
        group: the ranks that share each input; None: all ranks.

    Returns:
        The model. Attention rows can no longer be asked for.

    Raises:
        ValueError: as `split_sequence`.
    """
    base = model.base_model
    assert isinstance(base, NystromformerModel)
    split_sequence(base.encoder, group)
    base.forward = partial(_forward, base, group)  # pyright: ignore[reportAttributeAccessIssue]
    return model


@can_return_tuple
def _forward(
    self: NystromformerModel,
    group: Group,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    attention_queries: Tensor | list[int] | None = None,
) -> BaseModelOutput:
    """`NystromformerModel.forward`."""
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("give either input_ids or inputs_embeds: got neither")
    b, n = given.shape[:2]
    self._check_length(n)
    mask, ranks = key_mask(attention_mask, b, n), dist.get_world_size(group)
    if n < ranks and mask is None:
        mask = torch.ones(b, n, dtype=torch.bool, device=given.device)
    lengths = [len(part) for part in torch.arange(max(n, ranks)).tensor_split(ranks)]
    ids, mask, types, vectors = (
        None if x is None else _padded(x, ranks).split(lengths, 1)[dist.get_rank(group)]
        for x in (input_ids, mask, token_type_ids, inputs_embeds)
    )
    out = cast(Any, NystromformerModel.forward)(
        self, ids, mask, types, vectors,
        output_attentions, output_hidden_states, attention_queries, return_dict=True,
    )  # fmt: skip
    states = None
    if out.hidden_states is not None:
        states = tuple(joined(x, lengths, group)[:, :n] for x in out.hidden_states)
    return BaseModelOutput(joined(out.last_hidden_state, lengths, group)[:, :n], states, out.attentions)


def _padded(x: Tensor, least: int) -> Tensor:
    """With zeros behind it where it is too short for each rank to get a token."""
    missing = least - x.shape[1]
    return x if missing <= 0 else torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], 1)
