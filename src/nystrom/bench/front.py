"""Kept errors as a picture: error against time, every method and setting a point, and the front that none beats.

nystrom bench front --lines docs/results/error.jsonl --out docs/images/error.png
"""

from dataclasses import dataclass
from itertools import pairwise, product
from math import cos, pi, sin
from pathlib import Path

import matplotlib

matplotlib.use("agg")  # files only; a window needs a screen

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox, BboxBase

from nystrom.bench.lines import Line
from nystrom.bench.table import read

STYLES: dict[str, tuple[str, str, str]] = {
    "ours": ("ours", "#d55e00", "o"),
    "nystrom": ("Nyströmformer and variants", "#0072b2", "s"),
    "other": ("other methods", "#404040", "^"),
}
"""Heading, colour (Okabe and Ito's, which the colour-blind tell apart) and marker of each family."""
Pixel = tuple[float, float]
"""A place in the picture."""
REACH = (7, 12, 18, 25, 34, 45, 60, 80)
"""Distances from a point at which its name is tried (pixels), nearest first."""


@dataclass(frozen=True, kw_only=True)
class Front:
    """Draw error against time from kept JSON lines of error: a panel per length, and the front that none beats."""

    lines: Path
    """A file that 'nystrom bench error' appended to; of several runs of a length the last is drawn."""
    out: Path
    """PNG file to write; an earlier one is replaced."""


