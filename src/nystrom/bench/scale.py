"""One layer at up to a million tokens: time and peak memory, each in a fresh process, and how they grow.

nystrom bench scale --out scale.jsonl
nystrom bench scale --what block --lengths 16384 1048576
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression, median
from time import perf_counter
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nystrom import memory
from nystrom.bench.lines import Grid, Line, record, show
from nystrom.bench.memory import MIB
from nystrom.bench.methods import check_sizes
from nystrom.encoder import Block, EncoderConfig
from nystrom.functional import nystrom_attention
from nystrom.streaming import stream_blocks

What = Literal["attention", "block"]
SMALL = 2048
"""Tokens of a first call, which loads the kernels and their thread pools."""
LONG = 60.0
"""Seconds after which no further round begins."""
MANY = 2**16
"""Slopes are fitted from this length on: below it what does not grow counts (tokens)."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One attention, and one block of an encoder, at up to a million tokens: milliseconds, peak memory, slopes."""

    lengths: tuple[int, ...] = tuple(2**k for k in range(14, 21))
    """Sequence lengths (tokens)."""
    what: tuple[What, ...] = ("attention", "block")
    """"attention": query, key and value to output; "block": a whole block of an encoder, streamed."""
    exact_up_to: int = 32768
    """Longest input of exact attention, which is measured beside ours (tokens); 0 for none."""
    heads: int = 8
    """Heads (count)."""
    head_dim: int = 64
    """Width of a head."""
    num_landmarks: int = 64
    """Landmarks (count)."""
    chunk: int = 16384
    """Tokens at a time of a block (see `nystrom.streaming`)."""
    rounds: int = 3
    """Calls that are timed, as long as they have not taken a minute (count)."""
    threads: int = torch.get_num_threads()
    """Threads that torch computes with."""
    keep_freed: bool = True
    """Keep what tensors give back for the next ones (see `nystrom.memory.keep_freed`); the lines say whether it was."""
    out: Path | None = None
    """File to append the JSON lines to."""


def run(config: Scale) -> list[Line]:
    """Measure, print a table, and append the lines to config.out."""
    check_sizes(lengths=config.lengths, heads=config.heads, head_dim=config.head_dim, threads=config.threads)
    check_sizes(num_landmarks=config.num_landmarks, chunk=config.chunk, rounds=config.rounds)
    if not config.what:
        raise ValueError("what must name at least one: attention, block")
    lines = record("scale", measure(config), config.out)
    show(summary(lines))
    return lines


def measure(config: Scale) -> Iterator[Line]:
    """A line for each part, method, direction and length."""
    about = {k: v for k, v in asdict(config).items() if k not in ("lengths", "what", "exact_up_to", "out")}
    for what in config.what:
        for n in config.lengths:
            for method in ("nystrom", "exact"):
                if method == "exact" and n > config.exact_up_to:
                    continue
                for backward in (False, True):
                    line = {"part": what, "method": method, "n": n, "backward": backward, **about}
                    yield line | elsewhere(line)


