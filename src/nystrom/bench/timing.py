"""Milliseconds per call, of several things in turns, and what a matrix product reaches meanwhile."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter

import torch

Step = Callable[[], object]
"""One call of what is timed."""

MATMULS: dict[str, tuple[int, int]] = {"mm 1024": (1, 1024), "mm 2048": (1, 2048), "bmm 12 x 512": (12, 512)}
"""Square float32 products, as (how many at once, side), among which the machine's peak is looked for."""


def take_turns(steps: dict[str, Step], rounds: int, seconds: float, threads: int) -> dict[str, list[float]]:
    """Milliseconds of each step in each round: the median of its calls, which go on for at least `seconds`.

    Nothing is called beforehand, as some calls take half a minute: what a first call costs more falls to the first
    round, which a median over three or more leaves out.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    with torch_threads(threads):
        for _ in range(rounds):
            for name, step in steps.items():
                times[name].append(1e3 * median(calls(step, seconds)))
    return times


def calls(step: Step, seconds: float) -> list[float]:
    """Seconds of each call, called until they add up to `seconds`."""
    times: list[float] = []
    while not times or sum(times) < seconds:
        start = perf_counter()
        step()
        times.append(perf_counter() - start)
    return times


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch compute with this many threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def times_ours(times: list[float], ours: list[float]) -> float:
    """The median of the rounds' ratios: what slows a whole round down cancels."""
    return median(t / o for t, o in zip(times, ours, strict=True))


def matmul_steps() -> dict[str, Step]:
    """One step per product of MATMULS."""

    def product(b: int, side: int) -> Step:
        left, right = torch.randn(2, b, side, side).unbind()
        return (lambda: left @ right) if b > 1 else (lambda: left[0] @ right[0])

    return {name: product(*shape) for name, shape in MATMULS.items()}


def matmul_peaks(times: dict[str, list[float]]) -> list[float]:
    """GFLOP/s of the fastest of MATMULS, per round."""
    gflop = {name: b * 2 * side**3 / 1e9 for name, (b, side) in MATMULS.items()}
    rounds = zip(*(times[name] for name in MATMULS), strict=True)
    return [max(gflop[name] / (1e-3 * ms) for name, ms in zip(MATMULS, found, strict=True)) for found in rounds]


def nystrom_matmul_flops(b: int, h: int, n: int, d: int, num_landmarks: int, num_pinv_iters: int) -> int:
    """Floating-point operations in the matrix products of one forward pass, self-attention (a multiply-add is two)."""
    m = min(num_landmarks, n)
    outer = 4 * 2 * n * m * d  # logits and values, of landmarks over tokens and of tokens over landmarks
    core = 2 * 2 * m * m * d  # its logits, and its inverse times the landmarks' values
    inverse = num_pinv_iters * 4 * 2 * m**3
    return b * h * (outer + core + inverse)
