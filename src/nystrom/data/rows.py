"""Data sets whose rows are documents: .jsonl, .jsonl.gz and .parquet files, and what `datasets` opens. Streamed."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nystrom.data.text import GZIP_ERRORS, open_bytes, unpacking_failed

Part = Literal["all", "train", "held out"]

HASHES = 1 << 32


class Rows(NamedTuple):
    """The rows of a file, or those of one part: which part a row is in depends on a hash of its text, so that equal
    texts are never in both.
    """

    path: str
    field: str
    size: int
    """Bytes of text in all of the file (count)."""
    lowest: int
    highest: int
    """Of the hashes of its texts."""
    part: Part = "all"
    threshold: int = 0
    """Rows whose hash is at most this are held out."""

    def documents(self) -> Iterator[Iterator[str]]:
        """Each row's text."""
        for _, text in read_rows(self.path, self.field):
            if _is_in(self.part, text, self.threshold):
                yield iter([text])


class Dataset(NamedTuple):
    """What `datasets.load_dataset` opens, streamed: a name on the Hugging Face Hub, or a folder."""

    path: str
    config: str | None
    split: str
    field: str
    part: Part = "all"
    threshold: int = 0
    """Rows whose hash is at most this are held out."""
    shard: int = 0
    """Number of the shard; its files are read apart from those of the others."""
    shards: int = 1
    size: None = None
    """Not known before all is read."""

    def documents(self) -> Iterator[Iterator[str]]:
        """Each row's text.

        Raises:
            ValueError: a row's text is not a string; found when the row is reached.
        """
        rows = open_dataset(self.path, self.config, self.split, self.field)
        if self.shards > 1:
            rows = rows.shard(self.shards, self.shard)
        place = f"{self.path} ({self.split}" + (f", shard {self.shard})" if self.shards > 1 else ")")
        for number, row in enumerate(rows):
            text = checked(row[self.field], self.field, f"{place}, row {number}")
            if _is_in(self.part, text, self.threshold):
                yield iter([text])


def check_rows(path: Path, field: str) -> Rows:
    """Read a file once, and return all of its rows.

    Args:
        path: .jsonl, .jsonl.gz or .parquet.
        field: which one is the text.

    Raises:
        ValueError: a row is malformed, or its text missing or not a string; the message names its line or number. No
            row has text.
        OSError: unreadable.
    """
    size, lowest, highest = 0, HASHES, -1
    for _, text in read_rows(path, field):
        if text:
            size += len(text.encode())
            lowest, highest = min(lowest, own := _hash(text)), max(highest, own)
    if size == 0:
        raise ValueError(f"{path}: no text in its rows; leave it out of --data")
    return Rows(str(path), field, size, lowest, highest)


def split_rows(files: Sequence[Rows], fraction: float) -> tuple[list[Rows], list[Rows]]:
    """Hold out rows of all files by one rule, so that a text that is in two of them is on one side.

    Args:
        files: checked, one or more.
        fraction: part of the rows to hold out, about; at least one is, and at least one is not.

    Raises:
        ValueError: all rows have the same text.
    """
    lowest, highest = min(rows.lowest for rows in files), max(rows.highest for rows in files)
    if lowest == highest:
        where = files[0].path + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        raise ValueError(f"{where}: needs two rows of different text or more, to hold out one; pass --eval-data")
    threshold = min(max(round(fraction * HASHES), lowest), highest - 1)
    train = [rows._replace(part="train", threshold=threshold) for rows in files if rows.highest > threshold]
    held_out = [rows._replace(part="held out", threshold=threshold) for rows in files if rows.lowest <= threshold]
    return train, held_out


def corpus(
    path: str, config: str | None, split: str, eval_split: str | None, field: str, fraction: float
) -> tuple[list[Dataset], list[Dataset]]:
    """Shards of a data set to train on, and held-out ones: those of eval_split, or None: a fraction of the rows.

    Raises:
        OSError: it is not to be had.
        ValueError: it has no such column; the two splits are one.
    """
    if split == eval_split:
        raise ValueError(f"the held-out split must be another than the one to train on: got {split} for both")
    if eval_split is not None:
        return _shards(path, config, split, field), _shards(path, config, eval_split, field)
    shards, threshold = _shards(path, config, split, field), round(fraction * HASHES)
    train, held_out = (
        [shard._replace(part=part, threshold=threshold) for shard in shards] for part in ("train", "held out")
    )
    return train, held_out


def _shards(path: str, config: str | None, split: str, field: str) -> list[Dataset]:
    count = open_dataset(path, config, split, field).num_shards
    return [Dataset(path, config, split, field, shard=shard, shards=count) for shard in range(count)]


def open_dataset(path: str, config: str | None, split: str, field: str) -> Any:
    """The rows of a split, streamed, with this column alone.

    Raises:
        OSError: it is not to be had: no network, or no such data set.
        ValueError: it has no such column.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(path, config, split=split, streaming=True)
        names = rows.column_names or list(next(iter(rows.take(1)), {}))
    except Exception as error:  # network, hub and file formats each raise kinds of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{path} (config {config}, split {split}) cannot be had with the package datasets: {reason}; check the "
            "name and the network, or name files on this machine with --data"
        ) from error
    if field not in names:
        raise ValueError(f"{path}: no column {field!r}; its columns: {', '.join(names)}; pass --text-field")
    return rows.select_columns([field])


def read_rows(path: str | Path, field: str) -> Iterator[tuple[str, str]]:
    """Where each row is, in words, and its text.

    Raises:
        ValueError: a row is malformed, or its text missing or not a string.
    """
    return _parquet(path, field) if str(path).lower().endswith(".parquet") else _json_lines(path, field)


def _json_lines(path: str | Path, field: str) -> Iterator[tuple[str, str]]:
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                place = f"{path}, line {number}"
                if not line.strip():
                    raise ValueError(f"{place}: blank; remove the line")
                try:
                    row = json.loads(line)
                except ValueError as error:  # also what is not UTF-8
                    raise ValueError(f"{place}: not JSON: {error}; mend or remove it") from None
                if not isinstance(row, dict) or field not in row:
                    found = f"fields {', '.join(row)}" if isinstance(row, dict) else repr(row)[:50]
                    raise ValueError(f"{place}: no field {field!r}: got {found}; pass --text-field")
                yield place, checked(row[field], field, place)
    except GZIP_ERRORS as error:
        raise unpacking_failed(path, error) from None


def _parquet(path: str | Path, field: str) -> Iterator[tuple[str, str]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise ValueError(f"{path}: no column {field!r}; its columns: {', '.join(names)}; pass --text-field")
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    place = f"{path}, row {number}"
                    yield place, checked(value.as_py(), field, place)
                    number += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a parquet file, or a damaged one: {error}; get it again") from None


def checked(text: object, field: str, place: str) -> str:
    """The text of a row.

    Raises:
        ValueError: it is not a string, or holds half a surrogate pair, which no encoding can write.
    """
    if not isinstance(text, str):
        raise ValueError(f"{place}: {field!r} must be a string: got {text!r}"[:300])
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: {field!r} is not text: {error.reason} at character {error.start}") from None
    return text


def _is_in(part: Part, text: str, threshold: int) -> bool:
    return part == "all" or (_hash(text) <= threshold) == (part == "held out")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest())
