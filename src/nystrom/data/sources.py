"""Where documents come from: text files, files of rows, data sets; found, checked, split."""

from collections.abc import Iterable
from pathlib import Path

from nystrom.data.rows import Dataset, Rows, check_rows, split_rows
from nystrom.data.text import TEXT_SUFFIXES, Encoding, Span, check_text, find_files, split

ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
FIELD = "text"
"""Of rows, where no other is named."""
READ = [*sorted(TEXT_SUFFIXES), *ROW_SUFFIXES, "and .gz of all text"]

Source = Span | Rows | Dataset
"""Each has documents(), which are pieces of text in order."""


def corpus(
    data: Iterable[Path], eval_data: Iterable[Path], field: str, encoding: Encoding, fraction: float
) -> tuple[list[Source], list[Source]]:
    """Sources to train on and held-out ones, with no document in both: equal ones go to one side.

    Every file is read once here, so that a bad one stops the run before it begins.

    Args:
        data: files, and folders of which all files with a suffix that is read are taken.
        eval_data: the same, held out. Where there is none, this fraction of data is: whole text files, of a lone one
            its last stretch; of other files, rows.
        field: of the rows, the text.
        encoding: of the text files.
        fraction: part to hold out.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a file is no text, or has a bad row, and the message names file and place; data and eval_data share
            a file; a folder holds nothing that is read; field or encoding is not the default, and no file needs it.
        OSError: unreadable.
    """
    files, held_out = (find_files(paths, _is_read, READ) for paths in (data, eval_data))
    if shared := set(files) & set(held_out):
        raise ValueError(f"--data and --eval-data must share no file: both hold {min(shared)} ({len(shared)} in all)")
    rows = [path for path in (*files, *held_out) if _has_rows(path)]
    if field != FIELD and not rows:
        raise ValueError(f"text_field is of .jsonl and .parquet files, and there are none: got {field}; leave it out")
    if encoding != "utf-8" and len(rows) == len(files) + len(held_out):
        raise ValueError(f"encoding is of text files, and there are none: got {encoding}; leave it out")
    if held_out:
        return [*_checked(files, field, encoding)], [*_checked(held_out, field, encoding)]
    train: list[Source] = []
    apart: list[Source] = []
    found = _checked(files, field, encoding)
    if spans := [source for source in found if isinstance(source, Span)]:
        kept, held = split(spans, fraction)
        train, apart = [*kept], [*held]
    if tables := [source for source in found if isinstance(source, Rows)]:
        kept, held = split_rows(tables, fraction)
        train, apart = [*train, *kept], [*apart, *held]
    return train, apart


def _checked(files: Iterable[Path], field: str, encoding: Encoding) -> list[Span | Rows]:
    return [check_rows(path, field) if _has_rows(path) else check_text(path, encoding) for path in files]


def _has_rows(path: Path) -> bool:
    return path.name.lower().endswith(ROW_SUFFIXES)


def _is_read(path: Path) -> bool:
    bare = Path(path.stem) if path.suffix.lower() == ".gz" else path
    return _has_rows(path) or bare.suffix.lower() in TEXT_SUFFIXES
