"""A measurement as one JSON line, and lines as a table."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from nystrom.environment import describe

Line = dict[str, Any]


def record(bench: str, lines: Iterable[Line], out: Path | None) -> list[Line]:
    """Each measurement with its bench, the time the run began (UTC) and the environment.

    Each is added to the JSON-lines file as soon as it is made, so that a run that is stopped leaves what it measured.
    """
    about = {"bench": bench, "utc": datetime.now(UTC).isoformat(timespec="seconds"), "environment": describe()}
    stamped = []
    for line in lines:
        stamped.append({**line, **about})
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a") as file:
                file.write(json.dumps(stamped[-1]) + "\n")
    return stamped


RUN = ("bench", "utc", "what", "layout")
"""Lines next to each other that share these belong in one table, within the split that `tables` makes."""


def tables(lines: Iterable[Line]) -> list[list[Line]]:
    """Cut lines into tables: forward and backward make two, but of encoders and scale; each length of errors one; plans
    of one width lie in one, whenever they were made."""

    def table_of(line: Line) -> str:
        if line["bench"] == "plan":
            sizes = [line[key] for key in ("method", "embed_dim", "heads", "num_landmarks", "batch", "threads")]
            return str([*sizes, line["environment"]["commit"]])
        keys = [*RUN, *(["n"] if line["bench"] in ("synthetic", "error") else [])]
        both = line.get("what") == "encoder" or line["bench"] == "scale"
        return str([line.get(key) for key in keys + ([] if both else ["backward"])])

    return [list(group) for _, group in groupby(lines, table_of)]


class Grid(NamedTuple):
    """A table before it is printed."""

    title: str
    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As a Markdown table, its title in bold above it."""
        rule = ["---:"] * len(self.headings)
        return "\n".join(
            [f"**{self.title}**", "", *(f"| {' | '.join(row)} |" for row in (self.headings, rule, *self.rows))]
        )


def grid(title: str, lines: list[Line], row: str, columns: dict[str, str], cell: str) -> Grid:
    """A row per value of `row` and a column per method that was measured; "-" where one could not be.

    Args:
        title: what the cells are, with their unit.
        lines: the measurements; each has `row` and "method".
        row: the key that names rows.
        columns: method -> heading.
        cell: a format string over a line's fields, such as "{ms:.1f} ms".
    """
    by_place = {(line[row], line["method"]): line for line in lines}
    columns = {method: heading for method, heading in columns.items() if any(m == method for _, m in by_place)}
    rows = []
    for value in dict.fromkeys(line[row] for line in lines):
        found = [by_place.get((value, method)) for method in columns]
        rows.append([str(value), *(cell.format(**line) if line else "-" for line in found)])
    return Grid(title, [row, *columns.values()], rows)


def show(*grids: Grid) -> None:
    """Print tables; wide enough to keep rows whole when the output is a file."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    for each in grids:
        table = Table(title=each.title, title_justify="left")
        for heading in each.headings:
            table.add_column(heading, justify="right")
        for cells in each.rows:
            table.add_row(*cells)
        console.print(table)
