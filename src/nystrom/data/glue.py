"""The nine tasks of the GLUE benchmark: its TSV files to examples, and predictions to the files that it scores.

Wang et al. 2019, https://gluebenchmark.com. The files are those that the benchmark's own script lays down, one folder a
task (MRPC/train.tsv); they are plain tab-separated text, in which a quotation mark is a character like any other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nystrom.data import hub
from nystrom.data.examples import Example, class_number, decode, score

HUB = "nyu-mll/glue"
SCORES = (0.0, 5.0)  # STS-B


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of the benchmark."""

    name: str
    """As the Hugging Face hub writes it."""
    folder: str
    """As the benchmark writes it."""
    columns: tuple[str, ...]
    """Of the file: the text, or both texts."""
    label: str
    """Column of the label."""
    labels: tuple[str, ...] = ("0", "1")
    """The classes, as the files write them, in the hub's order; none where the label is a score."""
    metrics: tuple[str, ...] = ("accuracy",)
    """What the benchmark scores: the task's number is their mean."""
    splits: tuple[str, ...] = ("train", "dev", "test")
    index: str = "index"
    """Column that numbers the examples, where a file has it."""
    header: tuple[str, ...] = ()
    """Columns of train and dev, where those files do not name them."""
    hub_columns: tuple[str, ...] = ()
    """Columns of the texts on the hub, where they differ."""

    def submission(self, split: str) -> str:
        """Name of the file that the benchmark expects with predictions for a test split."""
        ends = {"test": "", "test_matched": "-m", "test_mismatched": "-mm"}
        if split not in ends or split not in self.splits:
            raise ValueError(f"{split!r} is no test split of {self.name}; it has {', '.join(self.splits)}")
        return f"{self.folder}{ends[split]}.tsv"


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
COLA = ("source", "label", "star", "sentence")
MNLI_SPLITS = ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")
BOTH = ("accuracy", "f1")
MRPC_TEST = ("test_with_labels.tsv", "msr_paraphrase_test.txt")  # where the script was not run to its end

_ALL = (
    Task(name="cola", folder="CoLA", columns=("sentence",), label="label", metrics=("matthews",), header=COLA),
    Task(name="sst2", folder="SST-2", columns=("sentence",), label="label"),
    Task(
        name="mrpc",
        folder="MRPC",
        columns=("#1 String", "#2 String"),
        label="Quality",
        metrics=BOTH,
        hub_columns=PAIR,
    ),
    Task(name="stsb", folder="STS-B", columns=PAIR, label="score", labels=(), metrics=("pearson", "spearman")),
    Task(name="qqp", folder="QQP", columns=("question1", "question2"), label="is_duplicate", metrics=BOTH, index="id"),
    Task(
        name="mnli",
        folder="MNLI",
        columns=PAIR,
        label="gold_label",
        labels=("entailment", "neutral", "contradiction"),
        splits=MNLI_SPLITS,
        hub_columns=("premise", "hypothesis"),
    ),
    Task(name="qnli", folder="QNLI", columns=("question", "sentence"), label="label", labels=ENTAILMENT),
    Task(name="rte", folder="RTE", columns=PAIR, label="label", labels=ENTAILMENT),
    Task(name="wnli", folder="WNLI", columns=PAIR, label="label"),
)
TASKS = {task.name: task for task in _ALL}


def read(task: Task, data: Path | None, split: str) -> list[Example]:
    """The examples of a split. Those of a test split have no label, unless the file has one: MRPC's may.

    Args:
        task: one of TASKS.
        data: the benchmark's folder, or the task's own in it; or a copy of the hub's, which holds
            mrpc/train-00000-of-00001.parquet. None: downloaded from the hub.
        split: train, dev or test; of MNLI train, dev_matched, dev_mismatched, test_matched or test_mismatched.

    Raises:
        FileNotFoundError: the split's file is not there.
        OSError: the hub is out of reach.
        ValueError: no such split; not UTF-8, no rows, a row with too few or too many columns, a missing column, a label
            that is not one of the task's. The message names file and lines.
    """
    if split not in task.splits:
        raise ValueError(f"{task.name} has no split {split!r}; it has {', '.join(task.splits)}")
    hub_split = split.replace("dev", "validation")
    hub_columns = (*(task.hub_columns or task.columns), "label", "idx")
    if data is None:
        return _from_hub(task, hub.download(HUB, task.name, hub_split, hub_columns), split, HUB)
    names = [f"{split}.tsv", *(MRPC_TEST if (task.name, split) == ("mrpc", "test") else ())]
    for folder in (data / task.folder, data / task.name, data):
        for path in (folder / name for name in names):
            if path.is_file():
                return _from_tsv(task, path, split)
        if files := hub.parquet_files(folder, hub_split):
            return _from_hub(task, hub.read_parquet(files, hub_columns), split, str(folder))
    raise FileNotFoundError(
        f"{data}: neither {task.folder}/{names[0]} nor {names[0]} is in this folder; it should be the one that GLUE's "
        f"download script fills, the task's own in it, or a copy of the data set {HUB} of the Hugging Face hub"
    )


