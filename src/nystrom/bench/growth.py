"""Kept measurements of scale as a picture: time and memory against length, with fitted slopes.

nystrom bench growth --lines docs/results/scale.jsonl --out docs/images/scale.png
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("agg")  # files only; a window needs a screen

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from nystrom.bench.lines import Line
from nystrom.bench.plot import STYLES
from nystrom.bench.scale import series, slope
from nystrom.bench.table import read

AXES = {"ms": ("seconds", 1e-3), "peak_mib": ("peak memory beyond the inputs (GiB)", 2**-10)}


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Draw time and memory against length from kept JSON lines of scale; exact attention's time goes on dashed."""

    lines: Path
    """A file that 'nystrom bench scale' appended to; of several runs of a part the last is drawn."""
    out: Path
    """PNG file to write; an earlier one is replaced."""


def run(config: Growth) -> None:
    """Draw the picture."""
    lines = [line for line in read(config.lines) if line["bench"] == "scale"]
    if not lines:
        raise ValueError(f"{config.lines}: holds no line of scale; make some with: nystrom bench scale --out FILE")
    last = {line["part"]: line["utc"] for line in lines}
    lines = [line for line in lines if line["utc"] == last[line["part"]]]
    parts = list(dict.fromkeys(line["part"] for line in lines))
    lengths = sorted({line["n"] for line in lines})
    figure, places = plt.subplots(
        2, len(parts), figsize=(1 + 5 * len(parts), 7.6), sharex=True, squeeze=False, layout="constrained"
    )
    for column, part in enumerate(parts):
        own = [line for line in lines if line["part"] == part]
        for row, of in enumerate(AXES):
            draw(places[row][column], own, of, lengths)
        places[0][column].set_title({"attention": "one attention", "block": "one block of an encoder, streamed"}[part])
        places[1][column].set_xlabel("length (tokens)")
    for row, (name, _) in enumerate(AXES.values()):
        places[row][0].set_ylabel(name)
    found = {
        label: handle for place in places.flat for handle, label in zip(*place.get_legend_handles_labels(), strict=True)
    }
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=3, frameon=False)
    first, about = lines[0], lines[0]["environment"]
    sizes = f"{first['heads']} heads x {first['head_dim']}, {first['num_landmarks']} landmarks, float32"
    machine = f"{about['processor']}, {first['threads']} threads, torch {about['packages']['torch']}"
    figure.suptitle(f"{sizes}: {machine}", fontsize=10)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.out, dpi=150, format="png", metadata={"Software": None})
    plt.close(figure)
    print(f"Wrote {config.out}")


def draw(axes: Axes, lines: list[Line], of: str, lengths: list[int]) -> None:
    """A line for each method and direction, the slope at the end of ours."""
    unit = AXES[of][1]
    longest = max(line["n"] for line in lines)
    for (_, method, backward), own in series(lines).items():
        points = [(line["n"], unit * line[of]) for line in own]
        style = {"color": STYLES[method][0], "linestyle": "-" if backward else ":", "linewidth": 1.8}
        label = f"{method}, " + ("forward + backward" if backward else "forward")
        axes.plot(*zip(*points, strict=True), marker=STYLES[method][1], markersize=4, label=label, **style)
        n, last = points[-1]
        if method == "exact" and of == "ms" and n < longest:
            beyond = {**style, "linestyle": (0, (2, 3)), "linewidth": 1.0}
            name = "exact, extrapolated (time ∝ length²)" if backward else None
            axes.plot([n, longest], [last, last * (longest / n) ** 2], label=name, **beyond)
        found = slope(own, of)
        if found is not None and method != "exact":
            axes.annotate(f"slope {found:.2f}", points[-1], (7, 0), va="center", **TEXT)
    axes.set(xscale="log", yscale="log", xlim=(0.8 * lengths[0], 3 * lengths[-1]))  # room for the slopes
    axes.set_xticks(lengths, [f"2$^{{{n.bit_length() - 1}}}$" if n & (n - 1) == 0 else str(n) for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 50 * low else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


TEXT = {"textcoords": "offset points", "fontsize": 9, "color": STYLES["nystrom"][0]}
