"""How long attention takes: every form in one run, taking turns, as medians and ratios.

nystrom bench speed --lengths 1024 4096 --out speed.jsonl
nystrom bench speed --peers --out peers.jsonl
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn

from nystrom.bench.encoders import CONV, VOCAB, encoders
from nystrom.bench.lines import Grid, Line, grid, record, show, tables
from nystrom.bench.methods import NAMES, PINV_ITERS, Attend, Form, check_sizes, methods, random_inputs
from nystrom.bench.timing import Step, matmul_peaks, matmul_steps, nystrom_matmul_flops, take_turns, times_ours

Layout = Literal["heads_first", "tokens_first"]
PLAIN: tuple[Form, ...] = ("nystrom", "shift", "residual", "exact", "three_factor", "hf")
PEERS: tuple[Form, ...] = ("nystrom", "exact", "three_factor", "hf", "lucidrains")


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Time attention: our forms, exact, the plain three-factor form, and peers where they are installed."""

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
    layout: Layout | None = None
    """Inputs in memory: (b, h, n, d), the default, or (b, n, h, d) as projections make them, which --peers takes."""
    forms: tuple[Form, ...] | None = None
    """What to time, if installed and able to run at a length; default all but lucidrains, with --peers what does the
    same as nystrom, and exact."""
    rounds: int | None = None
    """Times that every form is measured, in turn (count); default 5, with --peers 3."""
    seconds: float = 0.2
    """Least time per form and round."""
    threads: int = torch.get_num_threads()
    """Threads that torch computes with."""
    peers: bool = False
    """The published comparison, in about 8 minutes: all forms forward, forward + backward, and as whole encoders."""
    encoder_length: int = 4096
    """Length that --peers times encoders at (tokens)."""
    encoder_layers: int = 12
    """Blocks of those encoders (count), each heads x head_dim wide."""
    out: Path | None = None
    """File to append the JSON lines to."""


def run(config: Speed) -> list[Line]:
    """Measure, print a table per kind of measurement, and append the lines to config.out."""
    check(config)
    lines = record("speed", measure_all(config), config.out)
    show(*(summary(table) for table in tables(lines)))
    return lines


def check(config: Speed) -> None:
    """Raise ValueError unless everything asked for can be measured."""
    _, forms, rounds = settings(config)
    check_sizes(
        lengths=config.lengths, batch=config.batch, heads=config.heads, head_dim=config.head_dim, threads=config.threads
    )
    check_sizes(num_landmarks=config.num_landmarks, rounds=rounds)
    check_sizes(encoder_length=config.encoder_length, encoder_layers=config.encoder_layers)
    if not forms:
        raise ValueError(f"forms must name at least one: {', '.join(NAMES)}")
    if config.peers and config.backward:
        raise ValueError("peers times forward and forward + backward: got backward = True with it; leave that out")


def settings(config: Speed) -> tuple[Layout, tuple[Form, ...], int]:
    """Layout, forms and rounds, with the defaults that depend on config.peers."""
    layout, forms, rounds = ("tokens_first", PEERS, 3) if config.peers else ("heads_first", PLAIN, 5)
    return (
        config.layout or layout,
        forms if config.forms is None else config.forms,
        rounds if config.rounds is None else config.rounds,
    )


def measure_all(config: Speed) -> Iterator[Line]:
    """Every line, one table after the other."""
    for backward in (False, True) if config.peers else (config.backward,):
        for n in config.lengths:
            yield from measure(replace(config, backward=backward), n)
    if config.peers:
        yield from measure_encoders(config)


def measure(config: Speed, n: int) -> list[Line]:
    """One line per form at one length; ms is the median over rounds, times_nystrom the median of per-round ratios."""
    layout, forms, rounds = settings(config)
    torch.manual_seed(0)
    inputs = random_inputs(config.batch, config.heads, n, config.head_dim, layout)
    available = methods(config.heads, n, config.head_dim, config.num_landmarks)
    steps = {
        name: attention_step(available[name], inputs, config.backward)
        for name in ("nystrom", *forms)
        if name in available
    }
    with_share = config.peers and not config.backward
    products = matmul_steps() if with_share else {}
    times = take_turns(steps | products, rounds, config.seconds, config.threads)
    ours = times["nystrom"]
    about = {"n": n, "what": "attention", "backward": config.backward, "layout": layout, **sizes(config)}
    lines = [timed(name, times[name], ours) | about for name in steps]
    if with_share:
        lines[0] |= matmul_share(config, n, times)
    return lines


