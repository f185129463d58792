"""Our Nyströmformer without a head, as a transformers model around `nystrom.Encoder`, and what all its heads share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple

from nystrom._validate import key_padding_mask, known_false
from nystrom.encoder import Block, Encoder
from nystrom.hf import folders
from nystrom.hf.configuration import Attention, NystromformerConfig
from nystrom.hf.positions import How, extended
from nystrom.hf.settings import ATTENTIONS

Model = TypeVar("Model", bound="NystromformerPreTrainedModel")


class NystromformerPreTrainedModel(PreTrainedModel):
    """What every model here can do: read and write folders of transformers' own Nyströmformer, and grow longer."""

    config_class = NystromformerConfig
    config: NystromformerConfig
    base_model_prefix = "nystromformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "Embeddings"]  # noqa: RUF012

    def __init__(self, config: NystromformerConfig) -> None:
        if config._attn_implementation in ATTENTIONS:
            raise ValueError(
                f"{type(self).__name__} makes its attention itself: got attn_implementation = "
                f"{config._attn_implementation!r}; attention in its config chooses"
            )
        super().__init__(config)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return False  # transformers guesses, and wrongly

    @classmethod
    def from_transformers(
        cls: type[Model],
        folder: str | Path,
        attention: Attention,
        *,
        new_head: bool = False,
        allow_pickle: bool = False,
        **options: Any,
    ) -> Model:
        """Read a folder that transformers' own Nyströmformer saved, in eval mode and in the file's dtype.

        Args:
            folder: with config.json and model.safetensors.
            attention: "exact" gives that model's numbers: the published checkpoints, where segment_means_seq_len is
                num_landmarks, were trained with exact attention. "nystrom", "shift" and "residual" cost less and
                approximate it.
            new_head: keep the encoder only, for instance of a masked language model that is to become a classifier; the
                head of this class starts untrained.
            allow_pickle: read pytorch_model.bin where there is no model.safetensors, with weights_only=True.
            options: fields of `NystromformerConfig` to change, for instance num_labels.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: it is another model's folder; a tensor is missing, left over or of another shape.

        Source of the format: transformers 5.23, models/nystromformer.
        """
        folder = Path(folder)
        config = folders.read_config(folder, {**options, "attention": attention})
        tensors = folders.read_tensors(folder, allow_pickle)
        model = cls(config)
        prefix = "" if cls is NystromformerModel else "nystromformer."
        if new_head:  # a file of a model without a head has no prefix
            bare = {name.removeprefix("nystromformer."): tensor for name, tensor in tensors.items()}
            tensors = {prefix + name: tensor for name, tensor in bare.items() if name.startswith("encoder.")}
        model._load(tensors, folder, new_head)
        return model.eval()

    def _load(self, tensors: dict[str, Tensor], folder: Path, new_head: bool) -> None:
        """Take the tensors over; ValueError unless they are this model's, or with new_head its encoder's."""
        own = dict(self.named_parameters())  # without the output layer, which is the token embeddings
        needed = {name for name in own if not new_head or name.removeprefix("nystromformer.").startswith("encoder.")}
        missing, left_over = sorted(needed - tensors.keys()), sorted(tensors.keys() - own.keys())
        if missing or left_over:
            hint = "" if new_head else "; new_head=True keeps the encoder and starts a new head"
            raise ValueError(
                f"{folder}: not the tensors of a {type(self).__name__}: {_some('missing', missing)}, "
                f"{_some('left over', left_over)}{hint}"
            )
        wrong = [name for name, tensor in tensors.items() if tensor.shape != own[name].shape]
        if wrong:
            name = wrong[0]
            raise ValueError(
                f"{folder}: {len(wrong)} tensors are not of the shape in config.json, the first {name}: got "
                f"{tuple(tensors[name].shape)}, needed {tuple(own[name].shape)}"
            )
        dtypes = {tensor.dtype for tensor in tensors.values()}
        if len(dtypes) == 1:
            (self.config.dtype,) = dtypes
            self.to(self.config.dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
        self.load_state_dict(tensors, strict=False)  # what may be missing was settled above

    def save_transformers(self, folder: str | Path, *, length: int | None = None) -> None:
        """Write a folder that transformers' own Nyströmformer reads; `save_pretrained` writes one for ours.

        Its model with these weights runs exact attention at any length, whatever runs here: the only attention of its
        own that takes padding and more than one length. The two differ on padded batches all the same, as its
        convolution reads the padding.

        Args:
            folder: new or empty; written as a whole or not at all.
            length: let it run its own Nyström attention instead, which takes this one length (tokens) only: a multiple
                of num_landmarks.

        Raises:
            FileExistsError: the folder is not empty.
            ValueError: transformers has no such model (no convolution; untied output layer); length is no
                such multiple.
        """
        folders.write(self, self.config, Path(folder), length)

    def extend_positions(self: Model, length: int, how: How = "tile") -> Model:
        """Let this model read longer inputs, in place, without training: its learnt positions are made more.

        Args:
            length: tokens to read (count).
            how: "tile" repeats the positions, as the 512-token checkpoint became the 4096-token one before it was
                trained on; "interpolate" puts new ones between them.

        Returns:
            The model itself. An optimiser made before must be made anew.

        Raises:
            ValueError: length is below what the model reads already; an unknown `how`.
        """
        model = self.base_model
        assert isinstance(model, NystromformerModel)
        embeddings = model.encoder.embeddings
        embeddings.position = extended(embeddings.position, embeddings.position_offset, length, how)
        self.config.max_position_embeddings = length
        return self

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):  # transformers' start is so small that it hardly learns in a short run
            module.reset_parameters()

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers must be 1: got {every_n_layers}; all blocks are checkpointed or none")
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)


