"""What swapped attention does to the uses of a sentence encoder: similarity of sentences, search among documents.

nystrom bench sts --model MODEL --data sts-test.tsv --out hf.jsonl
nystrom bench retrieval --model MODEL --text peps --out hf.jsonl
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nystrom.bench.lines import Grid, Line, record, show
from nystrom.bench.methods import check_sizes
from nystrom.bench.models import FORMS
from nystrom.bench.timing import torch_threads
from nystrom.data.text import text_files
from nystrom.models import load, num_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Sts:
    """Spearman correlation of cosines of sentence embeddings with what people said, for each attention."""

    model: str
    """Folder, or name on the Hugging Face Hub, of an encoder whose embedding is the mean over tokens."""
    data: Path
    """STS-B as its authors give it, sts-test.tsv: the fifth column a score, then two sentences."""
    num_landmarks: int = 64
    """Landmarks (count); all else at its defaults, and no input so short that attention stays exact."""
    batch: int = 64
    """Sentences at a time (count), the longest first."""
    threads: int = torch.get_num_threads()
    """Threads that torch computes with."""
    out: Path | None = None
    """File to append the JSON lines to."""


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """How many of the ten nearest documents stay the nearest with each attention, and the time it takes."""

    model: str
    """Folder, or name on the Hugging Face Hub, of an encoder whose embedding is the mean over tokens."""
    text: tuple[Path, ...]
    """Files or folders to read, a document per file."""
    length: int = 512
    """Documents are cut after this many tokens."""
    nearest: int = 10
    """Neighbours of each document to compare (count)."""
    num_landmarks: int = 64
    """Landmarks (count); all else at its defaults, and no input so short that attention stays exact."""
    batch: int = 8
    """Documents at a time (count), the longest first."""
    threads: int = torch.get_num_threads()
    """Threads that torch computes with."""
    out: Path | None = None
    """File to append the JSON lines to."""


class Pairs(NamedTuple):
    """Sentences two by two, and how alike people found them."""

    left: list[str]
    right: list[str]
    scores: list[float]


def run_sts(config: Sts) -> list[Line]:
    """Measure, print a table, and append the lines to config.out."""
    check_sizes(num_landmarks=config.num_landmarks, batch=config.batch, threads=config.threads)
    pairs = read_pairs(config.data)
    with torch_threads(config.threads):
        lines = record("sts", measure_sts(config, pairs), config.out)
    show(summary_of_sts(lines))
    return lines


def run_retrieval(config: Retrieval) -> list[Line]:
    """Measure, print a table, and append the lines to config.out."""
    check_sizes(length=config.length, nearest=config.nearest, num_landmarks=config.num_landmarks, batch=config.batch)
    check_sizes(threads=config.threads)
    files = text_files(list(config.text))
    if len(files) <= config.nearest:
        raise ValueError(f"text must hold more than nearest = {config.nearest} documents: got {len(files)}")
    with torch_threads(config.threads):
        lines = record("retrieval", measure_retrieval(config, files), config.out)
    show(summary_of_retrieval(lines))
    return lines


def read_pairs(path: Path) -> Pairs:
    """STS-B's own file.

    Raises:
        ValueError: a line has no score and two sentences.
    """
    pairs = Pairs([], [], [])
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split("\t")
        try:
            score, left, right = float(fields[4]), fields[5], fields[6]
        except (IndexError, ValueError):
            raise ValueError(
                f"{path}, line {number}: the fifth column must be a score and the next two sentences: got {line[:80]!r}"
            ) from None
        pairs.left.append(left)
        pairs.right.append(right)
        pairs.scores.append(score)
    if len(pairs.scores) < 2:
        raise ValueError(f"{path}: must hold at least two pairs: got {len(pairs.scores)}")
    return pairs


def measure_sts(config: Sts, pairs: Pairs) -> Iterator[Line]:
    """One line per attention."""
    from scipy.stats import spearmanr

    from nystrom.hf import configure  # loads transformers

    model, tokenizer = load(config.model)
    tokens = tokenize(model, tokenizer, pairs.left + pairs.right, num_positions(model))
    for attention in FORMS:
        configure(model, num_landmarks=config.num_landmarks, exact_below=0).set_attn_implementation(attention)
        left, right = embed(model, tokenizer, tokens, config.batch).chunk(2)
        spearman, _ = spearmanr((left * right).sum(1).numpy(), pairs.scores)
        yield {
            "method": attention,
            "n": max(map(len, tokens)),
            "spearman": float(spearman),  # pyright: ignore[reportArgumentType]
            "pairs": len(pairs.scores),
            "model": "/".join(Path(config.model).parts[-2:]),
            "num_landmarks": config.num_landmarks,
        }


def measure_retrieval(config: Retrieval, files: list[Path]) -> Iterator[Line]:
    """One line per attention; sdpa, the first, is what the others are compared to."""
    from nystrom.hf import configure  # loads transformers

    model, tokenizer = load(config.model)
    texts = [path.read_text(encoding="utf-8") for path in files]
    tokens = tokenize(model, tokenizer, texts, config.length)
    exact, exact_seconds = None, 0.0
    for attention in FORMS:
        configure(model, num_landmarks=config.num_landmarks, exact_below=0).set_attn_implementation(attention)
        start = perf_counter()
        embeddings = embed(model, tokenizer, tokens, config.batch)
        seconds = perf_counter() - start
        found = (embeddings @ embeddings.mT).fill_diagonal_(-2.0).topk(config.nearest).indices
        if exact is None:
            exact, exact_seconds = found, seconds
        same = (found[:, :, None] == exact[:, None]).any(2).double().mean(1)
        yield {
            "method": attention,
            "n": config.length,
            "overlap": same.mean().item(),
            "first_same": (found[:, 0] == exact[:, 0]).double().mean().item(),
            "seconds": seconds,
            "of_sdpa": seconds / exact_seconds,
            "documents": len(files),
            "full_length": sum(len(ids) == config.length for ids in tokens),
            "nearest": config.nearest,
            "model": "/".join(Path(config.model).parts[-2:]),
            "num_landmarks": config.num_landmarks,
            "threads": config.threads,
        }


def tokenize(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", texts: list[str], length: int | None
) -> list[list[int]]:
    """Token ids of each text, cut at the length.

    Raises:
        ValueError: the model's positions end before.
    """
    positions = num_positions(model)
    if length is not None and positions is not None and length > positions:
        raise ValueError(f"length must be at most the model's {positions} positions: got {length}")
    return tokenizer(texts, truncation=length is not None, max_length=length, verbose=False)["input_ids"]


def embed(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: list[list[int]], batch: int
) -> Float[Tensor, "t c"]:
    """The mean of each text's last hidden states, of length one; in batches of texts of about one length, padded."""
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]), reverse=True)
    rows = {}
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        inputs = tokenizer.pad({"input_ids": [tokens[i] for i in some]}, return_tensors="pt")
        mask = inputs["attention_mask"][..., None]
        with torch.inference_mode():
            states = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
            means = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        rows |= dict(zip(some, means, strict=True))
    return torch.stack([rows[i] for i in range(len(tokens))])


def summary_of_sts(lines: list[Line]) -> Grid:
    """Spearman correlations."""
    first = lines[0]
    title = f"{first['model']}, Spearman x 100 on {first['pairs']} pairs of STS-B, m = {first['num_landmarks']}"
    return Grid(title, ["attention", "Spearman"], [[x["method"], f"{100 * x['spearman']:.2f}"] for x in lines])


def summary_of_retrieval(lines: list[Line]) -> Grid:
    """Overlaps and times."""
    first = lines[0]
    title = (
        f"{first['model']}, {first['documents']} documents cut at {first['n']} tokens, m = {first['num_landmarks']}, "
        f"{first['threads']} threads"
    )
    headings = ["attention", f"same among {first['nearest']} nearest", "same nearest", "s", "of sdpa"]
    rows = [
        [x["method"], f"{x['overlap']:.0%}", f"{x['first_same']:.0%}", f"{x['seconds']:.0f}", f"{x['of_sdpa']:.2f}x"]
        for x in lines
    ]
    return Grid(title, headings, rows)
