"""How much memory attention takes: the peak of a fresh process over what its inputs and output need.

nystrom bench memory --lengths 4096 16384 --out memory.jsonl
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nystrom import memory
from nystrom.bench.lines import Grid, Line, grid, record, show
from nystrom.bench.methods import NAMES, Form, check_sizes, methods, random_inputs

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak memory of attention in a fresh process, beyond its inputs and output."""

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    """Sequence lengths (tokens)."""
    batch: int = 1
    """Samples (count)."""
    heads: int = 12
    """Heads (count)."""
    head_dim: int = 64
    """Width of a head."""
    num_landmarks: int = 64
    """Landmarks (count)."""
    forms: tuple[Form, ...] = ("nystrom", "exact", "three_factor", "hf", "lucidrains")
    """What to measure; a form that is not installed, or cannot run at a length, is left out."""
    backward: bool = False
    """Forward and backward together, instead of the forward alone."""
    threads: int = torch.get_num_threads()
    """Threads that torch computes with; each has buffers of its own."""
    out: Path | None = None
    """File to append the JSON lines to."""


def run(config: Memory) -> list[Line]:
    """Measure, print a table, and append the lines to config.out."""
    check_sizes(
        lengths=config.lengths, batch=config.batch, heads=config.heads, head_dim=config.head_dim, threads=config.threads
    )
    check_sizes(num_landmarks=config.num_landmarks)
    if not config.forms:
        raise ValueError(f"forms must name at least one: {', '.join(NAMES)}")
    lines = record("memory", (line for n in config.lengths for line in measure_all(config, n)), config.out)
    show(summary(lines))
    return lines


def summary(lines: list[Line]) -> Grid:
    """The lines of one run as a table of MiB."""
    first = lines[0]
    what = "forward + backward" if first["backward"] else "forward"
    sizes = f"{first['batch']} x {first['heads']} heads x {first['head_dim']}, m = {first['num_landmarks']}"
    title = f"peak MiB beyond inputs and results, {what}, {sizes}, float32, {first['threads']} threads"
    return grid(title, lines, "n", NAMES, "{extra_mib:.1f}")


def measure_all(config: Memory, n: int) -> list[Line]:
    """One line per form that can run at this length."""
    lines = (measure(config, form, n) for form in config.forms)
    return [line for line in lines if line is not None]


def measure(config: Memory, form: str, n: int) -> Line | None:
    """One line for one form at one length, from a process of its own; None where the form cannot run."""
    sizes = {k: v for k, v in asdict(config).items() if k not in ("lengths", "forms", "out")}
    request = json.dumps({**sizes, "form": form, "n": n})
    command = [sys.executable, "-m", "nystrom.bench.memory", request]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"measuring {form} at n = {n} failed:\n{done.stderr}")
    extra = json.loads(done.stdout)
    return None if extra is None else {"method": form, "n": n, "extra_mib": extra / MIB, **sizes}


def peak_of_this_process(request: str) -> int | None:
    """Bytes that one call needed at its peak, beyond what was there before and its results; run once per process."""
    wanted = json.loads(request)
    b, h, n, d = (wanted[name] for name in ("batch", "heads", "n", "head_dim"))
    torch.set_num_threads(wanted["threads"])
    attend = methods(h, n, d, wanted["num_landmarks"]).get(wanted["form"])
    if attend is None:
        return None
    small = 2 * wanted["num_landmarks"]  # load the kernels and their thread pools first: they are not the method's
    for length in (small, n):
        form = methods(h, length, d, wanted["num_landmarks"])[wanted["form"]]
        inputs = random_inputs(b, h, length, d)
        if wanted["backward"]:
            inputs = tuple(x.requires_grad_() for x in inputs)
        before = memory.reset_host_peak()
        with torch.set_grad_enabled(wanted["backward"]):
            out = form(*inputs)
            results = out.nbytes
            if wanted["backward"]:
                out.sum().backward()
                results += sum(x.nbytes for x in inputs)  # the gradients
        extra = memory.host_peak() - before - results
    return max(0, extra)


if __name__ == "__main__":
    print(json.dumps(peak_of_this_process(sys.argv[1])))
