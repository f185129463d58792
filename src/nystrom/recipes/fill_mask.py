"""Fill the masks in a line of text with a pretrained model.

nystrom fill-mask --model runs/pretrain --text "def main(): retu[MASK][MASK] None"
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from nystrom.checkpoint import load_masked_lm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nystrom.encoder import MaskedLM


@dataclass(frozen=True, kw_only=True)
class FillMask:
    """Fill the masks in a line of text; each mask stands for one token: one byte, for the byte tokenizer."""

    text: str
    """Text with at least one mask, written as the tokenizer writes it: [MASK] for the byte tokenizer."""
    model: Path = Path("runs/pretrain")
    """Folder that 'nystrom pretrain' wrote."""
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


def load(folder: Path) -> "tuple[MaskedLM, PreTrainedTokenizerBase]":
    """The model and its tokenizer."""
    from transformers import AutoTokenizer

    return load_masked_lm(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def fill(model: "MaskedLM", tokenizer: "PreTrainedTokenizerBase", text: str, top_k: int = 3) -> Filled:
    """Fill every mask at once, each from the unmasked text alone.

    Raises:
        ValueError: no mask in the text; a text longer than the model reads; top_k outside the vocabulary.
    """
    if not 1 <= top_k <= model.encoder_config.vocab_size:
        raise ValueError(
            f"top_k must be between 1 and the vocabulary of {model.encoder_config.vocab_size}: got {top_k}"
        )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
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
    return Filled(str(tokenizer.decode(ids[0])), candidates)
