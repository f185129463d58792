"""Runs of Long Range Arena as one table with the published numbers, and accuracy against speed and memory.

nystrom lra table runs/ --out report/
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from tyro.conf import Positional, arg

from nystrom.lra.kinds import DEFAULTS
from nystrom.lra.tasks import NAMES, PUBLISHED, task_of
from nystrom.report.collect import Cell, Placed, Run, collect, placed, shown, together
from nystrom.report.page import made_with

USUAL = {"steps": None, "budget": None, "batch_size": None, "gradient_accumulation": 1, "lr": 1e-4}
USUAL |= {"max_grad_norm": None, "group_lengths": None, "precision": "auto"}
"""Settings that are named under the table where they are not these; None: the task's or the preset's."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of all runs of Long Range Arena in these folders, the published numbers beside ours."""

    dirs: Annotated[Positional[tuple[Path, ...]], arg(metavar="DIR [DIR ...]")]
    """Folders of runs, or folders with some anywhere below."""
    out: Path | None = None
    """Folder for lra.md, lra.jsonl (a line a cell) and lra.png; earlier ones in it are replaced."""


def run(config: Table) -> None:
    """Print the table, and write it with all numbers and a picture.

    Raises:
        FileNotFoundError: no such folder, or no finished run of Long Range Arena in it.
        ValueError: no folder is named; a file of a run is damaged; two runs are the same.
    """
    if not config.dirs:
        raise ValueError("name a folder of runs, or several: nystrom lra table runs/")
    found, unfinished = collect(config.dirs)
    cells = place(found)
    if not cells:
        raise FileNotFoundError(f"{', '.join(map(str, config.dirs))}: no finished run of Long Range Arena in there")
    page = markdown(cells, unfinished)
    print(page)
    if config.out is not None:
        from nystrom.lra.picture import draw

        config.out.mkdir(parents=True, exist_ok=True)
        for name, content in (("lra.md", page), ("lra.jsonl", "\n".join(json.dumps(line(cell)) for cell in cells))):
            partial = config.out / f"{name}.partial"
            partial.write_text(content + "\n", encoding="utf-8")
            partial.replace(config.out / name)
        draw(cells, config.out / "lra.png")


def place(runs: Iterable[Run]) -> list[Placed]:
    """The cells of the runs of Long Range Arena. Alike are runs that were made alike, whether a setting was given or
    left out; where the attention's are not its kind's default, the row says so.
    """
    own = [one._replace(settings=_resolved(one)) for one in runs if one.recipe == "lra"]
    return [one._replace(column=", ".join([one.cell.attention, *_unusual(one.cell)])) for one in placed(together(own))]


def _resolved(run: Run) -> dict[str, Any]:
    """Its settings: None for what a task or a preset has anyway, and the attention's as they came out."""
    theirs = task_of(run.metrics["task"])
    usual = {"steps": theirs.steps, "batch_size": theirs.batch_size, "group_lengths": run.settings["preset"] == "clean"}
    settings = USUAL | run.settings  # a run of an earlier version lacks some
    given = {name: None if value == usual.get(name) else value for name, value in settings.items()}
    return given | run.metrics["settings"]


def _unusual(cell: Cell) -> list[str]:
    usual = DEFAULTS[cell.attention]
    return [f"{name} {cell.settings[name]}" for name in usual if cell.settings[name] != usual[name]]


def line(found: Placed) -> dict[str, Any]:
    """All numbers of a cell."""
    cell = found.cell
    return {
        **{name: getattr(cell, name) for name in ("task", "attention", "settings")},
        "row": found.column,
        "seeds": cell.seeds(),
        "accuracy": cell.score(),
        "published": published(cell),
        "part_of_the_authors_examples": part(cell),
        **{name: cell.mean(name) for name in ("steps", "seconds", "examples_per_second", "peak_memory", "parameters")},
        "examples": cell.runs[0].metrics["examples"],
        "environment": [one.environment for one in cell.runs],
    }


def published(cell: Cell) -> float | None:
    """Per cent, of this task and kind with its usual settings; None where there is none."""
    return None if _unusual(cell) else PUBLISHED.get(cell.attention, {}).get(cell.task)


