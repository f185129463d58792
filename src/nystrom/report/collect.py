"""Run folders to cells of a table: the runs that differ in their seed alone, and their exact twins."""

import math
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from nystrom.presets import READ_BY
from nystrom.runs import COMPLETE, read_json, spread

OF_ATTENTION = set.union(*READ_BY.values())
NOT_COMPARED = {"attention", "seed", "seeds", "task"}
NOT_COMPARED |= {"out", "resume", "cache", "dry_run", "checkpoint_steps", "eval_steps", "predict"}  # not for scores


class Run(NamedTuple):
    """A finished run."""

    folder: Path
    recipe: str
    settings: dict[str, Any]
    """Those that its scores depend on, the seed aside."""
    environment: dict[str, Any]
    metrics: dict[str, Any]


class Cell(NamedTuple):
    """Runs that differ in their seed alone, in the order of their seeds."""

    recipe: str
    task: str
    attention: str
    settings: dict[str, Any]
    runs: list[Run]

    def seeds(self) -> list[int]:
        return [run.metrics["seed"] for run in self.runs]

    def score(self) -> dict[str, Any]:
        """Mean, standard deviation and values of the task's one number."""
        return spread([run.metrics["score"]["value"] for run in self.runs])

    def scores(self) -> dict[str, dict[str, Any]]:
        """The same of every measure."""
        names = self.runs[0].metrics["scores"]
        return {name: spread([run.metrics["scores"][name] for run in self.runs]) for name in names}

    def mean(self, name: str) -> float | None:
        """The mean of another number of the runs, None where they do not have it."""
        found = [run.metrics[name] for run in self.runs if run.metrics.get(name) is not None]
        return sum(found) / len(found) if found else None

    def own(self, of_attention: bool) -> dict[str, Any]:
        """The settings of attention, or the others."""
        return {name: value for name, value in self.settings.items() if (name in OF_ATTENTION) == of_attention}


class Placed(NamedTuple):
    """A cell in its table."""

    cell: Cell
    row: str
    """Its task, with those settings that vary between the task's cells of one attention."""
    column: str
    """Its attention, with those of its settings that vary within a task."""
    twin: Cell | None
    """The same with exact attention."""
    notes: list[str]
    """What makes it hard to compare with the first of its row."""


