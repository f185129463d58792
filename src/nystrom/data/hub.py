"""Rows of a data set of the Hugging Face hub: downloaded, or from a copy of its parquet files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def download(repository: str, config: str, split: str, columns: Sequence[str]) -> Rows:
    """Rows of a data set that `datasets` downloads, or has downloaded before.

    Raises:
        OSError: it is not to be had: no network, or no such data set.
        ValueError: a column is missing.
    """
    from datasets import Dataset, load_dataset

    try:
        found = load_dataset(repository, config, split=split)
    except Exception as error:  # network, hub and file formats each raise kinds of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{repository} ({config}, {split}) cannot be had from the Hugging Face hub: {reason}; "
            "name a copy on this machine with --data"
        ) from error
    assert isinstance(found, Dataset)
    return _rows(found.data.table, columns, f"{repository} ({config}, {split})")


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The files of a split, in order, in a folder laid out as on the hub: SPLIT-00000-of-00001.parquet. May be none.

    Raises:
        ValueError: part of them is missing.
    """
    files = sorted(folder.glob(f"{split}-[0-9]*-of-[0-9]*.parquet"))
    if files and len(files) != int(files[0].stem.rpartition("-")[2]):
        raise ValueError(f"{files[0]}: {len(files)} files of {split} are here, not as many as their names say")
    return files


def read_parquet(files: Sequence[Path], columns: Sequence[str]) -> Rows:
    """Rows of parquet files, one file after the other.

    Raises:
        ValueError: not a parquet file, or a column is missing.
    """
    import pyarrow
    from pyarrow import parquet

    found: Rows = []
    for path in files:
        try:
            table = parquet.ParquetFile(path).read()
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # the disk's, not the file's
                raise
            raise ValueError(f"{path}: not a parquet file, or a damaged one: {error}; get it again") from None
        found += _rows(table, columns, str(path))
    return found


def _rows(table: Any, columns: Sequence[str], where: str) -> Rows:
    for column in columns:
        if column not in table.column_names:
            raise ValueError(f"{where}: no column {column!r}; its columns: {', '.join(table.column_names)}")
    return table.select(list(columns)).to_pylist()
