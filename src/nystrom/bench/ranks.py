"""Attention over a sequence that processes share: how much faster than one alone, and what they send each other.

nystrom bench ranks --length 65536 --ranks 1 2 --out ranks.jsonl
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from nystrom.bench.lines import Grid, Line, record, show
from nystrom.bench.methods import check_sizes
from nystrom.distributed import (
    sequence_parallel_nystrom_attention,
    sequence_parallel_spectral_shift_attention,
    traffic,
)
from nystrom.functional import nystrom_attention
from nystrom.spectral import spectral_shift_attention

ATTENDS = {
    "nystrom": (nystrom_attention, sequence_parallel_nystrom_attention),
    "shift": (spectral_shift_attention, sequence_parallel_spectral_shift_attention),
}


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Forward and backward of one attention on several processes of this machine, a thread each, over gloo."""

    length: int = 65536
    """Tokens of the whole sequence."""
    ranks: tuple[int, ...] = (1, 2)
    """Processes that share it (count); 1: the attention of one process, which the others are compared with."""
    kind: Literal["nystrom", "shift"] = "nystrom"
    """Which attention."""
    heads: int = 8
    """Heads (count)."""
    head_dim: int = 64
    """Width of a head."""
    num_landmarks: int = 64
    """Landmarks (count)."""
    calls: int = 3
    """Calls in each round, after one that is not timed (count)."""
    rounds: int = 3
    """Rounds, in which the numbers of processes take turns (count)."""
    out: Path | None = None
    """File to append the JSON lines to."""


def run(config: Ranks) -> list[Line]:
    """Measure, print a table, and append the lines to config.out."""
    check_sizes(length=config.length, ranks=config.ranks, heads=config.heads, head_dim=config.head_dim)
    check_sizes(num_landmarks=config.num_landmarks, calls=config.calls, rounds=config.rounds)
    if config.ranks[0] != 1 or max(config.ranks) > config.length:
        raise ValueError(f"ranks must begin with 1 and be at most the length {config.length}: got {config.ranks}")
    lines = record("ranks", measure(config), config.out)
    show(summary(lines))
    return lines


def measure(config: Ranks) -> Iterator[Line]:
    """A line for each number of processes; times_one is the median over the rounds of how many times as fast as one."""
    about = {k: v for k, v in asdict(config).items() if k not in ("length", "ranks", "out")}
    found: dict[int, list[dict[str, Any]]] = {ranks: [] for ranks in config.ranks}
    for _ in range(config.rounds):
        for ranks in config.ranks:
            found[ranks].append(launch(config, ranks))
    alone = [one["ms"] for one in found[1]]
    for ranks, own in found.items():
        ms = [one["ms"] for one in own]
        yield {
            "method": config.kind,
            "n": config.length,
            "ranks": ranks,
            "ms": median(ms),
            "times_one": median(one / other for one, other in zip(alone, ms, strict=True)),
            "bytes_sent": own[0]["bytes_sent"],
            "bytes_predicted": sum(predicted(config)) if ranks > 1 else 0,
            **about,
        }


def predicted(config: Ranks) -> tuple[int, int]:
    """Bytes that a rank gives to the collectives, forward and backward, by the formula."""
    h, d, m = config.heads, config.head_dim, config.num_landmarks
    return traffic(config.kind, batch=1, heads=h, head_dim=d, value_dim=d, num_landmarks=m)


def launch(config: Ranks, ranks: int) -> dict[str, Any]:
    """One round with so many processes, each with one thread."""
    request = json.dumps({**asdict(config), "out": None, "ranks": ranks})
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "nystrom.bench.ranks", request, str(rank), f"{folder}/meeting"],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        told = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, told, strict=True):
        if process.returncode != 0:
            raise RuntimeError(f"measuring {ranks} processes failed:\n{errors}")
    return json.loads(told[0][0])


def work(wanted: dict[str, Any], rank: int, meeting: str) -> dict[str, Any]:
    """This rank's part of a round."""
    torch.set_num_threads(1)
    ranks, n = wanted["ranks"], wanted["length"]
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    attend = ATTENDS[wanted["kind"]][ranks > 1]
    own = n // ranks + (rank < n % ranks)
    shape = 1, wanted["heads"], own, wanted["head_dim"]
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    grad = torch.randn(shape)

    def call() -> None:
        torch.autograd.grad(attend(*inputs, num_landmarks=wanted["num_landmarks"]), inputs, grad)

    with Sent() as sent:
        call()
    times = []
    for _ in range(wanted["calls"]):
        dist.barrier()
        start = perf_counter()
        call()
        dist.barrier()
        times.append(perf_counter() - start)
    dist.destroy_process_group()
    return {"ms": 1e3 * median(times), "bytes_sent": sent.bytes}


class Sent(TorchDispatchMode):
    """Counts the bytes of the tensors that this rank gives to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "barrier" not in func.__name__:
            given = args[1] if "allgather" in func.__name__ else args[0]
            flat = [x for one in given for x in (one if isinstance(one, list) else [one])]
            self.bytes += sum(x.nbytes for x in flat)
        return func(*args, **(kwargs or {}))


def summary(lines: list[Line]) -> Grid:
    """The lines of one run as a table."""
    first = lines[0]
    sizes = f"{first['n']} tokens, {first['heads']} heads x {first['head_dim']}, m = {first['num_landmarks']}"
    rows = [
        [
            str(line["ranks"]),
            f"{line['ms']:.0f}",
            f"{line['times_one']:.2f}x",
            f"{line['bytes_sent']:,}",
            f"{line['bytes_predicted']:,}",
        ]
        for line in lines
    ]
    headings = ["processes", "ms", "as fast as one", "bytes a rank sends", "predicted"]
    return Grid(f"{first['method']}, forward + backward, {sizes}, float32, a thread each", headings, rows)


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
