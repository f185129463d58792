"""What a long sequence will cost: time, memory and traffic of an encoder's blocks, from small ones measured here.

nystrom plan --length 1e6 --layers 12 --ranks 8
nystrom plan --length 262144 --layers 2 --chunk 16384 --measure --out plan.jsonl

Time of linear attention is in proportion to the length and to the number of blocks; memory lies on lines, drawn through
one block of two lengths and two of the longer, each measured in a fresh process. Traffic is counted by formula.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import torch

from nystrom.bench.blocks import Cost, Step, blocks, launch
from nystrom.bench.lines import Grid, Line, record, show
from nystrom.bench.methods import check_sizes
from nystrom.distributed import traffic

FIRST = 2048
"""Tokens of the shortest block that is measured, if none is streamed."""
CHUNK, CHUNKS = 2048, 8
"""Tokens at a time of streamed blocks that are measured, and how many chunks the shortest has."""
LONG = 4.0
"""Seconds of a step after which no longer one is measured."""
STATE = {True: 12, False: 4}
"""Bytes that a parameter holds before a step: the weight, and AdamW's two moments where it trains."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predict time, memory and traffic of an encoder's blocks at any length, on any number of ranks."""

    length: int | float
    """Tokens of the whole sequence; 1e6 is a million."""
    layers: int = 12
    """Blocks (count). Embeddings and heads are left out: they are the task's."""
    ranks: int = 1
    """Processes that hold a stretch of the sequence each, by `nystrom.distributed.split_sequence` (count)."""
    chunk: int | None = None
    """Tokens at a time by `nystrom.streaming.stream_blocks`, on one rank; default: all."""
    embed_dim: int = 512
    """c, model width."""
    heads: int = 8
    """Heads per block (count)."""
    ffn_dim: int | None = None
    """Width inside the feed-forward parts; default 4 c."""
    kind: Literal["nystrom", "shift"] = "nystrom"
    """Attention."""
    num_landmarks: int = 64
    """Landmarks (count)."""
    conv_kernel_size: int = 33
    """Tokens spanned by the convolution skip; odd, or 0 for none."""
    batch: int = 1
    """Sequences at a time (count)."""
    train: bool = True
    """Forward, backward and gradients averaged over the ranks; else forward alone."""
    ranks_per_host: int = 1
    """Ranks that share a machine, and take memory bandwidth from each other (count)."""
    bandwidth: float = 10.0
    """Of the network between the ranks (Gbit/s)."""
    threads: int = torch.get_num_threads()
    """Threads that torch computes with, on each rank."""
    measure: bool = False
    """Make the step at its full size too, all ranks on this machine, and say how far off the prediction was."""
    out: Path | None = None
    """File to append a JSON line to."""


class Small(NamedTuple):
    """A measurement that the prediction stands on."""

    step: Step
    cost: Cost


def run(config: Plan) -> list[Line]:
    """Measure small blocks, print what follows for the large ones, and append a line to config.out.

    Raises:
        ValueError: a setting out of range, or settings that do not go together, before anything is measured.
        RuntimeError: a measurement failed.
    """
    check(config)
    lines = record("plan", [plan(config)], config.out)
    show(summary(lines))
    print(advice(lines[0]))
    return lines


def check(config: Plan) -> None:
    """Raise ValueError for what cannot be planned."""
    sizes = ("layers", "ranks", "ranks_per_host", "embed_dim", "heads", "num_landmarks", "batch", "threads")
    check_sizes(**{name: getattr(config, name) for name in sizes})
    if config.ffn_dim is not None:
        check_sizes(ffn_dim=config.ffn_dim)
    if config.length < 1 or not float(config.length).is_integer():
        raise ValueError(f"length must be a whole number of tokens, at least 1: got {config.length}")
    if config.ranks > config.length:
        raise ValueError(f"ranks must be at most the length {config.length:.0f}: got {config.ranks}")
    if config.ranks_per_host > config.ranks:
        raise ValueError(f"ranks_per_host must be at most ranks {config.ranks}: got {config.ranks_per_host}")
    if config.chunk is not None and config.ranks > 1:
        raise ValueError(f"blocks are streamed on one rank alone: got chunk {config.chunk} and ranks {config.ranks}")
    if not config.bandwidth > 0:
        raise ValueError(f"bandwidth must be positive: got {config.bandwidth}")
    parameters(of(config))