def elsewhere(line: Line) -> dict[str, float]:
    """Time and memory, from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "nystrom.bench.scale", json.dumps(line)], capture_output=True, text=True
    )
    if done.returncode != 0:
        how = "was killed, perhaps for want of memory" if done.returncode < 0 else "failed"
        raise RuntimeError(f"{line['part']}, {line['method']}, {line['n']} tokens: {how}:\n{done.stderr}")
    return json.loads(done.stdout)


def here(line: Line) -> dict[str, float]:
    """The same in this process; once per process. Memory is what a call needs beyond its inputs, results included."""
    kept = line["keep_freed"] and memory.keep_freed()
    torch.set_num_threads(line["threads"])
    torch.manual_seed(0)
    call, make = step(line)
    call(*make(min(SMALL, line["n"])))
    inputs = make(line["n"])
    before = memory.reset_host_peak()
    times: list[float] = []
    while len(times) < line["rounds"] and sum(times) < LONG:
        start = perf_counter()
        call(*inputs)
        times.append(perf_counter() - start)
    size = sum(x.nbytes for x in inputs if x.requires_grad or not line["backward"])
    peak = memory.host_peak_above(before)
    found = {"ms": 1e3 * median(times), "calls": len(times), "peak_mib": peak / MIB, "peak_of_inputs": peak / size}
    return {**found, "keep_freed": kept}


def step(line: Line) -> tuple[Callable[..., None], Callable[[int], tuple[Tensor, ...]]]:
    """What is measured, and what makes its inputs: with a backward pass the gradient of the output comes last."""
    h, d, m, backward = (line[name] for name in ("heads", "head_dim", "num_landmarks", "backward"))
    parameters: list[Tensor] = []
    if line["part"] == "attention":
        shape, count = (lambda n: (1, h, n, d)), 3
        forward: Callable[..., Tensor] = F.scaled_dot_product_attention
        if line["method"] == "nystrom":
            forward = lambda q, k, v: nystrom_attention(q, k, v, num_landmarks=m)  # noqa: E731
    else:
        shape, count = (lambda n: (1, n, h * d)), 1
        kind: Any = "nystrom" if line["method"] == "nystrom" else "softmax"
        sizes = {"vocab_size": 2, "embed_dim": h * d, "num_heads": h, "ffn_dim": 4 * h * d, "dropout": 0.0}
        block = Block(EncoderConfig(kind=kind, num_landmarks=m, **sizes))
        forward = stream_blocks(block, line["chunk"]) if kind == "nystrom" else block
        parameters = list(block.parameters())

    def make(n: int) -> tuple[Tensor, ...]:
        inputs = [torch.randn(shape(n), requires_grad=backward) for _ in range(count)]
        return (*inputs, torch.randn(shape(n))) if backward else tuple(inputs)

    def call(*inputs: Tensor) -> None:
        with torch.set_grad_enabled(backward):
            if not backward:
                forward(*inputs)
                return
            *own, grad = inputs
            torch.autograd.grad(forward(*own), [*own, *parameters], grad)

    return call, make


def slope(lines: list[Line], of: str) -> float | None:
    """The exponent of the length in a power law through the lines of at least MANY tokens; None below two lengths."""
    points = [(math.log(line["n"]), math.log(line[of])) for line in lines if line["n"] >= MANY and line[of] > 0]
    return linear_regression(*zip(*points, strict=True)).slope if len({x for x, _ in points}) > 1 else None


def series(lines: list[Line]) -> dict[tuple[str, str, bool], list[Line]]:
    """The lines of each part, method and direction, by length."""
    found: dict[tuple[str, str, bool], list[Line]] = {}
    for line in sorted(lines, key=lambda line: line["n"]):
        found.setdefault((line["part"], line["method"], line["backward"]), []).append(line)
    return found


def summary(lines: list[Line]) -> Grid:
    """The lines of one run as a table."""
    first = lines[0]
    sizes = f"{first['heads']} heads x {first['head_dim']}, m = {first['num_landmarks']}"
    headings = ["", "tokens", "ms", "peak MiB", "of its inputs", "slope of time", "of memory"]
    rows = []
    for (part, method, backward), own in series(lines).items():
        name = f"{part}, {method}, " + ("forward + backward" if backward else "forward")
        for line in own:
            fitted = ["", ""]
            if line is own[-1]:
                fitted = ["" if (found := slope(own, of)) is None else f"{found:.2f}" for of in ("ms", "peak_mib")]
            costs = f"{line['ms']:.0f}", f"{line['peak_mib']:.0f}", f"{line['peak_of_inputs']:.2f}x"
            rows.append([name, str(line["n"]), *costs, *fitted])
            name = ""
    kept = ", freed memory kept" if first.get("keep_freed") else ""
    return Grid(f"one layer, {sizes}, float32, {first['threads']} threads{kept}", headings, rows)


if __name__ == "__main__":
    print(json.dumps(here(json.loads(sys.argv[1]))))
