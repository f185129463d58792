"""What is to be learnt: training examples, scored sets, metrics. From GLUE, IMDB or a user's own tables."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nystrom import metrics
from nystrom.data import glue, reviews, tables
from nystrom.data.examples import Example

HOLD_OUT = "hold_out"


class Job(NamedTuple):
    """A task with its data."""

    task: str
    labels: tuple[str, ...]
    """Names of the classes; none where numbers are predicted."""
    metrics: tuple[str, ...]
    """Their mean is the task's one number."""
    train: list[Example]
    evals: dict[str, list[Example]]
    """Scored sets by name; the first is the one that is reported."""
    predict: dict[str, list[Example]]
    """Unlabelled sets, by the name of the file that takes their predictions."""


def from_glue(name: str, data: Path | None, predict: bool) -> Job:
    """A task of GLUE, scored on its dev sets; with `predict` also its test sets, which have no labels."""
    task = glue.TASKS[name]
    train = glue.read(task, data, "train")
    evals = {split: glue.read(task, data, split) for split in task.splits if split.startswith("dev")}
    tests = [split for split in task.splits if predict and split.startswith("test")]
    unlabelled = {
        task.submission(split): [e._replace(label=None) for e in glue.read(task, data, split)] for split in tests
    }
    return Job(name, task.labels, task.metrics, train, evals, unlabelled)


def from_reviews(data: Path | None) -> Job:
    """The IMDB reviews, scored on the test set."""
    train, test = (reviews.read(data, split) for split in ("train", "test"))
    return Job("imdb", ("negative", "positive"), ("accuracy",), train, {"test": test}, {})


def from_tables(train: Path, scored: Path, text: str, label: str, pair: str | None, regression: bool) -> Job:
    """Tables with these columns; scored by accuracy and F1, numbers by their correlations."""
    found, labels = tables.read(train, text, label, pair, regression=regression)
    evals, _ = tables.read(scored, text, label, pair, labels=None if regression else labels, regression=regression)
    metrics = ("pearson", "spearman") if regression else ("accuracy", "f1" if len(labels) == 2 else "macro_f1")
    return Job(train.stem, labels, metrics, found, {"eval": evals}, {})


def limited(job: Job, train: int | None, evals: int | None) -> Job:
    """The job with so many examples drawn at random, the same in every run; None: all.

    Raises:
        ValueError: there are not so many.
    """
    return job._replace(
        train=_draw(job.train, train, "train"),
        evals={name: _draw(examples, evals, name) for name, examples in job.evals.items()},
    )


def with_hold_out(job: Job, part: float) -> Job:
    """The job with a part of the training examples, drawn at random, set aside as a further scored set.

    Raises:
        ValueError: nothing would be left to train on.
    """
    count = max(1, round(part * len(job.train)))
    if count >= len(job.train):
        raise ValueError(f"hold_out {part} of {len(job.train)} training examples leaves none to train on")
    places = set(_places(len(job.train), count))
    held_out = [example for i, example in enumerate(job.train) if i in places]
    train = [example for i, example in enumerate(job.train) if i not in places]
    return job._replace(train=train, evals={**job.evals, HOLD_OUT: held_out})


def _draw(examples: list[Example], count: int | None, name: str) -> list[Example]:
    if count is None:
        return examples
    if count > len(examples):
        raise ValueError(f"the {name} set has {len(examples)} examples: asked for {count}")
    return [examples[i] for i in _places(len(examples), count)]


def _places(total: int, count: int) -> list[int]:
    return sorted(random.Random(0).sample(range(total), count))


def decide(job: Job, logits: Any) -> np.ndarray:
    """The likeliest class of each example, or its number."""
    logits = np.asarray(logits)
    return logits.argmax(-1) if job.labels else logits.reshape(len(logits))


def score(job: Job, logits: Any, labels: Any) -> dict[str, float]:
    """The task's metrics, and "score", their mean: the task's one number."""
    scores = metrics.score(job.metrics, decide(job, logits), np.asarray(labels))
    return scores | {"score": metrics.main(scores, job.metrics)}


def write_predictions(job: Job, examples: list[Example], predictions: np.ndarray, path: Path) -> None:
    """Write index, label and prediction of each example, tab-separated, by name; the whole file or none."""
    name: Callable[[Any], str] = (lambda label: job.labels[int(label)]) if job.labels else str
    lines = ["index\tlabel\tprediction"]
    for example, prediction in zip(examples, predictions.tolist(), strict=True):
        lines.append(f"{example.index}\t{name(example.label)}\t{name(prediction)}")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(path)
