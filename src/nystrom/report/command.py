"""Runs side by side: what `nystrom finetune` and `nystrom pretrain` left behind, as one table.

    nystrom report runs/ --out report/

Runs that differ in their seed alone are one cell. Settings that an attention does not read make no difference to it.
Those that vary between runs of one task and attention name the columns, if they are of attention, or else the rows;
other differences in a row are noted below the table. The difference is to the run with exact attention that has all
other settings the same.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from nystrom.report.collect import collect, placed, together
from nystrom.report.page import markdown, numbers
from nystrom.runs import write_json


@dataclass(frozen=True, kw_only=True)
class Report:
    """Compare runs: one table of their scores, seeds together, with the difference to exact attention."""

    dirs: Annotated[Positional[tuple[Path, ...]], arg(metavar="DIR [DIR ...]")]
    """Folders of runs, or folders with some anywhere below."""
    out: Path | None = None
    """Folder for report.md, report.json and report.png; earlier ones in it are replaced."""


def run(config: Report) -> None:
    """Print the table, and write it with all numbers and a picture.

    Raises:
        FileNotFoundError: no such folder, or no finished run in it.
        ValueError: no folder is named; a file of a run is damaged; two runs are the same.
    """
    if not config.dirs:
        raise ValueError("name a folder of runs, or several: nystrom report runs/")
    found, unfinished = collect(config.dirs)
    if not found:
        some = f"; unfinished: {', '.join(unfinished)}" if unfinished else ""
        raise FileNotFoundError(f"{', '.join(map(str, config.dirs))}: no finished run in there{some}")
    table = placed(together(found))
    page = markdown(table, unfinished)
    print(page)
    if config.out is not None:
        from nystrom.report.picture import draw

        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "report.md").write_text(page + "\n", encoding="utf-8")
        write_json(config.out / "report.json", numbers(table, unfinished))
        draw(table, config.out / "report.png")