def run(config: Front) -> None:
    """Draw the picture."""
    panels = last_runs(config)
    size = (1 + 5.2 * len(panels), 5.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    heights = limits([line["error"] for panel in panels for line in approximate(panel)])
    for each, panel in zip(axes[0], panels, strict=True):
        draw(each, panel, heights)
    axes[0][0].set_ylabel("relative error of the attention output")
    first, about = panels[0][0], panels[0][0]["environment"]
    machine = f"{about['processor']}, {first['threads']} threads, torch {about['packages']['torch']}"
    figure.suptitle(f"{first['model']}, mean of {first['layers']} layers; {machine}", fontsize=10)
    families = {line["family"] for panel in panels for line in panel}
    keys = [
        Line2D([], [], color=c, marker=m, linestyle="", label=x) for f, (x, c, m) in STYLES.items() if f in families
    ]
    keys.append(Line2D([], [], color="0.6", label="none is both faster and closer"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=9)
    figure.draw_without_rendering()  # fixes the places in pixels, which labels need
    figure.set_layout_engine("none")
    for each, panel in zip(axes[0], panels, strict=True):
        label(each, approximate(panel))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.out, dpi=150, format="png", metadata={"Software": None})
    plt.close(figure)
    print(f"Wrote {config.out}")


def last_runs(config: Front) -> list[list[Line]]:
    """The lines of the last run of each length.

    Raises:
        ValueError: there are none.
    """
    lines = [line for line in read(config.lines) if line["bench"] == "error"]
    last = {line["n"]: line["utc"] for line in lines}
    panels = [[line for line in lines if (line["n"], line["utc"]) == run] for run in sorted(last.items())]
    panels = [panel for panel in panels if approximate(panel)]
    if not panels:
        raise ValueError(f"{config.lines}: holds no error of a method; make some with: nystrom bench error --out FILE")
    return panels


def approximate(panel: list[Line]) -> list[Line]:
    """The lines of all methods but the exact one, whose error no logarithm can show."""
    return [line for line in panel if line["error"] > 0]


def front(lines: list[Line]) -> list[tuple[float, float]]:
    """The points (ms, error) that no other method beats in both, fastest first."""
    best: list[tuple[float, float]] = []
    for ms, error in sorted((line["ms"], line["error"]) for line in lines):
        if not best or error < best[-1][1]:
            best.append((ms, error))
    return best


def limits(values: list[float]) -> tuple[float, float]:
    """The least and the largest value, and on a logarithmic axis a tenth of the way more at both ends."""
    low, high = min(values), max(values)
    room = max(high / low, 1.5) ** 0.1
    return low / room, high * room


def draw(axes: Axes, panel: list[Line], heights: tuple[float, float]) -> None:
    """The points, the front, and where exact attention is, on logarithmic axes."""
    lines = approximate(panel)
    left, right = limits([line["ms"] for line in panel])
    axes.set(title=f"{panel[0]['n']} tokens", xlabel="milliseconds per call", xscale="log", yscale="log")
    axes.set(xlim=(left, right), ylim=heights)
    for family, (_, color, marker) in STYLES.items():
        points = [(line["ms"], line["error"]) for line in lines if line["family"] == family]
        if points:
            size = 70 if family == "ours" else 34
            axes.scatter(*zip(*points, strict=True), s=size, c=color, marker=marker, zorder=3, linewidths=0)
    best = front(lines)
    corners = [(best[0][0], heights[1]), *best, (right, best[-1][1])]
    axes.step(*zip(*corners, strict=True), where="post", color="0.7", linewidth=1.4, zorder=1)
    for line in panel:
        if line["error"] == 0:
            axes.axvline(line["ms"], color="0.35", linestyle="--", linewidth=1.2, zorder=1)
            place = {"textcoords": "offset points", "va": "top", "ha": "right", "rotation": 90}
            axes.annotate("exact", (line["ms"], heights[1]), (-2, -4), fontsize=9, color="0.35", **place)
    for axis, subs in ((axes.xaxis, (1, 2, 3, 5)), (axes.yaxis, (1, 2, 3, 4, 5, 6, 8))):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.grid(color="0.95")
    axes.spines[["top", "right"]].set_visible(False)


def label(axes: Axes, lines: list[Line]) -> None:
    """A name near each point, and a thin line to the point where it is not beside it.

    A name keeps clear of all points and other names, and, where there is room, of the lines.
    """
    points = [(float(x), float(y)) for x, y in axes.transData.transform([(x["ms"], x["error"]) for x in lines])]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    taken += [text.get_window_extent() for text in axes.texts]
    drawn = [box for each in axes.lines for box in stretches(each)]
    inside = axes.get_window_extent()
    to_data = axes.transData.inverted()
    ours_first = sorted(range(len(lines)), key=lambda i: (lines[i]["family"] != "ours", -points[i][1]))
    for i in ours_first:
        line, (x, y) = lines[i], points[i]
        _, color, _ = STYLES[line["family"]]
        weight = "bold" if line["family"] == "ours" else "normal"
        text = axes.text(0, 0, line["label"], fontsize=8, color=color, weight=weight, va="center", ha="center")
        text.set_path_effects([Stroke(linewidth=2, foreground="white"), Normal()])
        size = text.get_window_extent()
        places = [p for p in around(x, y, size.width, size.height) if within(p, inside)]
        free = [p for p in places if not p.count_overlaps(taken)]
        place = min(free, key=lambda p: crossings(p, lead(p, x, y), taken, drawn), default=places[0])
        taken.append(place)
        middle = to_data.transform(((place.x0 + place.x1) / 2, (place.y0 + place.y1) / 2))
        text.set_position((float(middle[0]), float(middle[1])))
        if ends := lead(place, x, y):
            axes.plot(*to_data.transform(ends).T, color=color, linewidth=0.5, zorder=2)
            drawn.append(around_both(*ends))


def around(x: float, y: float, width: float, height: float) -> list[Bbox]:
    """Places for a name of that size around a point, nearest first."""
    found = []
    for reach, turn in product(REACH, range(16)):
        dx, dy = cos(turn * pi / 8), sin(turn * pi / 8)
        middle_x, middle_y = x + dx * (reach + width / 2), y + dy * (reach + height / 2)
        found.append(Bbox.from_bounds(middle_x - width / 2, middle_y - height / 2, width, height))
    return found


def within(inner: Bbox, outer: BboxBase) -> bool:
    """Whether one box holds another."""
    return bool(outer.x0 <= inner.x0 and inner.x1 <= outer.x1 and outer.y0 <= inner.y0 and inner.y1 <= outer.y1)


def lead(place: Bbox, x: float, y: float) -> tuple[Pixel, Pixel] | None:
    """The line from a point to the name at that place; None where they are next to each other."""
    near = (min(max(x, place.x0), place.x1), min(max(y, place.y0), place.y1))
    return ((x, y), near) if max(abs(near[0] - x), abs(near[1] - y)) > REACH[1] else None


def crossings(place: Bbox, ends: tuple[Pixel, Pixel] | None, taken: list[Bbox], drawn: list[Bbox]) -> int:
    """What a name and its line cross: lines under the name, and names under its line, which read worse."""
    under = around_both(*ends).count_overlaps(taken) - 1 if ends else 0  # its own point is one
    return place.count_overlaps(drawn) + 2 * under


def around_both(one: Pixel, other: Pixel) -> Bbox:
    """The box with these corners, a pixel larger on every side."""
    (x, y), (x2, y2) = one, other
    return Bbox([(min(x, x2) - 1, min(y, y2) - 1), (max(x, x2) + 1, max(y, y2) + 1)])


def stretches(drawn: Line2D) -> list[Bbox]:
    """The upright and level stretches of a line, as boxes."""
    ends = [(float(x), float(y)) for x, y in drawn.get_transform().transform(drawn.get_xydata())]
    if drawn.get_drawstyle() == "steps-post":
        ends = [end for (x, y), (x2, _) in pairwise(ends) for end in ((x, y), (x2, y))] + ends[-1:]
    return [around_both(*pair) for pair in pairwise(ends)]
