"""Read a Nyströmformer checkpoint as a model of linear cost, beside the exact attention that it was trained with.

    pip install 'nystrom[train]'
    hf download uw-madison/nystromformer-512 --local-dir nystromformer-512     # or any other such folder
    python examples/load_checkpoint.py nystromformer-512 --allow-pickle

The published checkpoints were trained, and run in transformers, with exact attention: their segment_means_seq_len is
num_landmarks, which switches the Nyström attention off. Here the attention is yours to choose; same weights.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import torch
import tyro
from transformers import AutoTokenizer

from nystrom.hf.modeling import NystromformerForMaskedLM

ATTENTIONS = ("exact", "nystrom", "shift", "residual")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare a checkpoint's attentions."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a masked language model of transformers' Nyströmformer, with its tokenizer."""
    text: Path | None = None
    """Text file to fill masks in; default: a chapter of Python's reference."""
    allow_pickle: bool = False
    """Read pytorch_model.bin where there is no model.safetensors."""
    long: int = 4096
    """A length to time (tokens)."""


@torch.no_grad()
def run(config: Config) -> None:
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    text = topics["typesseq"] if config.text is None else config.text.read_text()
    models = {
        attention: NystromformerForMaskedLM.from_transformers(config.model, attention, allow_pickle=config.allow_pickle)
        for attention in ATTENTIONS
    }
    reach = models["exact"].config.max_position_embeddings

    ids = tokenizer(text, truncation=True, max_length=reach, return_tensors="pt")["input_ids"]
    hidden = torch.arange(7, ids.shape[1] - 1, 7)  # every seventh token
    masked = ids.index_fill(1, hidden, tokenizer.mask_token_id)
    scores = {attention: model(masked).logits[0, hidden] for attention, model in models.items()}
    print(f"{len(hidden)} masked tokens of {ids.shape[1]}:  right, the same as exact, change of the scores")
    for attention, got in scores.items():
        best, exact = got.argmax(-1), scores["exact"]
        right, same = (best == ids[0, hidden]).float().mean(), (best == exact.argmax(-1)).float().mean()
        print(f"  {attention:9} {right:7.1%} {same:8.1%} {(got - exact).norm() / exact.norm():9.3f}")

    print("\nThe first of them, as each fills them in:")
    for place, token in enumerate(hidden[:8].tolist()):
        answers = [f"{tokenizer.decode(got[place].argmax()):12}" for got in scores.values()]
        print(f"  {tokenizer.decode(ids[0, token]):12} ->", *answers)

    print(f"\nSeconds for {config.long} tokens (positions repeated, untrained at that length):")
    long = ids.repeat(1, -(-config.long // ids.shape[1]))[:, : config.long]
    for attention, model in models.items():
        model.extend_positions(max(config.long, reach))
        start = time.perf_counter()
        model.nystromformer(long)
        print(f"  {attention:9} {time.perf_counter() - start:6.2f}")


if __name__ == "__main__":
    run(tyro.cli(Config))
