"""How long attention takes: every form in one run, taking turns, as medians and ratios.

nystrom bench speed --lengths 1024 4096 --out speed.jsonl
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from nystrom.bench.lines import Grid, Line, append, grid, show, stamp
from nystrom.bench.methods import NAMES, Attend, Form, check_sizes, methods, random_inputs


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Time attention: ours, exact, the plain three-factor form, and Hugging Face's where transformers is installed."""

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    """Sequence lengths (tokens)."""
    batch: int = 1
    """Samples (count)."""
    heads: int = 12
    """Heads (count)."""
    head_dim: int = 64
    """Width of a head."""
    num_landmarks: int = 64
    """Landmarks (count)."""
    backward: bool = False
    """Time forward and backward together, instead of the forward alone."""
    layout: Literal["heads_first", "tokens_first"] = "heads_first"
    """Memory order of the inputs: (b, h, n, d), or (b, n, h, d) as a model's projections make them."""
    forms: tuple[Form, ...] = ("nystrom", "exact", "three_factor", "hf")
    """What to time; a form that is not installed, or cannot run at a length, is left out."""
    rounds: int = 5
    """Times that every form is measured, in turn (count)."""
    seconds: float = 0.2
    """Least time per form and round."""
    threads: int = torch.get_num_threads()
    """Threads that torch computes with."""
    out: Path | None = None
    """File to append the JSON lines to."""


def run(config: Speed) -> list[Line]:
    """Measure, print a table, and append the lines to config.out."""
    check_sizes(
        lengths=config.lengths, batch=config.batch, heads=config.heads, head_dim=config.head_dim, threads=config.threads
    )
    check_sizes(num_landmarks=config.num_landmarks, rounds=config.rounds)
    if not config.forms:
        raise ValueError(f"forms must name at least one: {', '.join(NAMES)}")
    lines = stamp("speed", (line for n in config.lengths for line in measure(config, n)))
    if config.out:
        append(config.out, lines)
    show(summary(lines))
    return lines


def summary(lines: list[Line]) -> Grid:
    """The lines of one run as a table: milliseconds, and how many times ours."""
    first = lines[0]
    what = "forward + backward" if first["backward"] else "forward"
    sizes = f"{first['batch']} x {first['heads']} heads x {first['head_dim']}, m = {first['num_landmarks']}"
    title = f"ms per {what} (times ours), {sizes}, {first['dtype']}, {first['layout']}, {first['threads']} threads"
    return grid(title, lines, "n", NAMES, "{ms:.1f} ({times_nystrom:.1f}x)")


def measure(config: Speed, n: int) -> list[Line]:
    """One line per form at one length; ms is the median over rounds, times_nystrom the median of per-round ratios."""
    torch.manual_seed(0)
    inputs = random_inputs(config.batch, config.heads, n, config.head_dim, config.layout)
    available = methods(config.heads, n, config.head_dim, config.num_landmarks)
    chosen = {name: available[name] for name in ("nystrom", *config.forms) if name in available}
    rounds: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(config.rounds):
        for name, attend in chosen.items():
            rounds[name].append(time_once(attend, inputs, config))
    return [
        {
            "method": name,
            "n": n,
            "ms": median(times),
            "ms_rounds": [round(t, 4) for t in times],
            "times_nystrom": median(t / ours for t, ours in zip(times, rounds["nystrom"], strict=True)),
            "batch": config.batch,
            "heads": config.heads,
            "head_dim": config.head_dim,
            "num_landmarks": config.num_landmarks,
            "backward": config.backward,
            "layout": config.layout,
            "dtype": "float32",
            "threads": config.threads,
        }
        for name, times in rounds.items()
    ]


def time_once(attend: Attend, inputs: tuple[Tensor, Tensor, Tensor], config: Speed) -> float:
    """Median milliseconds of one call, over at least config.seconds."""

    def forward() -> None:
        with torch.inference_mode():
            attend(*inputs)

    def forward_and_backward() -> None:
        leaves = [x.detach().requires_grad_() for x in inputs]
        attend(*leaves).sum().backward()

    step = forward_and_backward if config.backward else forward
    timer = Timer("step()", globals={"step": step}, num_threads=config.threads)
    return 1e3 * timer.blocked_autorange(min_run_time=config.seconds).median
