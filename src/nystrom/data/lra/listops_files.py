"""ListOps in Long Range Arena's files, which are tab-separated: an expression with parentheses, and its value."""

import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

import numpy as np

from nystrom.data.lra.listops import CLOSE, MIN, SYMBOLS, Expressions, evaluate

FILES = {"train": "basic_train.tsv", "dev": "basic_val.tsv", "test": "basic_test.tsv"}
PACKINGS = ("", ".gz", ".xz")
HEADER = "Source\tTarget"
END = "\r\n"
TOKENS = {symbol: token for token, symbol in enumerate(SYMBOLS, start=1)}
_DAMAGE = (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error)


def read(data: Path, split: str) -> Expressions:
    """A split, from a folder that holds Long Range Arena's files, which may be packed (.gz, .xz).

    Raises:
        FileNotFoundError: the split's file is not there.
        ValueError: no such split; as `read_file`.
    """
    if split not in FILES:
        raise ValueError(f"ListOps has no split {split!r}; it has {', '.join(FILES)}")
    for packing in PACKINGS:
        if (path := data / (FILES[split] + packing)).is_file():
            return read_file(path)
    raise FileNotFoundError(f"{data}: no {FILES[split]} in it, nor one with {' or '.join(PACKINGS[1:])}")


def read_file(path: Path) -> Expressions:
    """All expressions of a file, in its order; each is parsed and its value compared with the one that is written.

    Args:
        path: .tsv, .tsv.gz or .tsv.xz. Parentheses may be as in the official files, or left out altogether.

    Raises:
        OSError: unreadable.
        ValueError: the header or a column is wrong, a token unknown, an expression incomplete, a label no digit or not
            the expression's value, the file damaged; the message names the line.
    """
    tokens, labels, number = list[np.ndarray](), list[int](), 0
    try:
        with _open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                where, columns = f"{path}, line {number}", line.rstrip(b"\r\n").split(b"\t")
                if number == 1 and line.rstrip() != HEADER.encode():
                    raise ValueError(f"{where}: the header must be {HEADER!r}: got {line.rstrip()[:60]!r}")
                if len(columns) != 2:
                    raise ValueError(f"{where}: has {len(columns)} columns, not Source and Target; is it cut short?")
                if number > 1:
                    tokens.append(_parse(columns[0], columns[1], where))
                    labels.append(int(columns[1]))
    except _DAMAGE as error:
        raise ValueError(f"{path}, after line {number}: damaged or cut short: {error}; get it again") from None
    if not labels:
        raise ValueError(f"{path}, line {number}: no expressions" + ("" if number else f" and no header {HEADER!r}"))
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in tokens])])
    return Expressions(np.concatenate(tokens), offsets, np.array(labels, np.uint8))


def write_file(path: Path, expressions: Expressions) -> None:
    """Write expressions as the official generator does, the whole file or none; packed where it ends with .gz, .xz."""
    partial = path.with_name(path.name + ".partial")
    with _open(partial, "wb") as file:
        file.write((HEADER + END).encode())
        for i, label in enumerate(expressions.labels):
            file.write(f"{source(expressions.expression(i))}\t{label}{END}".encode())
    partial.replace(path)


def source(tokens: np.ndarray) -> str:
    """An expression as the official files have it: an operator is applied to one argument after the other, each
    application in parentheses, `( ( ( [MIN 3 ) 4 ) ] )`.
    """
    parts = list[list[str]]([[]])  # the arguments so far of the operators that are open, each after the operator
    for token in tokens.tolist():
        symbol = SYMBOLS[token - 1]
        if token == CLOSE:
            operator, *arguments = parts.pop()
            parts[-1].append(f"{'( ' * (len(arguments) + 1)}{operator} {' ) '.join([*arguments, symbol])} )")
        elif token >= MIN:
            parts.append([symbol])
        else:
            parts[-1].append(symbol)
    return parts[0][0]


def _parse(text: bytes, label: bytes, where: str) -> np.ndarray:
    """The tokens of a row, checked."""
    symbols = text.decode("latin-1").replace("(", " ").replace(")", " ").split()
    for place, symbol in enumerate(symbols, start=1):
        if symbol not in TOKENS:
            raise ValueError(f"{where}: symbol {place}, {symbol[:20]!r}, is none of {' '.join(SYMBOLS)}")
    tokens = np.array([TOKENS[symbol] for symbol in symbols], np.uint8)
    try:
        value = evaluate(tokens.tolist())
    except ValueError as error:
        raise ValueError(f"{where}: not one whole expression: {error}; is it cut short?") from None
    if (b"(" in text or b")" in text) and text != source(tokens).encode():
        raise ValueError(f"{where}: its parentheses are not where the official files have them")
    if len(label) != 1 or not label.isdigit():
        raise ValueError(f"{where}: label {label[:20].decode('latin-1')!r} is no digit from 0 to 9")
    if int(label) != value:
        raise ValueError(f"{where}: label {int(label)}, but the expression's value is {value}")
    return tokens


@contextmanager
def _open(path: Path, mode: Literal["rb", "wb"]) -> Iterator[IO[bytes] | gzip.GzipFile | lzma.LZMAFile]:
    """The content, whatever its packing; without the time in .gz, so that equal content makes equal files."""
    name = path.name.removesuffix(".partial").lower()
    with open(path, mode) as file:
        if name.endswith(".gz"):
            with gzip.GzipFile("", mode, fileobj=file, mtime=0) as unpacked:
                yield unpacked
        elif name.endswith(".xz"):
            with lzma.LZMAFile(file, mode) as unpacked:
                yield unpacked
        else:
            yield file
