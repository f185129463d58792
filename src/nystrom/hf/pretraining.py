"""The model that `nystrom pretrain` trains: masked tokens, and where asked for the order of two sentences."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForPreTraining
from transformers.utils.generic import ModelOutput, can_return_tuple

from nystrom.encoder import activation
from nystrom.hf.base import NystromformerModel, NystromformerPreTrainedModel
from nystrom.hf.configuration import NystromformerConfig
from nystrom.hf.modeling import IGNORED, cross_entropy, first_state


@dataclass
class PreTrainingOutput(ModelOutput):
    """What `NystromformerForPreTraining` returns."""

    loss: Tensor | None = None
    """Mean cross-entropy of the labelled tokens, plus that of the sentence orders (nats)."""
    prediction_logits: Tensor | None = None
    """(b, n, vocab); with labels only the labelled tokens' rows, in order: (labelled tokens, vocab)."""
    sop_logits: Tensor | None = None
    """(b, 2): in order, swapped. None without that head."""
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class NystromformerForPreTraining(NystromformerPreTrainedModel):
    """The head of `NystromformerForMaskedLM`, and unless config.sentence_order is False one that tells whether two
    stretches of a text have been swapped, read off the first real token.

    A folder of it opens as any other model here. As NystromformerForMaskedLM it keeps the first head.
    """

    _tied_weights_keys = {"decoder.weight": "nystromformer.encoder.embeddings.token.weight"}  # noqa: RUF012

    def __init__(self, config: NystromformerConfig) -> None:
        super().__init__(config)
        self.nystromformer = NystromformerModel(config)
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = activation(config.to_encoder().activation)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        if config.sentence_order:
            self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
            self.sentence_order = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b n"] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Int[Tensor, "b n"] | None = None,
        inputs_embeds: Float[Tensor, "b n c"] | None = None,
        labels: Int[Tensor, "b n"] | None = None,
        sentence_order_label: Int[Tensor, " b"] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        attention_queries: Int[Tensor, "..."] | list[int] | None = None,
    ) -> PreTrainingOutput:
        """Score every token of the vocabulary at every place, or with labels only at the labelled ones, which saves
        most of the output layer's cost.

        labels are the ids wanted at each place, -100 where none is; sentence_order_label is 0 = in order, 1 = swapped,
        -100 = not scored. The other arguments are those of `NystromformerModel`.

        Raises:
            ValueError: sentence_order_label for a model without that head.
        """
        if sentence_order_label is not None and not self.config.sentence_order:
            raise ValueError("sentence_order_label must be left out: in this model's config sentence_order is False")
        out = self.nystromformer(
            input_ids, attention_mask, token_type_ids, inputs_embeds,
            output_attentions, output_hidden_states, attention_queries, return_dict=True,
        )  # fmt: skip
        states, losses = out.last_hidden_state, []
        wanted = states if labels is None else states[labels != IGNORED]
        logits = self.decoder(self.norm(self.activation(self.transform(wanted))))
        if labels is not None:
            losses.append(cross_entropy(logits, labels[labels != IGNORED]))
        order = None
        if self.config.sentence_order:
            order = self.sentence_order(torch.tanh(self.pooler(first_state(states, attention_mask))))
            if sentence_order_label is not None:
                losses.append(cross_entropy(order, sentence_order_label))
        return PreTrainingOutput(
            torch.stack(losses).sum() if losses else None, logits, order, out.hidden_states, out.attentions
        )


AutoModelForPreTraining.register(NystromformerConfig, NystromformerForPreTraining, exist_ok=True)