def collect(dirs: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs in these folders and below, and a line on each of the others.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file of a run is damaged.
    """
    found: list[Run] = []
    unfinished: list[str] = []
    seen = set()
    for top in dirs:
        if not top.is_dir():
            raise FileNotFoundError(f"{top}: no such folder")
        for path in sorted(top.rglob("run.json")):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            about, folder = read_json(path), path.parent
            if not isinstance(about.get("config"), dict) or "recipe" not in about:
                raise ValueError(f"{path}: not of a run of nystrom: no recipe and config in it")
            if seeds := about["config"].get("seeds"):
                runs, others = _of_seeds(folder, about, seeds)
                found += runs
                unfinished += others
            elif (folder / "metrics.json").is_file():
                found.append(_run(folder, about, read_json(folder / "metrics.json"), folder / "metrics.json"))
            else:
                steps = [int(mark.parent.name.rpartition("-")[2]) for mark in folder.glob(f"checkpoint-*/{COMPLETE}")]
                unfinished.append(f"{folder} ({f'step {max(steps)}' if steps else 'no checkpoint'})")
    return found, unfinished


def _of_seeds(folder: Path, about: dict[str, Any], seeds: list[int]) -> tuple[list[Run], list[str]]:
    """Of a folder of several seeds: what its summary says where their own folders are gone, and seeds not yet begun."""
    gone = [seed for seed in seeds if not (folder / f"seed-{seed}" / "run.json").is_file()]
    path = folder / "summary.json"
    if gone != seeds or not path.is_file():
        return [], [f"{folder / f'seed-{seed}'} (not begun)" for seed in gone]
    summary = read_json(path)
    try:
        every = [
            {
                **{name: summary[name] for name in ("task", "attention")},
                "seed": seed,
                "score": {"name": summary["score"]["name"], "value": summary["score"]["each"][i]},
                "scores": {name: values["each"][i] for name, values in summary["scores"].items()},
            }
            for i, seed in enumerate(summary["seeds"])
        ]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: damaged: {type(error).__name__}: {error}") from None
    return [_run(folder / f"seed-{metrics['seed']}", about, metrics, path) for metrics in every], []


def _run(folder: Path, about: dict[str, Any], metrics: dict[str, Any], path: Path) -> Run:
    """A run whose numbers are there, as `path` has them."""
    kind, score, scores = metrics.get("attention"), metrics.get("score"), metrics.get("scores")
    found: list[Any] = (
        [score.get("value"), *scores.values()] if isinstance(score, dict) and isinstance(scores, dict) else [None]
    )
    numbers = all(isinstance(value, int | float) for value in found)
    if kind not in READ_BY or not {"task", "seed"} <= metrics.keys() or not numbers:
        raise ValueError(f"{path}: not the numbers of a run: task, attention, seed, score and scores must be in it")
    if not all(map(math.isfinite, found)):
        raise ValueError(f"{path}: a score that is not finite, as a run that diverged leaves it; remove the folder")
    left_out = NOT_COMPARED | (OF_ATTENTION - READ_BY[kind])
    settings = {name: value for name, value in about["config"].items() if name not in left_out}
    return Run(folder, about["recipe"], settings, about.get("environment", {}), metrics)


def together(runs: Iterable[Run]) -> list[Cell]:
    """Runs of equal settings in one cell; by recipe and task, exact attention first.

    Raises:
        ValueError: two runs differ in nothing, not even their seed.
    """
    cells: list[Cell] = []
    for run in runs:
        new = Cell(run.recipe, run.metrics["task"], run.metrics["attention"], run.settings, [])
        cell = next((cell for cell in cells if cell[:-1] == new[:-1]), new)
        for other in cell.runs:
            if other.metrics["seed"] == run.metrics["seed"]:
                raise ValueError(f"{other.folder} and {run.folder} are the same run, seed and all; leave out one")
        cell.runs.append(run)
        if cell is new:
            cells.append(cell)
    for cell in cells:
        cell.runs.sort(key=lambda run: run.metrics["seed"])
    kinds = list(READ_BY)
    return sorted(cells, key=lambda cell: (cell.recipe, cell.task, kinds.index(cell.attention)))


def twin(cell: Cell, cells: Iterable[Cell]) -> Cell | None:
    """The runs of exact attention in the same settings, of several those with the same convolution."""
    if cell.attention == "softmax":
        return None
    same = (cell.recipe, cell.task, "softmax", cell.own(of_attention=False))
    others = [c for c in cells if (c.recipe, c.task, c.attention, c.own(of_attention=False)) == same]
    kernel = cell.settings.get("conv_kernel_size")
    nearest = [c for c in others if c.settings.get("conv_kernel_size") == kernel] or others
    return nearest[0] if len(nearest) == 1 else None


def difference(cell: Cell, other: Cell, name: str | None = None) -> dict[str, Any]:
    """How much more a measure is than the other cell's, None: the score; seed by seed where both have the same."""
    one, two = ((c.score() if name is None else c.scores()[name]) for c in (cell, other))
    if cell.seeds() == other.seeds():
        return spread([a - b for a, b in zip(one["each"], two["each"], strict=True)])
    return {"mean": one["mean"] - two["mean"], "sd": None, "each": None}


def placed(cells: list[Cell]) -> list[Placed]:
    """Where each cell stands, what it is compared with, and what makes it hard to compare."""
    found: list[Placed] = []
    for cell in cells:
        of_task = [c for c in cells if (c.recipe, c.task) == (cell.recipe, cell.task)]
        of_kind = [c for c in cells if (c.recipe, c.attention) == (cell.recipe, cell.attention)]
        of_row, of_column = _varied(of_task, of_attention=False), _varied(of_kind, of_attention=True)
        row = ", ".join([cell.task, *_named(cell, of_row)])
        column = ", ".join([cell.attention, *_named(cell, of_column)])
        first = next((p.cell for p in found if (p.cell.recipe, p.row) == (cell.recipe, row)), cell)
        found.append(Placed(cell, row, column, twin(cell, cells), notes(cell, first)))
    return found


def notes(cell: Cell, first: Cell) -> list[str]:
    """What makes a cell hard to compare with the first of its row."""
    found = []
    for name, value in cell.own(of_attention=False).items():
        if value != first.settings.get(name):
            found.append(f"{name} {shown(name, value)}, not {shown(name, first.settings.get(name))}")
    for name in ("examples", "steps"):
        here, there = (
            sorted({_plain(run.metrics[name]) for run in c.runs if name in run.metrics}) for c in (cell, first)
        )
        stops = name == "steps" and any(cell.settings.get(rule) is not None for rule in ("early_stopping", "budget"))
        if here and there and (here != there or len(here) > 1) and not stops:
            found.append(f"{name} {' or '.join(here)}" + ("" if cell is first else f", not {' or '.join(there)}"))
    longest, least = cell.mean("longest_input"), cell.mean("exact_below")
    if longest and least and longest < least:
        found.append(f"attention stayed exact: inputs of at most {longest:.0f} tokens, exact_below {least:.0f}")
    return found


def _plain(count: Any) -> str:
    return ", ".join(f"{name} {n}" for name, n in count.items()) if isinstance(count, dict) else str(count)


def _varied(pool: list[Cell], of_attention: bool) -> list[str]:
    names = dict.fromkeys(name for cell in pool for name in cell.own(of_attention))
    pairs = [(one, two) for one, two in combinations(pool, 2) if one[:3] == two[:3]]
    return [name for name in names if any(one.settings.get(name) != two.settings.get(name) for one, two in pairs)]


def _named(cell: Cell, names: list[str]) -> list[str]:
    return [f"{name} {shown(name, cell.settings.get(name))}" for name in names]


def shown(name: str, value: Any) -> str:
    """A setting in a table; of a path its end."""
    if value is None:
        return "none" if name == "conv_kernel_size" else "default"
    if isinstance(value, list):
        return " ".join(shown(name, one) for one in value) or "default"
    if isinstance(value, float):
        return f"{value:g}"
    parts = str(value).split("/")
    return str(value) if len(parts) < 4 else "/".join(["…", *parts[-2:]])
