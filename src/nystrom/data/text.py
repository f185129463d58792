"""Text files, plain or gzipped, as documents: checked, split, and read in pieces, as no corpus need fit in memory."""

import codecs
import gzip
import hashlib
import random
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Literal, NamedTuple

TEXT_SUFFIXES = frozenset(".txt .md .rst .tex .html .xml .json .csv .py .c .h .cpp .rs .js".split())
CHUNK = 1 << 20  # bytes read at a time

Encoding = Literal["utf-8", "latin-1"]


class Span(NamedTuple):
    """A stretch of a text file, which is one document: bytes start to stop, cut where a character begins."""

    path: str
    start: int
    stop: int
    """Both count the bytes of the text, not those of a gzipped file."""
    encoding: Encoding = "utf-8"
    digest: bytes = b""
    """Of all of the file's text, which tells equal files."""

    @property
    def size(self) -> int:
        """Bytes of text (count)."""
        return self.stop - self.start

    def documents(self) -> Iterator[Iterator[str]]:
        """The one document, as pieces of text."""
        yield read_pieces(self)


def text_files(paths: Iterable[Path]) -> list[Path]:
    """As `find_files`, of text: the files with a text suffix in folders, and any that are named."""
    return find_files(paths, lambda path: path.suffix.lower() in TEXT_SUFFIXES, sorted(TEXT_SUFFIXES))


def find_files(paths: Iterable[Path], is_read: Callable[[Path], bool], suffixes: Iterable[str]) -> list[Path]:
    """The files named, and under the folders named those that are read and not empty; sorted, each once.

    Args:
        paths: files and folders.
        is_read: whether a file in a folder is.
        suffixes: what the message says is read.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder holds no such file.
    """
    files: set[Path] = set()
    for path in paths:
        if path.is_dir():
            found = [p for p in path.rglob("*") if is_read(p) and p.is_file() and p.stat().st_size]
            if not found:
                raise ValueError(
                    f"{path}: no text in this folder (suffixes read: {' '.join(suffixes)}); name files instead"
                )
            files.update(p.resolve() for p in found)
        elif path.exists():
            files.add(path.resolve())
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    return sorted(files)


def python_files() -> list[Path]:
    """Documentation and source of the running Python's standard library: real text on every machine.

    Leaves out installed packages and the tests, some of which are badly encoded on purpose.

    Raises:
        FileNotFoundError: this Python has no standard library on disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
    found = (path for path in root.rglob("*.py") if not skip.intersection(path.relative_to(root).parts))
    files = sorted(path for path in found if path.stat().st_size)
    if not files:
        raise FileNotFoundError(f"{root}: this Python has no standard library source on disk; pass --data")
    return files


def open_bytes(path: str | Path) -> BufferedIOBase:
    """The file's bytes, unpacked where its name ends with .gz."""
    return gzip.open(path, "rb") if str(path).lower().endswith(".gz") else open(path, "rb")


def unpacking_failed(path: str | Path, error: Exception) -> ValueError:
    """What gzip raises for a damaged file, in words for the user."""
    return ValueError(f"{path}: not a gzip file, or a damaged one: {error}; get it again")


GZIP_ERRORS = (gzip.BadGzipFile, EOFError, zlib.error)


def check_text(path: Path, encoding: Encoding = "utf-8") -> Span:
    """Read a file once, in pieces, and return it as one span.

    Raises:
        ValueError: empty, binary (a NUL byte), not in this encoding or badly packed; the message names the file and
            the place.
        OSError: unreadable.
    """
    try:
        size, digest = _checked_size(path, encoding)
    except GZIP_ERRORS as error:
        raise unpacking_failed(path, error) from None
    return Span(str(path), 0, size, encoding, digest)


def _checked_size(path: Path, encoding: Encoding) -> tuple[int, bytes]:
    decoder, digest = codecs.getincrementaldecoder(encoding)(), hashlib.blake2b(digest_size=16)
    size, fix = 0, "convert it, or pass --encoding latin-1 if all files are that"
    with open_bytes(path) as file:
        while chunk := file.read(CHUNK):
            if (nul := chunk.find(b"\0")) >= 0:
                raise ValueError(f"{path}: not a text file: NUL byte at offset {size + nul}; leave it out of --data")
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                offset = size - pending + error.start
                raise ValueError(f"{path}: not UTF-8 text: {error.reason} at offset {offset}; {fix}") from None
            digest.update(chunk)
            size += len(chunk)
    if decoder.getstate()[0]:
        raise ValueError(f"{path}: not UTF-8 text: ends inside a character; {fix}")
    if size == 0:
        raise ValueError(f"{path}: empty file; leave it out of --data")
    return size, digest.digest()


def split(spans: list[Span], fraction: float) -> tuple[list[Span], list[Span]]:
    """Hold out whole files, chosen by a hash of their names, equal ones together; of a lone file, its last stretch.

    Args:
        spans: checked files.
        fraction: part to hold out (of the files, or of the lone file's bytes); at least one file is.

    Returns:
        Training and held-out spans: no byte is in both.

    Raises:
        ValueError: the lone file is too short, or all files are equal.
    """
    if len(spans) == 1:
        (span,) = spans
        cut = _character_boundary(span, span.stop - max(1, round(fraction * span.size)))
        if not span.start < cut < span.stop:
            raise ValueError(f"{span.path}: {span.stop} bytes are too few to hold out {fraction:.1%}; pass --eval-data")
        return [span._replace(stop=cut)], [span._replace(start=cut)]
    equal: dict[bytes, list[Span]] = {}
    for span in sorted(spans, key=_hash_of_name):
        equal.setdefault(span.digest, []).append(span)
    if len(equal) == 1:
        raise ValueError(f"{spans[0].path} and {len(spans) - 1} more hold the same text; pass --eval-data")
    wanted, held_out = max(1, round(fraction * len(spans))), list[Span]()
    for group in [*equal.values()][:-1]:  # one is left to train on
        if len(held_out) < wanted:
            held_out += group
    return sorted(set(spans) - set(held_out)), sorted(held_out)


def _hash_of_name(span: Span) -> bytes:
    return hashlib.sha256("/".join(Path(span.path).parts[-2:]).encode()).digest()


def from_random_place(span: Span, size: int, generator: random.Random) -> Span:
    """The span from a random place on, with at least its last `size` bytes left (the whole of a shorter one)."""
    start = generator.randint(span.start, max(span.start, span.stop - size))
    return span._replace(start=max(span.start, _character_boundary(span, start)))


def read_pieces(span: Span) -> Iterator[str]:
    """The text of a span in pieces of about 1 MiB, cut at a line end where there is one, so that words stay whole."""
    decode = codecs.getincrementaldecoder(span.encoding)().decode
    carried = ""
    with open_bytes(span.path) as file:
        file.seek(span.start)
        left = span.size
        while left > 0:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise ValueError(
                    f"{span.path}: {left} bytes shorter than when it was checked; do not edit it meanwhile"
                )
            left -= len(chunk)
            text = carried + decode(chunk)
            cut = text.rfind("\n") + 1 or len(text)
            if left == 0:
                cut = len(text)
            carried = text[cut:]
            yield text[:cut]


def _character_boundary(span: Span, offset: int) -> int:
    """The nearest place at or before `offset` where a character begins."""
    if span.encoding == "latin-1":
        return offset
    with open_bytes(span.path) as file:
        start = max(0, offset - 3)
        file.seek(start)
        near = file.read(offset - start + 1)
    while len(near) > offset - start and near[offset - start] & 0xC0 == 0x80:
        offset -= 1
    return offset
