"""Tiny random models of many families, and what each does with each attention.

python tests/families.py    prints the table of docs/families.md
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from nystrom.hf import configure
from nystrom.hf.settings import ATTENTIONS

N, REAL = 21, (21, 13)  # tokens of a batch of two, and how many of each row are real
WIDTH, HEADS = 24, 4
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 32,
    "initializer_range": 0.4,  # so that attention is far from uniform
}
TEXT = SIZES | {"vocab_size": 60, "max_position_embeddings": 48}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
IMAGE = SIZES | {"image_size": 16, "patch_size": 4}
AUDIO = SIZES | {
    "conv_dim": (8, 8),
    "conv_kernel": (4, 4),
    "conv_stride": (2, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",  # "group" mixes padding into real frames, before any attention
    "mask_time_prob": 0.0,
    "vocab_size": 60,
}
PAIR = {
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 60,
    "init_std": 0.4,
}
T5 = {"d_model": WIDTH, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": HEADS, "vocab_size": 60}
Inputs = dict[str, Tensor]


def text(*, n: int = N, real: tuple[int, ...] = REAL, seed: int = 1) -> Inputs:
    """Rows of tokens, the last of each being padding."""
    ids = torch.randint(5, 60, (len(real), n), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(n) < torch.tensor(real)[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def images() -> Inputs:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def shuffled_images() -> Inputs:
    """ViTMAE orders patches by noise, its own unless given."""
    return images() | {"noise": torch.rand(2, 16, generator=torch.Generator().manual_seed(2))}


def sounds() -> Inputs:
    """Two convolutions of stride 2 make 21 frames of 90 samples, 13 of 58."""
    mask = (torch.arange(90) < torch.tensor([90, 58])[:, None]).long()
    return {
        "input_values": torch.randn(2, 90, generator=torch.Generator().manual_seed(1)) * mask,
        "attention_mask": mask,
    }


def spectra() -> Inputs:
    return {"input_features": torch.randn(2, 8, 2 * N, generator=torch.Generator().manual_seed(1))}


def with_decoder(inputs: Inputs, n: int = N) -> Inputs:
    """As many tokens in the decoder as in the encoder unless said: then only their masks tell them apart."""
    return inputs | {f"decoder_{key}": value for key, value in text(n=n, real=(n, n), seed=2).items()}


def _bert(name: str, **more: Any) -> Callable[[], hf.PreTrainedModel]:
    return lambda: getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**TEXT | more))


def _clip(name: str) -> hf.PreTrainedModel:
    special = {"bos_token_id": 2, "eos_token_id": 3, "projection_dim": WIDTH} if name == "CLIP" else SPECIAL
    config = getattr(hf, f"{name}Config")(text_config=TEXT | special | {"pad_token_id": 1}, vision_config=IMAGE)
    return getattr(hf, f"{name}Model")(config)


def _clip_part(name: str) -> hf.PreTrainedModel:
    """CLIP's initialisation is small whatever initializer_range."""
    return louder(getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**_part_sizes(name))))


def _part_sizes(name: str) -> dict[str, Any]:
    if "Vision" in name:
        return IMAGE
    return TEXT | SPECIAL | ({"projection_dim": WIDTH} if name.startswith("Siglip") else {})


