"""Our Nyströmformer with the usual heads. Importing this file tells transformers' Auto classes of them all."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
)
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from nystrom.encoder import activation
from nystrom.hf.base import NystromformerModel as NystromformerModel
from nystrom.hf.base import NystromformerPreTrainedModel, first_token, key_mask
from nystrom.hf.configuration import NystromformerConfig as NystromformerConfig

IGNORED = -100


class NystromformerForMaskedLM(NystromformerPreTrainedModel):
    """Scores every token of the vocabulary at every place; the output layer is the token embeddings."""

    _tied_weights_keys = {"decoder.weight": "nystromformer.encoder.embeddings.token.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^pooler\.", r"^sentence_order\."]  # noqa: RUF012  # of ForPreTraining

    def __init__(self, config: NystromformerConfig) -> None:
        super().__init__(config)
        self.nystromformer = NystromformerModel(config)
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = activation(config.to_encoder().activation)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        attention_queries: Int[Tensor, "..."] | list[int] | None = None,
    ) -> MaskedLMOutput:
        """Logits (b, n, vocab); labels -100 are not scored. The other arguments are those of `NystromformerModel`."""
        out = self.nystromformer(
            input_ids, attention_mask, token_type_ids, inputs_embeds,
            output_attentions, output_hidden_states, attention_queries, return_dict=True,
        )  # fmt: skip
        logits = self.decoder(self.norm(self.activation(self.transform(out.last_hidden_state))))
        loss = None if labels is None else cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss, logits, out.hidden_states, out.attentions)


class NystromformerForSequenceClassification(NystromformerPreTrainedModel):
    """Classes, or numbers, for a whole input, read off its first real token."""

    def __init__(self, config: NystromformerConfig) -> None:
        super().__init__(config)
        self.nystromformer = NystromformerModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = activation(config.to_encoder().activation)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels or 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b n"] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Int[Tensor, "b n"] | None = None,
        inputs_embeds: Float[Tensor, "b n c"] | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        attention_queries: Int[Tensor, "..."] | list[int] | None = None,
    ) -> SequenceClassifierOutput:
        """Logits (b, num_labels). Labels: a class each (b,), numbers, or 0 and 1 for each class (b, num_labels), as
        config.problem_type says, or where it is None the number of labels and their dtype.
        """
        out = self.nystromformer(
            input_ids, attention_mask, token_type_ids, inputs_embeds,
            output_attentions, output_hidden_states, attention_queries, return_dict=True,
        )  # fmt: skip
        x = self.dense(self.dropout(first_state(out.last_hidden_state, attention_mask)))
        logits = self.out_proj(self.dropout(self.activation(x)))
        loss = None if labels is None else self._loss(logits, labels)
        return SequenceClassifierOutput(loss, logits, out.hidden_states, out.attentions)

    def _loss(self, logits: Float[Tensor, "b classes"], labels: Tensor) -> Float[Tensor, ""]:
        problem = self.config.problem_type
        if problem is None:
            several = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
            problem = "regression" if logits.shape[1] == 1 else several
        if problem == "single_label_classification":
            return cross_entropy(logits, labels.flatten())
        loss = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
        logits = _wide(logits)
        return loss(logits, labels.view_as(logits).to(logits.dtype))


class NystromformerForTokenClassification(NystromformerPreTrainedModel):
    """A class for every token."""

    def __init__(self, config: NystromformerConfig) -> None:
        super().__init__(config)
        self.nystromformer = NystromformerModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b n"] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Int[Tensor, "b n"] | None = None,
        inputs_embeds: Float[Tensor, "b n c"] | None = None,
        labels: Int[Tensor, "b n"] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        attention_queries: Int[Tensor, "..."] | list[int] | None = None,
    ) -> TokenClassifierOutput:
        """Logits (b, n, num_labels); labels -100 are not scored."""
        out = self.nystromformer(
            input_ids, attention_mask, token_type_ids, inputs_embeds,
            output_attentions, output_hidden_states, attention_queries, return_dict=True,
        )  # fmt: skip
        logits = self.classifier(self.dropout(out.last_hidden_state))
        loss = None if labels is None else cross_entropy(logits.flatten(0, 1), labels.flatten())
        return TokenClassifierOutput(loss, logits, out.hidden_states, out.attentions)


class NystromformerForQuestionAnswering(NystromformerPreTrainedModel):
    """The first and the last token of an answer within the input."""

    def __init__(self, config: NystromformerConfig) -> None:
        super().__init__(config)
        self.nystromformer = NystromformerModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b n"] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Int[Tensor, "b n"] | None = None,
        inputs_embeds: Float[Tensor, "b n c"] | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        attention_queries: Int[Tensor, "..."] | list[int] | None = None,
    ) -> QuestionAnsweringModelOutput:
        """Logits (b, n) of the start and of the end, the lowest number at padding. Positions that lie outside of the
        input are not scored.
        """
        out = self.nystromformer(
            input_ids, attention_mask, token_type_ids, inputs_embeds,
            output_attentions, output_hidden_states, attention_queries, return_dict=True,
        )  # fmt: skip
        logits = self.qa_outputs(out.last_hidden_state)  # (b, n, 2)
        b, n, _ = logits.shape
        mask = key_mask(attention_mask, b, n)
        if mask is not None:  # no answer starts there, and what these states hold must not reach the loss
            logits = logits.masked_fill(~mask[..., None], torch.finfo(logits.dtype).min)
        start, end = logits.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            places = torch.stack([start_positions.view(b), end_positions.view(b)])
            places = places.masked_fill((places < 0) | (places >= n), IGNORED)
            loss = (cross_entropy(start, places[0]) + cross_entropy(end, places[1])) / 2
        return QuestionAnsweringModelOutput(loss, start, end, out.hidden_states, out.attentions)


class NystromformerForMultipleChoice(NystromformerPreTrainedModel):
    """Which of several inputs is right, each read off its first real token."""

    def __init__(self, config: NystromformerConfig) -> None:
        super().__init__(config)
        self.nystromformer = NystromformerModel(config)
        self.pre_classifier = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b choices n"] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Int[Tensor, "b choices n"] | None = None,
        inputs_embeds: Float[Tensor, "b choices n c"] | None = None,
        labels: Int[Tensor, " b"] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        attention_queries: Int[Tensor, "..."] | list[int] | None = None,
    ) -> MultipleChoiceModelOutput:
        """Logits (b, choices). attention_mask is (b, choices, n); hidden states and rows are of b * choices samples."""
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("give either input_ids or inputs_embeds: got neither")
        choices = given.shape[1]
        input_ids, mask, token_type_ids, inputs_embeds = (
            None if x is None else x.flatten(0, 1) for x in (input_ids, attention_mask, token_type_ids, inputs_embeds)
        )
        out = self.nystromformer(
            input_ids, mask, token_type_ids, inputs_embeds,
            output_attentions, output_hidden_states, attention_queries, return_dict=True,
        )  # fmt: skip
        x = F.relu(self.pre_classifier(first_state(out.last_hidden_state, mask)))
        logits = self.classifier(x).view(-1, choices)
        loss = None if labels is None else cross_entropy(logits, labels)
        return MultipleChoiceModelOutput(loss, logits, out.hidden_states, out.attentions)


def first_state(x: Float[Tensor, "b n c"], attention_mask: Tensor | None) -> Float[Tensor, "b c"]:
    """The state of each sample's first real token."""
    mask: Bool[Tensor, "b n"] | None = key_mask(attention_mask, *x.shape[:2])
    return x[torch.arange(len(x), device=x.device), first_token(mask, x)]


def cross_entropy(logits: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> Float[Tensor, ""]:
    """Mean over the rows that have a label (nats), 0 if none has."""
    total = F.cross_entropy(_wide(logits), labels.long(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp_min(1)


def _wide(logits: Tensor) -> Tensor:
    """In float32 or wider: a sum over many tokens overflows in half precision."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


AutoConfig.register("nystrom", NystromformerConfig)
for auto, model in (
    (AutoModel, NystromformerModel),
    (AutoModelForTextEncoding, NystromformerModel),
    (AutoModelForMaskedLM, NystromformerForMaskedLM),
    (AutoModelForSequenceClassification, NystromformerForSequenceClassification),
    (AutoModelForTokenClassification, NystromformerForTokenClassification),
    (AutoModelForQuestionAnswering, NystromformerForQuestionAnswering),
    (AutoModelForMultipleChoice, NystromformerForMultipleChoice),
):
    # exist_ok because transformers compares the names of config classes here; its own of this name keeps its models.
    auto.register(NystromformerConfig, model, exist_ok=True)
