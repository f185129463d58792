"""Kept measurements of speed as a picture: time against length, one line per form.

nystrom bench plot --lines docs/results/peers.jsonl --out docs/images/peers.png
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("agg")  # files only; a window needs a screen

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from nystrom.bench.lines import Line
from nystrom.bench.methods import NAMES
from nystrom.bench.speed import direction
from nystrom.bench.table import read

STYLES: dict[str, tuple[str, str]] = {
    "nystrom": ("#0072b2", "o"),
    "shift": ("#56b4e9", "P"),
    "residual": ("#e69f00", "X"),
    "exact": ("#000000", "s"),
    "three_factor": ("#d55e00", "^"),
    "hf": ("#009e73", "D"),
    "lucidrains": ("#cc79a7", "v"),
}
"""Colour (Okabe and Ito's, which the colour-blind tell apart) and marker of each form."""
GAP = 0.047
"""Least distance between two labels, as a part of the axis."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw time against length from kept JSON lines of speed: forward, and forward + backward where it was measured."""

    lines: Path
    """A file that 'nystrom bench speed' appended to; of several runs the last is drawn."""
    out: Path
    """PNG file to write; an earlier one is replaced."""


def run(config: Plot) -> None:
    """Draw the picture."""
    lines = last_run(config)
    panels = [panel for backward in (False, True) if (panel := [x for x in lines if x["backward"] == backward])]
    width = 1 + 4.6 * len(panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 4.4), sharey=True, squeeze=False, layout="constrained")
    for each, panel in zip(axes[0], panels, strict=True):
        draw(each, panel)
    for each, panel in zip(axes[0], panels, strict=True):  # once all have set the shared limits
        label(each, panel)
    axes[0][0].set_ylabel("milliseconds per call")
    first, about = lines[0], lines[0]["environment"]
    shape = f"{first['batch']} x {first['heads']} heads x {first['head_dim']}, {first['num_landmarks']} landmarks"
    machine = f"{about['processor']}, {first['threads']} threads, torch {about['packages']['torch']}"
    figure.suptitle(f"Attention, {shape}, {first['dtype']}: {machine}", fontsize=10)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.out, dpi=150, format="png", metadata={"Software": None})
    plt.close(figure)
    print(f"Wrote {config.out}")


def last_run(config: Plot) -> list[Line]:
    """The lines of attention alone, from the last run that made any.

    Raises:
        ValueError: there are none.
    """
    lines = [line for line in read(config.lines) if line["bench"] == "speed" and line.get("what") != "encoder"]
    if not lines:
        raise ValueError(f"{config.lines}: holds no time of attention; make some with: nystrom bench speed --out FILE")
    last = lines[-1]
    return [line for line in lines if (line["utc"], line["layout"]) == (last["utc"], last["layout"])]


def curves(panel: list[Line]) -> Iterable[tuple[str, list[tuple[int, float]]]]:
    """Each form with its points (length, ms), in the order of NAMES."""
    for form in NAMES:
        points = sorted((line["n"], line["ms"]) for line in panel if line["method"] == form)
        if points:
            yield form, points


def draw(axes: Axes, panel: list[Line]) -> None:
    """One line per form on logarithmic axes."""
    for form, points in curves(panel):
        color, marker = STYLES[form]
        ours = form == "nystrom"
        style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 2.6 if ours else 1.4}
        axes.plot(*zip(*points, strict=True), **style, zorder=3 if ours else 2)
    lengths = sorted({line["n"] for line in panel})
    axes.set(title=direction(panel[0]), xlabel="length (tokens)", xscale="log", yscale="log")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def label(axes: Axes, panel: list[Line]) -> None:
    """The name of each form beside the right end of its line, moved up where it would cover the one below."""
    low, high = axes.get_ylim()
    step, height = (high / low) ** GAP, 0.0
    for form, (*_, (n, ms)) in sorted(curves(panel), key=lambda curve: curve[1][-1][1]):
        height = max(ms, height * step)
        weight = "bold" if form == "nystrom" else "normal"
        axes.annotate(
            NAMES[form],
            (n, height),
            (8, 0),
            textcoords="offset points",
            va="center",
            color=STYLES[form][0],
            weight=weight,
        )