def part(cell: Cell) -> float:
    """Examples seen, again and again, of those that the authors' model saw."""
    task = task_of(cell.task)
    seen = fmean(round(one.metrics["examples_per_second"] * one.metrics["seconds"]) for one in cell.runs)
    return seen / (task.steps * task.batch_size)


def markdown(cells: list[Placed], unfinished: list[str]) -> str:
    """The whole page."""
    order = [*NAMES, *(one.cell.task for one in cells)]
    presets = dict.fromkeys(one.cell.settings["preset"] for one in cells)
    parts = []
    for preset in presets:
        own = [one for one in cells if one.cell.settings["preset"] == preset]
        rows = dict.fromkeys(one.column for one in own)
        heads = dict.fromkeys(_head(one) for one in sorted(own, key=lambda one: order.index(one.cell.task)))
        at = {(one.column, _head(one)): one.cell for one in own}
        across = {row: [at.get((row, head)) for head in heads] for row in rows}
        body = [[row, *map(_cell, across[row])] for row in rows]
        cost = [[row, *map(_cost, across[row])] for row in rows]
        means = 1 < len({one.cell.task for one in own}) == len(heads)  # no mean over one task made in two ways
        if means:
            body = [[*one, _mean(across[one[0]])] for one in body]
        parts += [
            f"**Accuracy on the test set (per cent), preset {preset}; in brackets the published one**",
            _grid(["attention", *heads, *(["mean"] if means else [])], body),
            f"**Steps made, examples/s while training, and peak memory (MiB), preset {preset}**",
            _grid(["attention", *heads], cost),
            "\n".join(_made(head, next(one.cell for one in own if _head(one) == head)) for head in heads),
        ]
        if unlike := [f"- {one.column}, {_head(one)}: {'; '.join(one.notes)}" for one in own if one.notes]:
            parts += ["Not made alike:", "\n".join(unlike)]
    parts.append(
        "± is the standard deviation over seeds. Where a run saw fewer examples (again and again) than the authors', "
        "the part is named, and its schedule is as much shorter."
    )
    if unfinished:
        parts += ["Unfinished, and not in the tables:", "\n".join(f"- {one}" for one in unfinished)]
    return "\n\n".join([*parts, made_with(cells)])


def _head(one: Placed) -> str:
    """Its task, with the settings other than the preset that vary between the task's cells."""
    task, preset = one.cell.task, f", preset {one.cell.settings['preset']}"
    return NAMES.get(task, task) + one.row.removeprefix(task).replace(preset, "")


def _made(head: str, cell: Cell) -> str:
    """What the runs learnt from, and what of it is not the preset's."""
    given = [(name, value) for name in USUAL if (value := cell.settings.get(name, USUAL[name])) != USUAL[name]]
    sizes = [f"{name} {count:,}" for name, count in cell.runs[0].metrics["examples"].items()]
    return f"- {head}: {', '.join([*sizes, *(f'{name} {shown(name, value)}' for name, value in given)])}"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    score, theirs, done = cell.score(), published(cell), part(cell)
    spread = f" ± {100 * score['sd']:.2f}" if len(cell.runs) > 1 else ""
    less = "" if done >= 1 else f" at {100 * done:.2g} % of the examples"
    return f"{100 * score['mean']:.2f}{spread}{less}" + ("" if theirs is None else f" ({theirs:.2f})")


def _mean(cells: list[Cell | None]) -> str:
    """Over the tasks, where every one was run: kinds with and without a hard task do not compare."""
    found = [one for one in cells if one is not None]
    if len(found) < len(cells):
        return "–"
    theirs = [published(one) for one in found]
    beside = "" if None in theirs else f" ({fmean(filter(None, theirs)):.2f})"
    return f"{100 * fmean(one.score()['mean'] for one in found):.2f}{beside}"


def _cost(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    steps, speed, memory = (cell.mean(name) or 0 for name in ("steps", "examples_per_second", "peak_memory"))
    return f"{steps:,.0f}, {speed:.3g}, {memory / 2**20:,.0f}"


def _grid(header: list[str], lines: list[list[str]]) -> str:
    every = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join(f"| {' | '.join(one)} |" for one in every)
