"""How far Nyström attention is from exact attention, over landmarks, iterations and kinds, on synthetic inputs.

nystrom bench synthetic --lengths 512 2048 --landmarks 16 64 256
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nystrom.bench.lines import Grid, Line, grid, record, show, tables
from nystrom.bench.methods import check_sizes
from nystrom.functional import nystrom_attention

KINDS: dict[str, dict[str, Any]] = {
    "published": {},
    "chebyshev": {"pinv": "chebyshev"},
    "ridge": {"pinv": "ridge"},
    "svd": {"pinv": "svd"},
    "strided": {"landmarks": "strided"},
    "kmeans": {"landmarks": "kmeans"},
}
"""Options of `nystrom_attention` that are compared."""


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Relative error of the attention output against exact attention, on tokens that drift as real ones do."""

    lengths: tuple[int, ...] = (512, 2048)
    """Sequence lengths (tokens)."""
    landmarks: tuple[int, ...] = (16, 32, 64, 128)
    """Landmark counts."""
    pinv_iters: tuple[int, ...] = (2, 4, 6, 8, 12)
    """Steps of the inverse iteration (counts)."""
    kinds: bool = True
    """Compare the kinds of inverses and landmarks as well, each with its default options."""
    heads: int = 12
    """Heads, each with its own inputs (count)."""
    head_dim: int = 64
    """Width of a head."""
    smoothness: float = 0.9
    """Correlation of neighbouring tokens, 0 (independent) to below 1."""
    seed: int = 0
    """Of the inputs."""
    out: Path | None = None
    """File to append the JSON lines to."""


def run(config: Synthetic) -> list[Line]:
    """Measure, print a table per length, and append the lines to config.out."""
    check_sizes(lengths=config.lengths, landmarks=config.landmarks, pinv_iters=config.pinv_iters)
    check_sizes(heads=config.heads, head_dim=config.head_dim)
    if not 0 <= config.smoothness < 1:
        raise ValueError(f"smoothness must be in [0, 1): got {config.smoothness}")
    lines = record("synthetic", (line for n in config.lengths for line in measure(config, n)), config.out)
    show(*(summary(table) for table in tables(lines)))
    return lines


def summary(lines: list[Line]) -> Grid:
    """The lines of one length as a table: landmarks down, iterations or kinds across."""
    first = lines[0]
    if first.get("what") == "kinds":
        title = f"relative error of the output by kind, n = {first['n']}, smoothness {first['smoothness']}"
        return grid(title, lines, "num_landmarks", {name: name for name in KINDS}, "{relative_error:.3f}")
    by_iterations = [{**line, "method": f"{line['num_pinv_iters']} iterations"} for line in lines]
    columns = {line["method"]: line["method"] for line in by_iterations}
    title = f"relative error of the output, n = {first['n']}, smoothness {first['smoothness']}"
    return grid(title, by_iterations, "num_landmarks", columns, "{relative_error:.3f}")


def measure(config: Synthetic, n: int) -> list[Line]:
    """One line per landmark and iteration count, and per landmark count and kind; the error is the heads' median."""
    generator = torch.Generator().manual_seed(config.seed)
    query, key, value = (drifting_tokens(config, n, generator) for _ in range(3))
    exact = F.scaled_dot_product_attention(query, key, value)

    def line(method: str, m: int, options: dict[str, Any]) -> Line:
        approximate = nystrom_attention(query, key, value, num_landmarks=m, **options)
        per_head = (approximate - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3))
        error = {"relative_error": median(per_head.flatten().tolist()), "seed": config.seed}
        sizes = {"heads": config.heads, "head_dim": config.head_dim, "smoothness": config.smoothness}
        return {"method": method, "n": n, "num_landmarks": m, **options, **error, **sizes}

    steps = [line("nystrom", m, {"num_pinv_iters": k}) for m in config.landmarks for k in config.pinv_iters]
    kinds = [line(name, m, options) for m in config.landmarks for name, options in KINDS.items() if config.kinds]
    return steps + [{**kind, "what": "kinds"} for kind in kinds]


def drifting_tokens(config: Synthetic, n: int, generator: torch.Generator) -> Float[Tensor, "1 h n d"]:
    """Unit-variance tokens, each `smoothness` times the last plus fresh noise (float64)."""
    a = config.smoothness
    noise = torch.randn(1, config.heads, n, config.head_dim, dtype=torch.float64, generator=generator)
    tokens = [noise[:, :, 0]]
    for i in range(1, n):
        tokens.append(a * tokens[-1] + (1 - a * a) ** 0.5 * noise[:, :, i])
    return torch.stack(tokens, dim=2)
