"""The five tasks as Nyströmformer's authors trained them, and the accuracies that were published.

Settings: their `LRA/code/lra_config.py`. Accuracies: Xiong et al. 2021, arXiv:2102.03902, Table 3.
"""

from typing import Literal, NamedTuple

TaskName = Literal["listops", "text", "retrieval", "image", "pathfinder32", "pathfinder64", "pathfinder128"]


class Task(NamedTuple):
    """Sizes and schedule of a task."""

    vocab_size: int
    """Rows of the token table, more than there are tokens (count)."""
    length: int
    """Tokens of an input that are read (count)."""
    max_length: int
    """The next power of two: rows of the position table, and the divisor of their mean (tokens)."""
    num_classes: int
    """Classes (count)."""
    pairs: bool
    """Two inputs are compared."""
    images: bool
    """Inputs are grey levels, of which 0 is black; elsewhere 0 is padding."""
    batch_size: int
    """Examples of a step (count)."""
    steps: int
    """Optimiser steps (count)."""
    warmup: int
    """Of these, while the learning rate rises (count)."""
    eval_steps: int
    """Steps between two looks at the dev set (count)."""


_IMAGE = {"vocab_size": 512, "length": 1024, "max_length": 1024, "pairs": False, "images": True, "batch_size": 256}
_BYTES = {"vocab_size": 512, "length": 4000, "max_length": 4096, "num_classes": 2, "images": False, "batch_size": 32}
TASKS: dict[str, Task] = {
    "listops": Task(32, 2000, 2048, 10, False, False, 32, steps=5_000, warmup=1_000, eval_steps=50),
    "text": Task(**_BYTES, pairs=False, steps=20_000, warmup=8_000, eval_steps=500),
    "retrieval": Task(**_BYTES, pairs=True, steps=30_000, warmup=800, eval_steps=300),
    "image": Task(**_IMAGE, num_classes=10, steps=35_000, warmup=175, eval_steps=175),
    "pathfinder32": Task(**_IMAGE, num_classes=2, steps=62_400, warmup=312, eval_steps=312),
}
NAMES = {
    "listops": "ListOps",
    "text": "Text",
    "retrieval": "Retrieval",
    "aan-subset": "AAN subset",
    "image": "Image",
    "pathfinder32": "Pathfinder32",
}
"""Tasks as the table heads them, in its order; others come after."""
PUBLISHED: dict[str, dict[str, float]] = {
    "softmax": {"listops": 37.10, "text": 65.02, "retrieval": 79.35, "image": 38.20, "pathfinder32": 74.16},
    "reformer": {"listops": 19.05, "text": 64.88, "retrieval": 78.64, "image": 43.29, "pathfinder32": 69.36},
    "linformer": {"listops": 37.25, "text": 55.91, "retrieval": 79.37, "image": 37.84, "pathfinder32": 67.60},
    "performer": {"listops": 18.80, "text": 63.81, "retrieval": 78.62, "image": 37.07, "pathfinder32": 69.87},
    "nystrom": {"listops": 37.15, "text": 65.52, "retrieval": 79.56, "image": 41.58, "pathfinder32": 70.94},
}
"""Per cent. Reformer with 2 hashes, Linformer and Performer with 256 features, Nyströmformer's landmarks not said."""


def task_of(name: str) -> Task:
    """The task of the authors that a report's name stands for, or the one of which it is a kin."""
    if name.startswith("pathfinder"):
        return TASKS["pathfinder32"]
    return TASKS["retrieval" if name == "aan-subset" else name]
