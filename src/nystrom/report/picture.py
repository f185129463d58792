"""Cells of runs as a picture: scores with their spread, and the curves of pretraining."""

from collections.abc import Iterable
from pathlib import Path
from textwrap import fill, shorten
from typing import Any

import matplotlib

matplotlib.use("agg")  # files only; a window needs a screen

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from nystrom.presets import READ_BY
from nystrom.report.collect import Placed

COLOURS = {"softmax": "#000000", "nystrom": "#0072b2", "nystrom_shift": "#56b4e9", "nystrom_residual": "#e69f00"}
COLOURS |= {"linformer": "#009e73", "performer": "#cc79a7", "reformer": "#d55e00"}
COLOURS |= {kind: "#888888" for kind in READ_BY if kind not in COLOURS}
"""Okabe and Ito's, which the colour-blind tell apart; as in the pictures of `nystrom bench`."""
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")


def draw(table: list[Placed], path: Path) -> None:
    """Write a PNG: the scores of each task, and of pretraining the losses over steps and seconds."""
    panels = [
        (recipe, [placed for placed in table if placed.cell.recipe == recipe])
        for recipe in dict.fromkeys(placed.cell.recipe for placed in table)
    ]
    figure = plt.figure(figsize=(10, 4.4 * len(panels)), layout="constrained")
    for part, (recipe, own) in zip(figure.subfigures(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        part.suptitle(recipe)
        if recipe == "pretrain":
            place, *_ = losses(part, own)
        else:
            place = part.subplots()
            scores(place, own)
        part.legend(*place.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=150, format="png", metadata={"Software": None})
    plt.close(figure)
    partial.replace(path)


def styles(own: list[Placed]) -> dict[str, tuple[str, int]]:
    """For each column its attention's colour, and its number among the columns of that attention."""
    found: dict[str, tuple[str, int]] = {}
    for placed in own:
        colour = COLOURS[placed.cell.attention]
        found.setdefault(placed.column, (colour, sum(colour == other for other, _ in found.values())))
    return found


def scores(axes: Axes, own: list[Placed]) -> None:
    """A point for each row and column, with the standard deviation over its seeds."""
    rows = list(dict.fromkeys(placed.row for placed in own))
    found = styles(own)
    width = 0.7 / len(found)
    for number, (column, (colour, variant)) in enumerate(found.items()):
        points = [(rows.index(placed.row), placed.cell.score()) for placed in own if placed.column == column]
        shift = (number - (len(found) - 1) / 2) * width
        axes.errorbar(
            [place + shift for place, _ in points],
            [100 * score["mean"] for _, score in points],
            [100 * score["sd"] for _, score in points],
            fmt=MARKERS[variant % len(MARKERS)],
            color=colour,
            capsize=3,
            label=column,
        )
    axes.set_xticks(range(len(rows)), [fill(shorten(row, 60, placeholder=" …"), 20) for row in rows])
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_ylabel("score (points), ± standard deviation over seeds")
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def losses(part: SubFigure, own: list[Placed]) -> list[Axes]:
    """The loss over steps and over seconds, and the masked accuracy; on held-out data, where they were taken."""
    every = [entry for placed in own for run in placed.cell.runs for entry in run.metrics.get("curve", [])]
    held_out = any("eval_loss_nats" in entry for entry in every)
    loss, what = ("eval_loss_nats", "held-out loss (nats)") if held_out else ("loss", "training loss (nats)")
    panels = [(loss, "step", what), (loss, "seconds", what)]
    if held_out:
        panels.append(("eval_accuracy", "step", "held-out masked accuracy"))
    places = part.subplots(1, len(panels))
    for place, (value, over, title) in zip(places, panels, strict=True):
        curves(place, own, value, over)
        place.set(title=title, xlabel="step" if over == "step" else "seconds of training")
        place.grid(color="0.9")
        place.spines[["top", "right"]].set_visible(False)
    return list(places)


def curves(axes: Axes, own: list[Placed], value: str, over: str) -> None:
    """What every run logged, over its steps or seconds."""
    found, drawn = styles(own), set[str]()
    for placed in own:
        colour, variant = found[placed.column]
        for run in placed.cell.runs:
            points = list(_points(run.metrics, value, over))
            if points:
                name, marker = None if placed.column in drawn else placed.column, "." if len(points) < 30 else None
                line = LINES[variant % len(LINES)]
                axes.plot(*zip(*points, strict=True), line, color=colour, label=name, marker=marker)
                drawn.add(placed.column)


def _points(metrics: dict[str, Any], value: str, over: str) -> Iterable[tuple[float, float]]:
    for entry in metrics.get("curve", []):
        if value in entry:
            # at an even pace, where the run did not log its clock
            even = entry["step"] / metrics["steps"] * metrics["seconds"] if "steps" in metrics else None
            place = entry.get(over, even)
            if place is not None:
                yield place, entry[value]