class NystromformerModel(NystromformerPreTrainedModel):
    """The encoder: token ids to token states, at a cost that grows linearly with the length."""

    def __init__(self, config: NystromformerConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config.to_encoder())
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.embeddings.token

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.encoder.embeddings.token = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b n"] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Int[Tensor, "b n"] | None = None,
        inputs_embeds: Float[Tensor, "b n c"] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        attention_queries: Int[Tensor, "..."] | list[int] | None = None,
    ) -> BaseModelOutput:
        """Encode.

        Args:
            input_ids: token ids.
            attention_mask: 1 or True = real token, (b, n). States at other tokens mean nothing.
            token_type_ids: the segment of each token; default 0.
            inputs_embeds: vectors in place of the ids' embeddings.
            output_attentions: return attention rows, (b, h, rows, n) for each block: what the chosen tokens read of
                every token. The matrix of all rows is what this model never makes.
            output_hidden_states: return the states before the first block and after each.
            attention_queries: the chosen tokens' places, (rows,) or (b, rows); default config.attention_queries, and
                where that is None the first real token of each sample.
            return_dict: False for a tuple.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds; too long an input; attention_mask is not a
                key-padding mask; attention rows of attention "shift" or "residual".
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds: got " + ("both", "neither")[input_ids is None])
        rows = self.config.output_attentions if output_attentions is None else output_attentions
        states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        embeddings = self.encoder.embeddings
        if input_ids is not None:
            self._check_length(input_ids.shape[1])
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            x = embeddings(input_ids, token_type_ids)
        else:
            assert inputs_embeds is not None
            self._check_length(inputs_embeds.shape[1])
            x = embeddings.of_vectors(inputs_embeds, token_type_ids)
        mask = key_mask(attention_mask, *x.shape[:2])
        queries = self._queries(attention_queries, mask, x) if rows else None
        hidden_states, attentions = [x], []
        for block in self.encoder.blocks:
            assert isinstance(block, Block)
            if queries is not None:
                attentions.append(block.attention_rows(x, queries, mask))
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block, x, mask)
            else:
                x = block(x, mask)
            hidden_states.append(x)
        return BaseModelOutput(
            last_hidden_state=self.encoder.norm(x),
            hidden_states=tuple(hidden_states) if states else None,
            attentions=tuple(attentions) if rows else None,
        )

    def _check_length(self, n: int) -> None:
        longest = self.config.max_position_embeddings
        if n > longest:
            raise ValueError(
                f"the input must be at most max_position_embeddings tokens long: got {n}, max_position_embeddings "
                f"{longest}; shorten it, or call extend_positions({n}) on the model"
            )

    def _queries(
        self, chosen: Tensor | list[int] | None, mask: Bool[Tensor, "b n"] | None, x: Float[Tensor, "b n c"]
    ) -> Int[Tensor, "..."]:
        if chosen is None:
            chosen = self.config.attention_queries
        if chosen is None:
            return first_token(mask, x)[:, None]
        return torch.as_tensor(chosen, device=x.device)


def _some(word: str, names: list[str]) -> str:
    return f"{len(names)} {word}" + (f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else "")


def key_mask(attention_mask: Tensor | None, b: int, n: int) -> Bool[Tensor, "b n"] | None:
    """A mask as transformers' tokenizers make it, 1 = real token, as bool; other forms as `nystrom_attention` takes."""
    if attention_mask is None:
        return None
    if attention_mask.ndim == 2 and attention_mask.dtype != torch.bool:
        is_one = attention_mask == 1
        rule = "attention_mask (b, n) must hold 1 for a real token and 0 for padding"
        if known_false((is_one | (attention_mask == 0)).all(), rule):
            raise ValueError(f"{rule}: got {attention_mask[~is_one & (attention_mask != 0)][0].item()}")
        attention_mask = is_one
    return key_padding_mask(attention_mask, b, n, n)


def first_token(mask: Bool[Tensor, "b n"] | None, x: Float[Tensor, "b n c"]) -> Int[Tensor, " b"]:
    """Where each sample begins: its first real token, which with padding on the left is not the first token."""
    if mask is None:
        return torch.zeros(len(x), dtype=torch.long, device=x.device)
    return mask.int().argmax(1)
