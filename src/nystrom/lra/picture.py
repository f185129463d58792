"""Accuracy against speed and against memory, a column of panels for each task."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")  # files only; a window needs a screen

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from nystrom.lra.tasks import NAMES
from nystrom.report.collect import Placed
from nystrom.report.picture import COLOURS, MARKERS

LEAST_SPAN = 5
"""Points of accuracy that a panel shows at least, so that chance does not look like a difference (per cent)."""
OVER = {"examples_per_second": "examples/s (training)", "peak_memory": "peak memory (MiB)"}


def draw(table: list[Placed], path: Path) -> None:
    """Write a PNG."""
    found = dict.fromkeys(one.cell.task for one in table)
    tasks = [task for task in NAMES if task in found] + [task for task in found if task not in NAMES]
    columns = list(dict.fromkeys(one.column for one in table))
    figure, places = plt.subplots(
        2, len(tasks), figsize=(1.5 + 2.9 * len(tasks), 6.2), layout="constrained", squeeze=False, sharey="col"
    )
    for column, task in enumerate(tasks):
        for row, name in enumerate(OVER):
            panel(places[row][column], [one for one in table if one.cell.task == task], columns, name)
        places[0][column].set_title(NAMES.get(task, task))
    for row, title in enumerate(OVER.values()):
        places[row][0].set_ylabel("test accuracy (per cent)")
        for place in places[row]:
            place.set_xlabel(title)
    legend = {
        label: handle for place in figure.axes for handle, label in zip(*place.get_legend_handles_labels(), strict=True)
    }
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=6, frameon=False)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=150, format="png", metadata={"Software": None})
    plt.close(figure)
    partial.replace(path)


def panel(axes: Axes, table: list[Placed], columns: list[str], name: str) -> None:
    """A point for each cell."""
    for one in table:
        cell, place = one.cell, columns.index(one.column)
        value = cell.mean(name)
        if value is None:
            continue
        axes.errorbar(
            value / (2**20 if name == "peak_memory" else 1),
            100 * cell.score()["mean"],
            100 * cell.score()["sd"],
            fmt=MARKERS[place % len(MARKERS)],
            color=COLOURS[cell.attention],
            capsize=3,
            label=one.column,
        )
    axes.set_xlim(left=0)
    low, high = axes.get_ylim()
    wider = max(0.0, LEAST_SPAN - (high - low)) / 2
    axes.set_ylim(low - wider, high + wider)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
