"""How long a whole Hugging Face encoder takes with its attention swapped, against itself with sdpa.

nystrom bench models --lengths 512 1024 2048 4096 --out models.jsonl
nystrom bench models --model MODEL --lengths 512 1024 2048 4096
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nystrom.bench.lines import Grid, Line, grid, record, show, tables
from nystrom.bench.methods import check_sizes
from nystrom.bench.timing import Step, take_turns, times_ours
from nystrom.models import load, num_positions, tile_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMS = ("sdpa", "nystrom", "nystrom_shift", "nystrom_residual")
"""Values of `attn_implementation`."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """Time a whole encoder with each attention, against the same encoder with sdpa."""

    model: str | None = None
    """Folder, or name on the Hugging Face Hub, of an encoder; default: a BERT of the sizes below, random weights."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Sequence lengths (tokens); where learnt positions end before, they are repeated."""
    batch: int = 1
    """Samples (count)."""
    layers: int = 4
    """Layers of the random BERT (count); ratios hardly depend on it."""
    heads: int = 12
    """Heads of the random BERT (count)."""
    head_dim: int = 64
    """Width of its heads."""
    num_landmarks: int = 64
    """Landmarks (count); all else at its defaults."""
    backward: bool = False
    """Time forward and backward together, instead of the forward alone."""
    rounds: int = 5
    """Times that every attention is measured, in turn (count)."""
    seconds: float = 0.2
    """Least time per attention and round."""
    threads: int = torch.get_num_threads()
    """Threads that torch computes with."""
    out: Path | None = None
    """File to append the JSON lines to."""


def run(config: Models) -> list[Line]:
    """Measure, print a table, and append the lines to config.out."""
    check_sizes(lengths=config.lengths, batch=config.batch, layers=config.layers, heads=config.heads)
    check_sizes(head_dim=config.head_dim, num_landmarks=config.num_landmarks, rounds=config.rounds)
    check_sizes(threads=config.threads)
    lines = record("models", measure_all(config), config.out)
    show(*(summary(table) for table in tables(lines)))
    return lines


def measure_all(config: Models) -> Iterator[Line]:
    """Length after length."""
    from nystrom.hf import configure  # loads transformers

    longest = max(config.lengths)
    model = random_bert(config, longest) if config.model is None else load(config.model)[0]
    positions = num_positions(model)
    if positions is not None and positions < longest:
        model = tile_positions(model, longest)
    configure(model, num_landmarks=config.num_landmarks, exact_below=0)
    for n in config.lengths:
        yield from measure(config, model, n)


def random_bert(config: Models, length: int) -> "PreTrainedModel":
    """A BERT with these sizes."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    width = config.heads * config.head_dim
    sizes = BertConfig(
        hidden_size=width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=4 * width,
        max_position_embeddings=length,
    )
    return BertModel(sizes, add_pooling_layer=False).eval()


def measure(config: Models, model: "PreTrainedModel", n: int) -> list[Line]:
    """One line per attention; `of_sdpa` is the median of the rounds' ratios of its time to sdpa's."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (config.batch, n), generator=generator)
    steps = {name: step(model, name, ids, config.backward) for name in FORMS}
    times = take_turns(steps, config.rounds, config.seconds, config.threads)
    about = {
        "n": n,
        "what": config.model and "/".join(Path(config.model).parts[-2:]),
        "backward": config.backward,
        "batch": config.batch,
        "layers": model.config.num_hidden_layers,
        "heads": model.config.num_attention_heads,
        "head_dim": model.config.hidden_size // model.config.num_attention_heads,
        "num_landmarks": config.num_landmarks,
        "threads": config.threads,
    }
    return [
        {
            "method": name,
            "ms": median(found),
            "ms_rounds": [round(t, 3) for t in found],
            "of_sdpa": times_ours(found, times["sdpa"]),
        }
        | about
        for name, found in times.items()
    ]


def step(model: "PreTrainedModel", attention: str, ids: Tensor, backward: bool) -> Step:
    """One pass with this attention."""

    def run() -> None:
        model.set_attn_implementation(attention)
        with torch.inference_mode(not backward):
            states = model(input_ids=ids).last_hidden_state
        if backward:
            states.sum().backward()
            model.zero_grad()

    return run


def summary(lines: list[Line]) -> Grid:
    """Milliseconds, and times faster than sdpa."""
    first = lines[0]
    direction = "forward + backward" if first["backward"] else "forward"
    sizes = f"{first['layers']} layers, {first['heads']} heads x {first['head_dim']}, m = {first['num_landmarks']}"
    title = (
        f"ms per {direction} of {first['what'] or 'a BERT'} (times as fast as sdpa), batch {first['batch']}, {sizes}"
    )
    faster = [{**line, "faster": 1 / line["of_sdpa"]} for line in lines]
    return grid(
        f"{title}, {first['threads']} threads", faster, "n", {name: name for name in FORMS}, "{ms:.0f} ({faster:.2f}x)"
    )
