"""Whole training steps of Long Range Arena's model, with every kind of attention: time, and memory in a fresh process.

nystrom bench lra --length 4096 --batch 32 --out lra.jsonl
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from nystrom import memory
from nystrom.bench.lines import Grid, Line, record, show
from nystrom.bench.memory import MIB
from nystrom.bench.methods import check_sizes, three_factor
from nystrom.bench.timing import take_turns, times_ours
from nystrom.lra.kinds import Kind, Settings, make_attend, resolve
from nystrom.lra.model import Attention, LraClassifier, Sizes

Measured = Literal[Kind, "nystrom_original"]
"""A kind of `nystrom lra`, or the form that the attention has in the code of Nyströmformer's authors."""


@dataclass(frozen=True, kw_only=True)
class Lra:
    """Training steps of Long Range Arena's model: milliseconds, examples a second, peak memory."""

    length: int = 4096
    """Tokens of every example, none of them padding."""
    batch: int = 32
    """Examples of a step (count)."""
    kinds: tuple[Measured, ...] = get_args(Measured)
    """What to measure, beside nystrom, which the others are compared with."""
    rounds: int = 3
    """Times that every kind takes a step, in turn (count)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: under autocast, as `nystrom lra` trains where the hardware multiplies in it."""
    threads: int = torch.get_num_threads()
    """Threads that torch computes with."""
    keep_freed: bool = True
    """Keep what tensors give back for the next ones (see `nystrom.memory.keep_freed`); the lines say whether it was."""
    out: Path | None = None
    """File to append the JSON lines to."""


def run(config: Lra) -> list[Line]:
    """Measure, print a table, and append the lines to config.out."""
    check_sizes(length=config.length, batch=config.batch, rounds=config.rounds, threads=config.threads)
    if not config.kinds:
        raise ValueError(f"kinds must name at least one: {', '.join(get_args(Measured))}")
    if "nystrom_original" in config.kinds and config.length % 64:
        raise ValueError(f"nystrom_original needs a length that its 64 landmarks divide: got {config.length}")
    lines = record("lra", measure(config), config.out)
    show(summary(lines))
    return lines


def measure(config: Lra) -> list[Line]:
    """One line per kind; ms is the median over the rounds, times_nystrom the median of the rounds' ratios."""
    about = {name: value for name, value in asdict(config).items() if name not in ("kinds", "out", "length")}
    about["keep_freed"] = config.keep_freed and memory.keep_freed()
    kinds = tuple(dict.fromkeys(("nystrom", *config.kinds)))
    peaks = {kind: peak_elsewhere(config, kind) for kind in kinds}  # first, while this process holds nothing
    steps = {kind: make_step(kind, config.length, config.batch, config.precision) for kind in kinds}
    times = take_turns(cast(Any, steps), config.rounds, 0.0, config.threads)
    return [
        {
            "method": kind,
            "n": config.length,
            "ms": median(times[kind]),
            "examples_per_second": 1e3 * config.batch / median(times[kind]),
            "times_nystrom": times_ours(times[kind], times["nystrom"]),
            "peak_mib": peaks[kind] / MIB,
            **about,
        }
        for kind in kinds
    ]


def make_step(kind: str, length: int, batch: int, precision: str) -> Callable[[], None]:
    """A training step on random bytes: forward, backward, AdamW."""
    torch.manual_seed(0)
    model = make_model(kind, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    input_ids, labels = torch.randint(1, 256, (batch, length)), torch.randint(2, (batch,))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = cast(Tensor, model(input_ids, labels=labels).loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_model(kind: str, length: int) -> LraClassifier:
    """The classifier of the text task at this length."""
    sizes = Sizes(vocab_size=512, max_length=length, num_classes=2, mean_over_all=True)
    if kind != "nystrom_original":
        settings = resolve(kind, Settings())
        kernel = settings["conv_kernel_size"] or None
        return LraClassifier(sizes, make_attend(kind, sizes, settings), kernel, shared_key=kind == "reformer")
    settings = resolve("nystrom", Settings())
    h, k, m = sizes.num_heads, settings["conv_kernel_size"], settings["num_landmarks"]
    model = LraClassifier(sizes, lambda _: lambda query, key, value, mask: three_factor(query, key, value, m), k)
    for module in model.modules():
        if isinstance(module, Attention):
            module.conv = cast(Any, nn.Conv2d(h, h, (k, 1), padding=(k // 2, 0), groups=h, bias=False))
    return model


def peak_elsewhere(config: Lra, kind: str) -> int:
    """Bytes that a first step needs at its peak in a process of its own, beyond the model and its inputs."""
    request = json.dumps([kind, config.length, config.batch, config.precision, config.threads, config.keep_freed])
    done = subprocess.run([sys.executable, "-m", "nystrom.bench.steps", request], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"measuring {kind} failed:\n{done.stderr}")
    return int(done.stdout)


def peak_of_this_process(kind: str, length: int, batch: int, precision: str, threads: int, keep_freed: bool) -> int:
    """The same, here; run once per process."""
    if keep_freed:
        memory.keep_freed()
    torch.set_num_threads(threads)
    make_step(kind, 64, 1, precision)()  # loads the kernels and their thread pools, which are not the kind's
    step = make_step(kind, length, batch, precision)
    before = memory.reset_host_peak()
    step()
    return memory.host_peak_above(before)


def summary(lines: list[Line]) -> Grid:
    """The lines of one run as a table, the fastest kind first."""
    first = lines[0]
    title = (
        f"a training step of {first['batch']} x {first['n']} tokens, {first['precision']}, {first['threads']} threads"
        + (", freed memory kept" if first.get("keep_freed") else "")
    )
    headings = ["attention", "ms", "of nystrom's", "examples/s", "peak MiB"]
    rows = [
        [
            line["method"],
            f"{line['ms']:.0f}",
            f"{line['times_nystrom']:.2f}x",
            f"{line['examples_per_second']:.1f}",
            f"{line['peak_mib']:.0f}",
        ]
        for line in sorted(lines, key=lambda line: line["ms"])
    ]
    return Grid(title, headings, rows)


if __name__ == "__main__":
    print(peak_of_this_process(*json.loads(sys.argv[1])))
