"""What is to be learnt: training examples, scored sets, metrics. From GLUE, IMDB or a user's own tables."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from nystrom import metrics
from nystrom.data import glue, reviews, tables
from nystrom.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

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


class Encoded(NamedTuple):
    """The examples of a job as token ids, and labels where they have one."""

    train: list[dict[str, Any]]
    evals: dict[str, list[dict[str, Any]]]
    predict: dict[str, list[dict[str, Any]]]

    def longest(self) -> int:
        """Length of the longest example (tokens)."""
        sets = (self.train, *self.evals.values(), *self.predict.values())
        return max(len(row["input_ids"]) for rows in sets for row in rows)


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


def from_tables(
    name: str | None, train: Path, scored: Path, text: str, label: str, pair: str | None, regression: bool
) -> Job:
    """Tables with these columns; scored by accuracy and F1, numbers by their correlations. It is called by the name of
    the first, where no other is given.
    """
    found, labels = tables.read(train, text, label, pair, regression=regression)
    evals, _ = tables.read(scored, text, label, pair, labels=None if regression else labels, regression=regression)
    metrics = ("pearson", "spearman") if regression else ("accuracy", "f1" if len(labels) == 2 else "macro_f1")
    return Job(name or train.name.split(".")[0], labels, metrics, found, {"eval": evals}, {})


def drawn(job: Job, train: int | None, evals: int | None, hold_out: float) -> Job:
    """The job with so many examples drawn at random, the same in every run; None: all.

    Args:
        job: all of it.
        train: examples to train on (count).
        evals: of each scored set (count).
        hold_out: this part of the training examples is set aside as a further scored set, `HOLD_OUT`.

    Raises:
        ValueError: there are not so many; none is left to train on; a set is too small to be scored.
    """
    learnt = _draw(job.train, train, "train")
    sets = {name: _draw(examples, evals, name) for name, examples in job.evals.items()}
    if hold_out:
        count = max(1, round(hold_out * len(learnt)))
        if count >= len(learnt):
            raise ValueError(f"hold_out {hold_out} of {len(learnt)} training examples leaves none to train on")
        places = set(_places(len(learnt), count))
        sets[HOLD_OUT] = [example for i, example in enumerate(learnt) if i in places]
        learnt = [example for i, example in enumerate(learnt) if i not in places]
    for name, examples in sets.items():
        if len(examples) < 2 and not job.labels:
            raise ValueError(f"{' and '.join(job.metrics)} need two examples or more: got 1 in the {name} set")
    return job._replace(train=learnt, evals=sets)


def _draw(examples: list[Example], count: int | None, name: str) -> list[Example]:
    if count is None:
        return examples
    if count > len(examples):
        raise ValueError(f"the {name} set has {len(examples)} examples: asked for {count}")
    return [examples[i] for i in _places(len(examples), count)]


def _places(total: int, count: int) -> list[int]:
    return sorted(random.Random(0).sample(range(total), count))


def encoded(job: Job, tokenizer: "PreTrainedTokenizerBase", length: int) -> Encoded:
    """All examples, cut to the length."""
    evals, predict = (
        {name: _encode(tokenizer, examples, length) for name, examples in sets.items()}
        for sets in (job.evals, job.predict)
    )
    return Encoded(_encode(tokenizer, job.train, length), evals, predict)


def _encode(tokenizer: "PreTrainedTokenizerBase", examples: list[Example], length: int) -> list[dict[str, Any]]:
    texts = [example.text for example in examples]
    pairs = None if examples[0].pair is None else [cast(str, example.pair) for example in examples]
    found = tokenizer(texts, pairs, truncation=True, max_length=length, return_attention_mask=False)
    rows = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
    return [
        row if example.label is None else row | {"labels": example.label}
        for row, example in zip(rows, examples, strict=True)
    ]


def num_tokens(rows: list[dict[str, Any]]) -> int:
    """Tokens of all of these examples (count)."""
    return sum(len(row["input_ids"]) for row in rows)


def decide(job: Job, logits: Any) -> np.ndarray:
    """The likeliest class of each example, or its number.

    Raises:
        ValueError: what the model says is not finite.
    """
    logits = np.asarray(logits)
    if not np.isfinite(logits).all():
        raise ValueError("training has diverged: the model answers NaN or infinity; lower --lr, or raise --warmup")
    return logits.argmax(-1) if job.labels else logits.reshape(len(logits))


def score(job: Job, logits: Any, labels: Any) -> dict[str, float]:
    """The task's metrics, and "score", their mean: the task's one number."""
    scores = metrics.score(job.metrics, decide(job, logits), np.asarray(labels))
    return scores | {"score": metrics.main(scores, job.metrics)}


def score_all(job: Job, encoded: Encoded, trainer: "Trainer", out: Path) -> dict[str, float]:
    """The scores of every set, those of all but the first under its name; predictions are written to files in `out`."""
    main, scores = trainer.is_world_process_zero(), cast(dict[str, float], {})
    for name, rows in encoded.evals.items():
        answer = trainer.predict(cast(Any, rows), metric_key_prefix=name)
        found, prefix = cast(dict[str, float], answer.metrics), f"{name}_" if scores else ""
        scores |= {prefix + metric: found[f"{name}_{metric}"] for metric in ("score", *job.metrics, "loss")}
        if main:
            decided = decide(job, answer.predictions)
            write_predictions(job, job.evals[name], decided, out / f"predictions-{name}.tsv")
    for file, rows in encoded.predict.items():
        answer = trainer.predict(cast(Any, rows))
        if main:
            indices = [example.index for example in job.predict[file]]
            glue.write_predictions(glue.TASKS[job.task], out / file, indices, decide(job, answer.predictions))
    return scores


def write_predictions(job: Job, examples: list[Example], predictions: np.ndarray, path: Path) -> None:
    """Write index, label and prediction of each example, tab-separated, by name; the whole file or none."""
    name: Callable[[Any], str] = (lambda label: job.labels[int(label)]) if job.labels else str
    lines = ["index\tlabel\tprediction"]
    for example, prediction in zip(examples, predictions.tolist(), strict=True):
        lines.append(f"{example.index}\t{name(example.label)}\t{name(prediction)}")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(path)
