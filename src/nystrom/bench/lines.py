"""A measurement as one JSON line, and lines as a table."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nystrom.environment import describe

Line = dict[str, Any]


def stamp(bench: str, lines: Iterable[Line]) -> list[Line]:
    """Each measurement with its bench, the time (UTC) and the environment."""
    about = {"bench": bench, "utc": datetime.now(UTC).isoformat(timespec="seconds"), "environment": describe()}
    return [{**line, **about} for line in lines]


def append(path: Path, lines: Iterable[Line]) -> None:
    """Add the lines to a JSON-lines file, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def table(title: str, lines: list[Line], row: str, columns: dict[str, str], cell: str) -> Table:
    """A table with a row per value of `row` and a column per method; `cell` formats one line.

    Args:
        title: above the table.
        lines: the measurements; each has `row` and "method".
        row: the key that names rows.
        columns: method -> heading.
        cell: a format string over the line's fields, such as "{ms:.1f} ms".
    """
    made = Table(title=title, title_justify="left")
    made.add_column(row, justify="right")
    for heading in columns.values():
        made.add_column(heading, justify="right")
    by_place = {(line[row], line["method"]): line for line in lines}
    for value in dict.fromkeys(line[row] for line in lines):
        found = [by_place.get((value, method)) for method in columns]
        made.add_row(str(value), *(cell.format(**line) if line else "-" for line in found))
    return made


def show(*tables: Table) -> None:
    """Print tables; wide enough to keep rows whole when the output is a file."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    for each in tables:
        console.print(each)