def louder(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """The model with queries and keys that make sharp attention."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and any(part in name for part in ("q_proj", "k_proj", ".q.", ".k.", "query", "key")):
                weight.normal_(std=0.4)
    return model


def _whisper() -> hf.PreTrainedModel:
    sizes = PAIR | SPECIAL | {"num_mel_bins": 8, "max_source_positions": N, "max_target_positions": 48}
    return hf.WhisperModel(hf.WhisperConfig(**sizes, decoder_start_token_id=2, suppress_tokens=None))


FAMILIES: dict[str, tuple[Callable[[], hf.PreTrainedModel], Callable[[], Inputs]]] = {
    "BERT": (_bert("Bert"), text),
    "RoBERTa": (_bert("Roberta"), text),
    "XLM-RoBERTa": (_bert("XLMRoberta"), text),
    "ELECTRA": (_bert("Electra", embedding_size=WIDTH), text),
    "ALBERT": (_bert("Albert", embedding_size=WIDTH), text),
    "DistilBERT": (_bert("DistilBert"), text),
    "LayoutLM": (_bert("LayoutLM"), text),
    "ESM": (_bert("Esm", pad_token_id=1, mask_token_id=4, token_dropout=False, position_embedding_type="rotary"), text),
    "EuroBERT": (_bert("EuroBert", **SPECIAL, num_key_value_heads=2), text),
    "ModernBERT": (
        _bert("ModernBert", **SPECIAL, cls_token_id=2, sep_token_id=3, local_attention=8, global_attn_every_n_layers=2),
        text,
    ),
    "MPNet": (_bert("MPNet"), text),
    "DeBERTa-v2": (_bert("DebertaV2", relative_attention=True, position_buckets=8), text),
    "Nyströmformer of transformers": (_bert("Nystromformer", num_landmarks=3, segment_means_seq_len=N), text),
    "ViT": (lambda: hf.ViTModel(hf.ViTConfig(**IMAGE)), images),
    "DINOv2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**IMAGE)), images),
    "ViTMAE": (lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**IMAGE, mask_ratio=0.0)), shuffled_images),
    "CLIP, vision": (lambda: _clip_part("CLIPVision"), images),
    "CLIP, text": (lambda: _clip_part("CLIPText"), text),
    "CLIP, both": (lambda: _clip("CLIP"), lambda: text() | images()),
    "SigLIP, vision": (lambda: _clip_part("SiglipVision"), images),
    "SigLIP, text": (lambda: _clip_part("SiglipText"), text),
    "SigLIP, both": (lambda: _clip("Siglip"), lambda: text() | images()),
    "Wav2Vec2": (lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**AUDIO)), sounds),
    "HuBERT": (lambda: hf.HubertModel(hf.HubertConfig(**AUDIO)), sounds),
    "Whisper, encoder": (lambda: _whisper().encoder, spectra),
    "Whisper": (_whisper, lambda: with_decoder(spectra())),
    "BART, encoder": (lambda: hf.BartModel(hf.BartConfig(**PAIR, max_position_embeddings=48)).encoder, text),
    "BART": (lambda: hf.BartModel(hf.BartConfig(**PAIR, max_position_embeddings=48)), lambda: with_decoder(text())),
    "T5, encoder": (lambda: hf.T5EncoderModel(hf.T5Config(**T5)), text),
    "T5": (lambda: hf.T5Model(hf.T5Config(**T5)), lambda: with_decoder(text())),
    "GPT-2": (lambda: hf.GPT2Model(hf.GPT2Config(vocab_size=60, n_embd=WIDTH, n_layer=2, n_head=HEADS)), text),
    "Llama": (_bert("Llama", num_key_value_heads=2), text),
}
"""A model and its inputs, by family; padded where the family knows padding."""


def build(family: str) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return FAMILIES[family][0]().eval()


def states(model: hf.PreTrainedModel, inputs: Inputs) -> list[Tensor]:
    """What the model says of real tokens (or patches, or frames): one array for each output and sample."""
    with torch.no_grad():
        out = model(**inputs)
    mask = inputs.get("attention_mask")
    if "input_values" in inputs:
        mask = model._get_feature_vector_attention_mask(out.last_hidden_state.shape[1], mask)
    if "text_model_output" in out:
        hidden = [(out.text_model_output.last_hidden_state, mask), (out.vision_model_output.last_hidden_state, None)]
    elif "decoder_input_ids" in inputs:
        hidden = [(out.last_hidden_state, None), (out.encoder_last_hidden_state, mask)]
    else:
        hidden = [(out.last_hidden_state, mask)]
    return [
        sample if real is None else sample[real[i].bool().flatten()]
        for output, real in hidden
        for i, sample in enumerate(output)
    ]


EVERY_KEY = {
    "nystrom": {"num_landmarks": 64, "num_pinv_iters": 40},
    "nystrom_shift": {"num_landmarks": 64, "num_pinv_iters": 40},
    "nystrom_residual": {"num_landmarks": 64},
}
"""Settings in which every token is a landmark or a cluster: the attention is then the exact one."""
FEW = {
    "nystrom": {"num_landmarks": 4},
    "nystrom_shift": {"num_landmarks": 4},
    "nystrom_residual": {"num_landmarks": 4, "top_k": 2, "window": 4, "block": 4},
}
"""Settings far from exact."""


def swapped(family: str, attention: str, **settings: Any) -> hf.PreTrainedModel:
    """The family's model, in float64, with an attention that no length makes exact."""
    return configure(build(family).double(), attention, exact_below=0, **settings)


def batch(family: str) -> Inputs:
    return {name: x.double() if x.is_floating_point() else x for name, x in FAMILIES[family][1]().items()}


def verdict(family: str, attention: str) -> tuple[str, list[str]]:
    """ "works", "with `exact_causal`" or "refused", and why: the first sentence of each error."""
    try:
        states(swapped(family, attention, **FEW[attention]), batch(family))
        return "works", []
    except ValueError as error:
        reasons = [_first_sentence(error)]
    try:
        got = states(swapped(family, attention, exact_causal=True, **FEW[attention]), batch(family))
    except ValueError as error:
        return "refused", [*reasons, _first_sentence(error)]
    exact = states(build(family).double(), batch(family))
    exchanged = any(not torch.allclose(x, y) for x, y in zip(got, exact, strict=True))
    return ("with `exact_causal`" if exchanged else "refused"), reasons


def _first_sentence(error: ValueError) -> str:
    return str(error).split(". ")[0].split(";")[0]


def numbered(family: str) -> str:
    """Whether the layers know their number, so that `configure(layers=...)` can tell them apart."""
    try:
        configure(build(family), layers={0: {}})
    except ValueError:
        return "no"
    return "yes"


def table() -> str:
    """What each family does with each attention, in Markdown."""
    titles = ["family", *(f"`{name}`" for name in ATTENTIONS), "`layers`", "why not"]
    lines = [titles, ["---"] * len(titles)]
    for family in FAMILIES:
        cells, reasons = [], []
        for attention in ATTENTIONS:
            cell, why = verdict(family, attention)
            cells.append(cell)
            reasons += [reason.replace(attention, "it") for reason in why]
        layers = "" if set(cells) == {"refused"} else numbered(family)
        lines.append([family, *cells, layers, "; ".join(dict.fromkeys(reasons))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    hf.logging.set_verbosity_error()
    print(table())
