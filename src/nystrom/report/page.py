"""Cells of runs as Markdown, and as JSON."""

from collections.abc import Sequence
from typing import Any

from nystrom.environment import describe
from nystrom.presets import READ_BY
from nystrom.report.collect import Placed, difference

COUNTS = ("examples", "steps", "tokens_per_second", "seconds", "parameters")
"""What metrics.json holds beside the scores."""


def markdown(table: list[Placed], unfinished: list[str]) -> str:
    """All of the report."""
    parts = []
    for recipe in dict.fromkeys(placed.cell.recipe for placed in table):
        own = [placed for placed in table if placed.cell.recipe == recipe]
        parts += [f"## {recipe}", overview(own)]
        for row in dict.fromkeys(placed.row for placed in own):
            parts += [f"### {row}", details([placed for placed in own if placed.row == row])]
    if unfinished:
        parts += ["Unfinished, and not in the tables:", "\n".join(f"- {line}" for line in unfinished)]
    return "\n\n".join([*parts, made_with(table)])


def overview(table: list[Placed]) -> str:
    """A row for each task, a column for each attention, and the means over the tasks."""
    at = {(placed.row, placed.column): placed for placed in table}
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*at, strict=True))
    kind = {placed.column: list(READ_BY).index(placed.cell.attention) for placed in table}
    columns.sort(key=lambda column: kind[column])
    lines, marked = [], []
    for row in rows:
        line = []
        for column in columns:
            placed = at.get((row, column))
            line.append("–" if placed is None else _score(placed))
            if placed is not None and placed.notes:
                marked.append(f"[{len(marked) + 1}] {row}, {column}: {'; '.join(placed.notes)}")
                line[-1] += f" [{len(marked)}]"
        name = next(placed for placed in table if placed.row == row).cell.runs[0].metrics["score"]["name"]
        lines.append([f"{row} ({name})", *line])
    if len(rows) > 1:
        whole = ([at[row, column] for row in rows if (row, column) in at] for column in columns)
        lines.append(["mean", *(_mean(found) if len(found) == len(rows) else "–" for found in whole)])
    said = "Points: mean ± standard deviation (seeds), and the difference to softmax in the same settings."
    return "\n\n".join([_table(["task", *columns], lines), said, *marked])


def _score(placed: Placed) -> str:
    cell, twin = placed.cell, placed.twin
    more = "" if twin is None else f", {_more(difference(cell, twin)['mean'])}"
    return f"{_spread('score', cell.score())} ({len(cell.runs)}){more}"


def _more(difference: float) -> str:
    """In points."""
    return f"{round(100 * difference, 2) + 0.0:+.2f}"  # + 0.0: no -0.00


def _mean(column: list[Placed]) -> str:
    mean = sum(placed.cell.score()["mean"] for placed in column) / len(column)
    more = [difference(placed.cell, placed.twin)["mean"] for placed in column if placed.twin is not None]
    return f"{100 * mean:.2f}" + (f", {_more(sum(more) / len(more))}" if len(more) == len(column) else "")


def details(table: list[Placed]) -> str:
    """Of one row: every measure of every cell, and what it cost."""
    measures = list(dict.fromkeys(name for placed in table for name in placed.cell.scores()))
    lines = []
    for placed in table:
        cell, scores = placed.cell, placed.cell.scores()
        line = [placed.column, ", ".join(map(str, cell.seeds()))]
        line += [
            _spread(name, scores[name]) + _difference(name, placed) if name in scores else "–" for name in measures
        ]
        examples = cell.runs[0].metrics.get("examples", {})
        line.append(", ".join(f"{name} {count:,}" for name, count in examples.items() if count is not None) or "–")
        counts = (cell.mean(name) for name in ("steps", "seconds", "tokens_per_second"))
        lines.append([*line, *("–" if count is None else f"{count:,.0f}" for count in counts)])
    return _table(["attention", "seeds", *measures, "examples", "steps", "seconds", "tokens/s"], lines)


def _difference(name: str, placed: Placed) -> str:
    """In points, of a loss in per cent."""
    if placed.twin is None or name not in placed.twin.scores():
        return ""
    more = difference(placed.cell, placed.twin, name)["mean"]
    if in_points(name):
        return f" ({_more(more)})"
    of = placed.twin.scores()[name]["mean"]
    return f" ({round(100 * more / of, 1) + 0.0:+.1f} %)" if of else ""


def in_points(name: str) -> bool:
    """Whether a measure is best at 1, and shown as points of 100; a loss is not."""
    return not any(part in name for part in ("loss", "perplexity"))


def _spread(name: str, values: dict[str, Any]) -> str:
    scale, digits = (100, 2) if in_points(name) else (1, 4)
    sd = f" ± {scale * values['sd']:.{digits}f}" if len(values["each"]) > 1 else ""
    return f"{scale * values['mean']:.{digits}f}{sd}"


def _table(header: list[str], lines: Sequence[Sequence[str]]) -> str:
    every = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every)


def made_with(table: list[Placed]) -> str:
    """Commits, versions and machines of all runs."""
    every = [run.environment for placed in table for run in placed.cell.runs if run.environment]
    packages = {f"{name} {version}" for about in every for name, version in about.get("packages", {}).items()}
    machines = {about.get("accelerator") or f"{about.get('processor')}, {about.get('cores')} cores" for about in every}
    parts = {"Commit": {str(about.get("commit")) for about in every}, "Packages": packages, "Machine": machines}
    return "\n".join(f"- {name}: {', '.join(sorted(found))}" for name, found in parts.items() if found)


def numbers(table: list[Placed], unfinished: list[str]) -> dict[str, Any]:
    """What report.json holds: everything but the curves, which stay in each run's metrics.json."""
    return {"cells": [_numbers(placed) for placed in table], "unfinished": unfinished, "environment": describe()}


def _numbers(placed: Placed) -> dict[str, Any]:
    cell, twin = placed.cell, placed.twin
    more = None
    if twin is not None:
        shared = [name for name in cell.scores() if name in twin.scores()]
        more = {"score": difference(cell, twin), **{name: difference(cell, twin, name) for name in shared}}
    return {
        **{name: getattr(cell, name) for name in ("recipe", "task", "attention", "settings")},
        **{name: getattr(placed, name) for name in ("row", "column", "notes")},
        "seeds": cell.seeds(),
        "score": {"name": cell.runs[0].metrics["score"]["name"], **cell.score()},
        "scores": cell.scores(),
        "difference_to_softmax": more,
        "runs": [
            {
                "folder": str(run.folder),
                "seed": run.metrics["seed"],
                **{name: run.metrics[name] for name in COUNTS if name in run.metrics},
                "environment": run.environment,
            }
            for run in cell.runs
        ],
    }