def measure_encoders(config: Speed) -> list[Line]:
    """One line per encoder and direction, all in turns: forward, and forward + backward."""
    _, forms, rounds = settings(config)
    torch.manual_seed(0)
    n, num_layers = config.encoder_length, config.encoder_layers
    available = encoders(n, num_layers, config.heads, config.head_dim, config.num_landmarks)
    ids = torch.randint(2, VOCAB, (config.batch, n))  # 1 is padding to transformers
    chosen = [name for name in available if name in ("nystrom", *forms)]
    steps = {
        f"{name} {backward}": encoder_step(available[name], ids, backward)
        for name in chosen
        for backward in (False, True)
    }
    times = take_turns(steps, rounds, config.seconds, config.threads)
    lines = []
    for backward in (False, True):
        about = {"n": n, "what": "encoder", "backward": backward, "layers": num_layers, "conv_kernel_size": CONV}
        for name in chosen:
            line = timed(name, times[f"{name} {backward}"], times[f"nystrom {backward}"])
            lines.append(line | about | sizes(config))
    return lines


def timed(method: str, times: list[float], ours: list[float]) -> Line:
    """What was measured of one form."""
    return {
        "method": method,
        "ms": median(times),
        "ms_rounds": [round(t, 4) for t in times],
        "times_nystrom": times_ours(times, ours),
    }


def sizes(config: Speed) -> Line:
    """What it was measured on, as far as it is the same in every line."""
    return {
        "batch": config.batch,
        "heads": config.heads,
        "head_dim": config.head_dim,
        "num_landmarks": config.num_landmarks,
        "dtype": "float32",
        "threads": config.threads,
    }


def matmul_share(config: Speed, n: int, times: dict[str, list[float]]) -> Line:
    """Our forward's matrix products per second over the fastest product's, the median of the rounds' ratios."""
    b, h, d, m = config.batch, config.heads, config.head_dim, config.num_landmarks
    flops = nystrom_matmul_flops(b, h, n, d, m, PINV_ITERS)
    peaks = matmul_peaks(times)
    shares = [flops / (1e6 * ms) / peak for ms, peak in zip(times["nystrom"], peaks, strict=True)]
    return {"matmul_share": median(shares), "matmul_gflop": flops / 1e9, "peak_gflop_per_s": median(peaks)}


def attention_step(attend: Attend, inputs: tuple[Tensor, Tensor, Tensor], backward: bool) -> Step:
    """One call of an attention form."""

    def forward() -> None:
        with torch.inference_mode():
            attend(*inputs)

    def forward_and_backward() -> None:
        leaves = [x.detach().requires_grad_() for x in inputs]
        attend(*leaves).sum().backward()

    return forward_and_backward if backward else forward


def encoder_step(model: nn.Module, ids: Tensor, backward: bool) -> Step:
    """One call of an encoder; its gradients are dropped afterwards."""

    def forward() -> None:
        with torch.inference_mode():
            model(ids)

    def forward_and_backward() -> None:
        model(ids).sum().backward()
        model.zero_grad()

    return forward_and_backward if backward else forward


def summary(lines: list[Line]) -> Grid:
    """The lines of one table: milliseconds, and how many times nystrom."""
    first = lines[0]
    about = f"m = {first['num_landmarks']}, {first['dtype']}"
    cell, threads = "{ms:.1f} ({times_nystrom:.1f}x)", f"{first['threads']} threads"
    if first.get("what") == "encoder":
        width = first["heads"] * first["head_dim"]
        shape = f"{first['batch']} x {first['n']} tokens, {first['layers']} layers x {width}, {first['heads']} heads"
        title = f"ms per pass through an encoder (times nystrom), {shape}, {about}, {threads}"
        rows = [{**line, "encoder": NAMES[line["method"]], "method": direction(line)} for line in lines]
        return grid(title, rows, "encoder", {direction(line): direction(line) for line in lines}, cell)
    shape = f"{first['batch']} x {first['heads']} heads x {first['head_dim']}"
    title = f"ms per {direction(first)} (times nystrom), {shape}, {about}, {first['layout']}, {threads}"
    table = grid(title, lines, "n", NAMES, cell)
    shares = {str(line["n"]): f"{line['matmul_share']:.0%}" for line in lines if "matmul_share" in line}
    if not shares:
        return table
    rows = [[*row, shares.get(row[0], "-")] for row in table.rows]
    return Grid(title, [*table.headings, "nystrom's share of matmul peak"], rows)


def direction(line: Line) -> str:
    """As tables call it."""
    return "forward + backward" if line["backward"] else "forward"
