"""Runs of Long Range Arena as one table with the published numbers, and accuracy against speed and memory.

nystrom lra table runs/ --out report/
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from tyro.conf import Positional, arg

from nystrom.lra.tasks import NAMES, PUBLISHED
from nystrom.report.collect import Cell, Placed, collect, placed, together
from nystrom.report.page import made_with


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
    cells = placed(together(one for one in found if one.recipe == "lra"))
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


def line(found: Placed) -> dict[str, Any]:
    """All numbers of a cell."""
    cell = found.cell
    return {
        **{name: getattr(cell, name) for name in ("task", "attention", "settings")},
        "row": found.column,
        "seeds": cell.seeds(),
        "accuracy": cell.score(),
        "published": published(cell),
        "part_of_the_authors_steps": part(cell),
        **{name: cell.mean(name) for name in ("steps", "seconds", "examples_per_second", "peak_memory", "parameters")},
        "examples": cell.runs[0].metrics["examples"],
        "environment": [one.environment for one in cell.runs],
    }


def published(cell: Cell) -> float | None:
    """Per cent, of this task and kind; None where there is none."""
    return PUBLISHED.get(cell.attention, {}).get(cell.task)


def part(cell: Cell) -> float:
    """Steps made, of those that the authors made."""
    steps, theirs = cell.mean("steps"), cell.mean("steps_of_the_authors")
    assert steps is not None and theirs is not None
    return steps / theirs


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
        ]
        if unlike := [f"- {one.column}, {_head(one)}: {'; '.join(one.notes)}" for one in own if one.notes]:
            parts += ["Not made alike:", "\n".join(unlike)]
    parts.append(
        "± is the standard deviation over seeds. A part of the authors' steps is named where it is not all of them; "
        "the schedule then is as much shorter. Numbers of examples are in lra.jsonl."
    )
    if unfinished:
        parts += ["Unfinished, and not in the tables:", "\n".join(f"- {one}" for one in unfinished)]
    return "\n\n".join([*parts, made_with(cells)])


def _head(one: Placed) -> str:
    """Its task, with the settings other than the preset that vary between the task's cells."""
    task, preset = one.cell.task, f", preset {one.cell.settings['preset']}"
    return NAMES.get(task, task) + one.row.removeprefix(task).replace(preset, "")


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    score, theirs, done = cell.score(), published(cell), part(cell)
    spread = f" ± {100 * score['sd']:.2f}" if len(cell.runs) > 1 else ""
    steps = "" if done >= 1 else f" at {100 * done:.2g} % of the steps"
    return f"{100 * score['mean']:.2f}{spread}{steps}" + ("" if theirs is None else f" ({theirs:.2f})")


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
