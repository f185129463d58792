"""Labelled texts of one's own: a .csv, .tsv, .jsonl or .parquet file to examples.

.csv     as spreadsheets write it: a header line; a text with commas, line ends or quotation marks stands in quotes
.tsv     as GLUE writes it: a header line, one row a line, columns parted by tabs, and no quoting of any kind
.jsonl   a JSON object on every line
.parquet as pandas, polars and datasets write it
The first three may be compressed (.csv.gz).
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nystrom.data import hub
from nystrom.data.examples import Example, class_number, decode, score

Row = tuple[str, dict[str, Any]]  # file and line, for messages; and column -> value
LONGEST = 2**31 - 1  # characters in a field: csv's own limit, 131,072, is less than a long document


def read(
    path: Path,
    text_column: str,
    label_column: str | None,
    pair_column: str | None = None,
    labels: tuple[str, ...] | None = None,
    regression: bool = False,
) -> tuple[list[Example], tuple[str, ...]]:
    """The examples of a file, and the names of their classes.

    Args:
        path: a .csv, .tsv, .jsonl or .parquet file.
        text_column: the text.
        label_column: the label. None: the examples are unlabelled.
        pair_column: the second text, where the model compares two.
        labels: the classes there are, in order; another label is an error. None: those found in the file, sorted (by
            value where all are whole numbers).
        regression: the label is a number to predict, not a class; there are no names then.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file; a damaged or empty one; a missing column; a row with too few or too many
            columns; an empty text or label; a label that is none of `labels`, or no finite number with `regression`;
            one class only. The message names file and line.
    """
    examples, names = [], []
    columns = [column for column in (text_column, pair_column, label_column) if column is not None]
    for index, (where, row) in enumerate(_rows(path, columns)):
        text = _text(row, text_column, where)
        pair = None if pair_column is None else _text(row, pair_column, where)
        if label_column is None:
            label = None
        elif regression:
            label = score(str(_value(row, label_column, where)), where)
        else:
            names.append(_name(row, label_column, where))
            label = None if labels is None else class_number(names[-1], labels, where)
        examples.append(Example(text, pair, label, index))
    if not examples:
        raise ValueError(f"{path}: no rows in this file")
    if labels is None and names:
        labels = _sorted(set(names))
        if len(labels) == 1:
            raise ValueError(f"{path}: every row has the label {labels[0]!r}; a classifier needs two or more")
        number = {name: place for place, name in enumerate(labels)}
        examples = [example._replace(label=number[name]) for example, name in zip(examples, names, strict=True)]
    return examples, labels or ()


def _sorted(names: set[str]) -> tuple[str, ...]:
    whole = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name), name)) if whole else sorted(names))


def _value(row: dict[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise ValueError(f"{where}: no column {column!r}; its columns: {', '.join(row)}")
    value = row[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{where}: column {column!r} is empty; fill it in or delete the row")
    return value


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = _value(row, column, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {column!r} holds {value!r}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write one, but no tokenizer can read it
        raise ValueError(f"{where}: column {column!r} holds half a character (a lone surrogate)") from None
    return value


def _name(row: dict[str, Any], column: str, where: str) -> str:
    """The label as text: a whole number in digits, true and false as JSON writes them."""
    value = _value(row, column, where)
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int):
        raise ValueError(f"{where}: label {value!r} is neither text nor a whole number; scores need --regression")
    name = str(value)
    if name != name.strip():
        raise ValueError(f"{where}: label {name!r} begins or ends with a space; correct the row")
    if "\t" in name or "\n" in name or "\r" in name:  # the predictions are written one a line, between tabs
        raise ValueError(f"{where}: label {name!r} holds a tab or a line end; rename it")
    return name


def _rows(path: Path, columns: list[str]) -> Iterator[Row]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = "".join((suffixes[:-1] if packed else suffixes)[-1:])
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if kind == ".parquet" and not packed:
        rows = hub.read_parquet([path], columns)
        return ((f"{path}, row {number + 1}", row) for number, row in enumerate(rows))
    read_lines = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl}.get(kind)
    if read_lines is None:
        raise ValueError(f"{path}: not a .csv, .tsv or .jsonl file, nor one of these with .gz, nor a .parquet file")
    text = decode(_unpacked(path) if packed else path.read_bytes(), path)
    lines = text.rstrip("\r\n").split("\n")  # no other character ends a line
    return read_lines(path, lines) if lines != [""] else iter(())


def _unpacked(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a gzip file, or a damaged one: {error}; get it again") from None


def _csv(path: Path, lines: list[str]) -> Iterator[Row]:
    usual = csv.field_size_limit(LONGEST)
    found: list[tuple[int, list[str]]] = []
    reader = csv.reader((line + "\n" for line in lines), strict=True)
    line = 1  # where a row begins: it may go on over several lines
    try:
        for row in reader:
            found.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {line}: the row that begins here is not CSV: {error}; a text with quotation marks stands in "
            'quotation marks, and its own are doubled: "He said ""no""."'
        ) from None
    finally:
        csv.field_size_limit(usual)
    (_, header), *rest = found
    return (_named(path, line, header, row) for line, row in rest)


def _tsv(path: Path, lines: list[str]) -> Iterator[Row]:
    header, *rows = [line.removesuffix("\r").split("\t") for line in lines]
    for number, row in enumerate(rows):
        for value in row:
            if value[:1] == value[-1:] == '"' and '""' in value[1:-1] and '"' not in value[1:-1].replace('""', ""):
                raise ValueError(
                    f"{path}, line {number + 2}: {value!r:.60} is quoted as in a .csv file, but a .tsv file is read as "
                    "it stands; write the table as .csv"
                )
        yield _named(path, number + 2, header, row)


def _jsonl(path: Path, lines: list[str]) -> Iterator[Row]:
    for number, line in enumerate(lines):
        where = f"{path}, line {number + 1}"
        if not line.strip():
            raise ValueError(f"{where}: blank; remove the line")
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}; correct the line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: got {row!r:.60}, not a JSON object; write one object on every line")
        yield where, row


def _named(path: Path, line: int, header: list[str], row: list[str]) -> Row:
    if len(set(header)) != len(header):
        raise ValueError(f"{path}: two columns have the same name: {', '.join(header)}; rename one")
    if "".join(row) == "" and len(row) < 2:
        raise ValueError(f"{path}, line {line}: blank; remove the line")
    if len(row) != len(header):
        raise ValueError(
            f"{path}, line {line}: got {len(row)} columns, but the header names {len(header)} ({', '.join(header)}); "
            "correct the row"
        )
    return f"{path}, line {line}", dict(zip(header, row, strict=True))