def _from_tsv(task: Task, path: Path, split: str) -> list[Example]:
    """Examples of a file of the benchmark."""
    test = split.startswith("test")
    lines = decode(path.read_bytes(), path).rstrip("\r\n").split("\n")  # no other character ends a line
    rows = [line.removesuffix("\r").split("\t") for line in lines]
    header = list(task.header) if task.header and not test else rows.pop(0)
    first = 1 + len(lines) - len(rows)
    if not rows or lines == [""]:
        raise ValueError(f"{path}: no examples in this file; get it again")
    for column in task.columns if test else (*task.columns, task.label):
        if column not in header:
            raise ValueError(f"{path}: no column {column!r}; its columns: {', '.join(header)}; get the file again")
    _check_width(path, header, rows, first)
    found = []
    for number, row in enumerate(rows):
        where, named = f"{path}, line {number + first}", dict(zip(header, row, strict=True))
        text, *pair = (named[column] for column in task.columns)
        label = _label(task, named[task.label], where) if task.label in named else None
        index = _index(named[task.index], where) if task.index in named else number
        found.append(Example(text, pair[0] if pair else None, label, index))
    return found


def _check_width(path: Path, header: list[str], rows: list[list[str]], first: int) -> None:
    """Raise ValueError, naming every line at fault, unless all rows have as many columns as the header."""
    bad = [(number + first, len(row)) for number, row in enumerate(rows) if len(row) != len(header)]
    if bad:
        shown = ", ".join(f"line {line} has {width}" for line, width in bad[:10])
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ValueError(
            f"{path}: every row has {len(header)} columns ({', '.join(header)}), but {shown}{more}; "
            "correct or delete these lines, or get the file again"
        )


def _label(task: Task, value: str, where: str) -> int | float:
    return class_number(value, task.labels, where) if task.labels else score(value, where, *SCORES)


def _index(value: str, where: str) -> int:
    if not value.isdecimal():
        raise ValueError(f"{where}: index {value!r} is not a whole number; correct the row")
    return int(value)


def _from_hub(task: Task, rows: hub.Rows, split: str, where: str) -> list[Example]:
    """Examples of rows of the hub: a class is its number in `task.labels`, and -1 stands for no label."""
    if not rows:
        raise ValueError(f"{where}: no examples of {task.name} {split}; get the files again")
    columns = task.hub_columns or task.columns
    found = []
    for number, row in enumerate(rows):
        place = f"{where}, {task.name} {split}, row {number + 1}"
        for column in (*columns, "idx"):
            if not isinstance(row[column], int if column == "idx" else str):
                raise ValueError(f"{place}: column {column!r} holds {row[column]!r}; get the files again")
        label = row["label"]
        if split.startswith("test") and label == -1:
            label = None
        elif not task.labels:
            label = score(str(label), place, *SCORES)
        elif not isinstance(label, int) or label not in range(len(task.labels)):
            raise ValueError(f"{place}: label {label!r} is none of 0 to {len(task.labels) - 1}; get the files again")
        text, *pair = (row[column] for column in columns)
        found.append(Example(text, pair[0] if pair else None, label, row["idx"]))
    return found


def write_predictions(
    task: Task, path: Path, indices: Sequence[int] | np.ndarray, predictions: Sequence[int | float] | np.ndarray
) -> None:
    """Write predictions as the benchmark's server takes them; `task.submission(split)` is the name that it expects.

    Args:
        task: one of TASKS.
        path: the file to write, whole or not at all.
        indices: of the test examples (`Example.index`).
        predictions: number of the class of each, or its score; a score below 0 is written as 0, one above 5 as 5.

    Raises:
        ValueError: not one prediction for each index, an index twice, or a prediction that is no class or not finite.
    """
    if not len(predictions) == len(indices) == len(set(indices)):
        raise ValueError(
            f"each index must be there once, with one prediction: got {len(indices)} indices, {len(set(indices))} of "
            f"them different, and {len(predictions)} predictions"
        )
    lines = ["index\tprediction"]
    for index, prediction in zip(indices, predictions, strict=True):
        if task.labels and prediction not in range(len(task.labels)):
            raise ValueError(f"{task.name}: prediction {prediction} for index {index} is no class of it")
        if not math.isfinite(prediction):
            raise ValueError(f"{task.name}: prediction {prediction} for index {index} is not finite")
        lowest, highest = SCORES
        written = task.labels[int(prediction)] if task.labels else f"{min(highest, max(lowest, prediction)):.3f}"
        lines.append(f"{index}\t{written}")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    partial.replace(path)