def of(config: Plan) -> Step:
    """The step that is planned."""
    names = ("layers", "ranks", "chunk", "embed_dim", "heads", "kind", "num_landmarks", "batch", "train", "threads")
    return Step(
        n=int(config.length),
        ffn_dim=config.ffn_dim or 4 * config.embed_dim,
        conv_kernel_size=config.conv_kernel_size or None,
        **{name: getattr(config, name) for name in names},
    )


def plan(config: Plan) -> Line:
    """The prediction, what it stands on, and the truth where it was asked for."""
    wanted = of(config)
    stretch = -(-wanted.n // wanted.ranks)
    small = measure_small(wanted, stretch, config.ranks_per_host)
    cost = predict(wanted, stretch, small, config.bandwidth)
    before = STATE[wanted.train] * wanted.layers * parameters(wanted) + 4 * wanted.batch * stretch * wanted.embed_dim
    line: Line = {
        "method": wanted.kind,
        "n": wanted.n,
        "stretch": stretch,
        **cost._asdict(),
        "memory_in_all": before + cost.memory,
        "small": [{**{k: getattr(s, k) for k in ("n", "layers", "chunk")}, **c._asdict()} for s, c in small],
        "bandwidth": config.bandwidth,
        "ranks_per_host": config.ranks_per_host,
        **{k: v for k, v in asdict(wanted).items() if k not in ("n", "kind")},
    }
    if config.measure:
        line["measured"] = largest(launch(wanted))._asdict()
    return line


def largest(costs: list[Cost]) -> Cost:
    """Of several ranks: what the slowest takes, and what the one with the most holds and sends."""
    return Cost(*(max(values) for values in zip(*costs, strict=True)))


def measure_small(wanted: Step, stretch: int, at_once: int) -> list[Small]:
    """One block of some length, one of twice as many tokens, and two of those: as long as takes seconds.

    A chunk and a length of a part of the size need that part of time and memory. So streamed blocks are measured with
    small chunks, but with so many that another one adds its own cost alone. Each is made so many times at once.
    """
    chunk, scale = scaled(wanted)
    most = max(1, int(scale * stretch) // 2)
    n = min(FIRST if chunk is None else CHUNKS * chunk, most)

    def small(n: int, layers: int) -> Small:
        step = replace(wanted, n=n, layers=layers, ranks=1, chunk=chunk)
        return Small(step, largest(launch(step, at_once, min(1.0, n / stretch if chunk is None else scale))))

    of_one = [small(n, 1), small(2 * n, 1)]
    while 2 * of_one[-1].step.n <= most and of_one[-1].cost.seconds < LONG:
        of_one.append(small(2 * of_one[-1].step.n, 1))
    return [*of_one[-2:], small(of_one[-1].step.n, 2)]


def scaled(wanted: Step) -> tuple[int | None, float]:
    """The chunk of small streamed blocks, and what part it is of the wanted one."""
    if wanted.chunk is None:
        return None, 1.0
    chunk = min(wanted.chunk, CHUNK)
    return chunk, chunk / wanted.chunk


def predict(wanted: Step, stretch: int, small: list[Small], bandwidth: float) -> Cost:
    """What the measurements come to at this stretch and this many blocks: time in proportion, memory on lines.

    Args:
        wanted: the step.
        stretch: tokens of a rank.
        small: as `measure_small` gives them.
        bandwidth: between the ranks (Gbit/s).
    """
    (short, at_short), (long, at_long), (_, at_two) = small
    scale = scaled(wanted)[1]
    n, gradients = scale * stretch, 4 * parameters(wanted) if wanted.train else 0
    rate = median(cost.seconds / (step.n * step.layers) for step, cost in small)  # one of three may be disturbed
    seconds = wanted.layers * n * rate / scale
    slope = (at_long.memory - at_short.memory) / (long.n - short.n)
    another = (at_two.memory - at_long.memory - gradients) / long.n  # block; bytes per token
    memory = at_long.memory - gradients + (n - long.n) * slope + (wanted.layers - 1) * n * another
    copies = wanted.layers * (2 if wanted.ranks > 1 else 1)  # DistributedDataParallel holds the gradients once more
    sent = bytes_sent(wanted)
    return Cost(seconds + 8 * sent / (1e9 * bandwidth), memory / scale + copies * gradients, sent)


def bytes_sent(step: Step) -> int:
    """Of tensors that a rank gives to collectives in a step, by formula."""
    if step.ranks == 1:
        return 0
    d = step.embed_dim // step.heads
    h, m = step.heads, step.num_landmarks
    forward, backward = traffic(step.kind, batch=step.batch, heads=h, head_dim=d, value_dim=d, num_landmarks=m)
    if step.conv_kernel_size:  # the lengths, both edges, and in the backward pass the edges of all ranks
        edges = 2 * 4 * step.batch * step.embed_dim * (step.conv_kernel_size // 2)
        forward, backward = forward + 8 + edges, backward + step.ranks * edges
    return step.layers * (forward + (backward + 4 * parameters(step) if step.train else 0))


def parameters(step: Step) -> int:
    """Of one block (count)."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in blocks(replace(step, layers=1)).parameters())


UNITS = {"seconds": 1.0, "memory": 2.0**30, "bytes_sent": 1e6}
"""What is predicted, and the unit it is shown in."""


def summary(lines: list[Line]) -> Grid:
    """Plans as a table, one to a row; what was measured beside what was predicted."""
    rows = []
    for line in lines:
        how = f"{line['ranks']} ranks" if line["ranks"] > 1 else "one rank"
        if line["chunk"] is not None:
            how += f", chunks of {line['chunk']:,}"
        what = [f"{line['n']:,}", how, str(line["layers"]), "training" if line["train"] else "forward"]
        costs = [shown(line, name, unit) for name, unit in UNITS.items()]
        rows.append([*what, *costs, f"{line['memory_in_all'] / 2**30:.3g}"])
    first = lines[0]
    sizes = f"width {first['embed_dim']}, {first['heads']} heads, m = {first['num_landmarks']}, batch {first['batch']}"
    headings = ["tokens", "on", "blocks", "step", "seconds", "GiB a step makes", "MB a rank sends", "GiB in all"]
    return Grid(f"{first['method']}, {sizes}, float32, {first['threads']} threads a rank", headings, rows)


def shown(line: Line, name: str, unit: float) -> str:
    """A prediction, and beside it the truth and how far off it was."""
    said, truth = f"{line[name] / unit:.3g}", line.get("measured", {}).get(name)
    if not truth:
        return said
    return f"{said} (is {truth / unit:.3g}: {100 * (line[name] / truth - 1):+.0f} %)"


def advice(line: Line) -> str:
    """How to read the table, and what to do where a rank needs more than this machine has."""
    import psutil

    said = (
        "Blocks alone, without embeddings and heads. GiB in all: a rank's, with weights, AdamW's moments and input. "
        f"Time is this machine's, with {line['bandwidth']:g} Gbit/s between the ranks."
    )
    has = psutil.virtual_memory().total
    if line["memory_in_all"] > has:
        more = "more ranks" if line["ranks"] > 1 or line["chunk"] else "--chunk 16384, or more ranks"
        said += f"\nA rank needs more than the {has / 2**30:.3g} GiB of this machine: try {more}."
    return said
