"""Work in numbered chunks, in one process or several, with a progress bar."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def in_order(make: Callable[[int], T], processes: int) -> Generator[T, None, None]:
    """make(0), make(1) and so on, without end: close it. What comes out does not depend on the number of processes.

    Args:
        make: of the chunk's number; where there are several processes, one that can be pickled.
        processes: 1: this one. More: so many new ones.

    Raises:
        ValueError: processes is less than 1.
    """
    if processes < 1:
        raise ValueError(f"processes must be 1 or more: got {processes}")
    if processes == 1:
        yield from map(make, count())
    numbers = count()
    # new ones, not forks: torch may have started threads
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        waiting = deque(pool.submit(make, next(numbers)) for _ in range(2 * processes))
        while True:
            yield waiting.popleft().result()
            waiting.append(pool.submit(make, next(numbers)))
    finally:
        pool.shutdown(cancel_futures=True)


def generator(seed: int, chunk: int) -> np.random.Generator:
    """Random numbers of a chunk, independent of those of any other chunk or seed.

    Raises:
        ValueError: seed is negative.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more: got {seed}")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(chunk,)))


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where that is a terminal; call what it gives with the number of items done since."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)
