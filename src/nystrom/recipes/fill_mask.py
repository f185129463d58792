"""Fill the masks in a line of text with a pretrained model.

nystrom fill-mask --model runs/pretrain --text "def main(): retu[MASK][MASK] None"
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from nystrom.inspect.texts import special_tokens
from nystrom.models import num_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class FillMask:
    """Fill the masks in a line of text; each mask stands for one token: one byte, for the byte tokenizer."""

    text: str
    """Text with at least one mask, written as the tokenizer writes it: [MASK] for the byte tokenizer."""
    model: Path = Path("runs/pretrain")
    """Folder that `nystrom pretrain` wrote, or of any masked language model."""
    top_k: int = 3
    """Candidates listed per mask (count)."""


class Filled(NamedTuple):
    """A line with its masks filled."""

    text: str
    """The line, every mask replaced by its likeliest token."""
    candidates: list[list[tuple[str, float]]]
    """For each mask, the likeliest tokens with their probabilities, best first."""


def run(config: FillMask) -> None:
    """Fill, and print the line and each mask's candidates."""
    model, tokenizer = load(config.model)
    filled = fill(model, tokenizer, config.text, config.top_k)
    print(filled.text)
    for i, candidates in enumerate(filled.candidates, start=1):
        print(f"  mask {i}: " + "  ".join(f"{token!r} {p:.1%}" for token, p in candidates))


def load(folder: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model, in eval mode, and its tokenizer.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it has no head that fills masks; its files are damaged.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    import nystrom.hf  # noqa: F401  # tells the Auto classes of our models

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'}: no such file; is {folder} a model's folder?")
    try:
        model, info = AutoModelForMaskedLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder}: its weights cannot be read, or do not fit config.json: {error}") from None
    if info["missing_keys"]:
        raise ValueError(f"{folder}: no masked language model: it lacks {', '.join(sorted(info['missing_keys']))}")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.mask_token_id is None:
        raise ValueError(f"{folder}: its tokenizer has no mask token")
    return model.eval(), tokenizer


def fill(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", text: str, top_k: int = 3) -> Filled:
    """Fill every mask at once, each from the unmasked text alone.

    Raises:
        ValueError: no mask in the text; a text longer than the model reads; top_k outside the vocabulary.
    """
    size = model.config.vocab_size
    if not 1 <= top_k <= size:
        raise ValueError(f"top_k must be between 1 and the vocabulary of {size}: got {top_k}")
    bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    # A model of ours without sentence order was trained on blocks without special tokens at their ends.
    before, after = special_tokens(tokenizer) if getattr(model.config, "sentence_order", True) else ([], [])
    ids = torch.tensor([[*before, *bare, *after]])
    reach = num_positions(model)
    if reach is not None and ids.shape[1] > reach:
        raise ValueError(f"text must be at most the {reach} tokens that the model reads: got {ids.shape[1]}")
    masks = torch.eq(ids[0], cast(int, tokenizer.mask_token_id)).nonzero().flatten()
    if not len(masks):
        raise ValueError(f"text must hold at least one {tokenizer.mask_token}: got {text!r}")
    with torch.inference_mode():
        probabilities = model(ids).logits[0, masks].softmax(-1)
    best, tokens = probabilities.topk(top_k)
    ids[0, masks] = tokens[:, 0]
    candidates = [
        [(str(tokenizer.decode([token])), p) for token, p in zip(row.tolist(), ps.tolist(), strict=True)]
        for row, ps in zip(tokens, best, strict=True)
    ]
    return Filled(str(tokenizer.decode(ids[0, len(before) : len(before) + len(bare)])), candidates)
