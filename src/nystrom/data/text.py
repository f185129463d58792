"""Text files to fixed-length blocks of token ids, streamed: no corpus need fit in memory.

files -> spans (checked, split) -> documents -> token ids -> blocks of `length`
"""

import codecs
import hashlib
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_SUFFIXES = frozenset(".txt .md .rst .tex .html .xml .json .csv .py .c .h .cpp .rs .js".split())
CHUNK = 1 << 20  # bytes read at a time

Encode = Callable[[str], np.ndarray]


class Span(NamedTuple):
    """A stretch of a text file: bytes start to stop, cut where a character begins."""

    path: str
    start: int
    stop: int


def text_files(paths: Iterable[Path]) -> list[Path]:
    """The files named, and under the folders named those with text in them and a text suffix; sorted, each once.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder holds no text file.
    """
    files: set[Path] = set()
    for path in paths:
        if path.is_dir():
            found = [
                p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file() and p.stat().st_size
            ]
            if not found:
                suffixes = " ".join(sorted(TEXT_SUFFIXES))
                raise ValueError(f"{path}: no text in this folder (suffixes read: {suffixes}); name files instead")
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


def check_text(path: Path) -> Span:
    """Read a file once, in pieces, and return it as one span.

    Raises:
        ValueError: empty, binary (a NUL byte) or not UTF-8; the message names the file and the place.
        OSError: unreadable.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            if (nul := chunk.find(b"\0")) >= 0:
                raise ValueError(f"{path}: not a text file: NUL byte at offset {size + nul}; leave it out of --data")
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                offset = size - pending + error.start
                raise ValueError(f"{path}: not UTF-8 text: {error.reason} at offset {offset}; convert it") from None
            size += len(chunk)
    if decoder.getstate()[0]:
        raise ValueError(f"{path}: not UTF-8 text: ends inside a character; convert it")
    if size == 0:
        raise ValueError(f"{path}: empty file; leave it out of --data")
    return Span(str(path), 0, size)


def split(spans: list[Span], fraction: float) -> tuple[list[Span], list[Span]]:
    """Hold out whole files, chosen by a hash of their names; of a lone file, its last stretch.

    Args:
        spans: checked files.
        fraction: part to hold out (of the files, or of the lone file's bytes); at least one file is.

    Returns:
        Training and held-out spans: no byte is in both.
    """
    if len(spans) == 1:
        path, start, stop = spans[0]
        cut = _character_boundary(path, stop - max(1, round(fraction * (stop - start))))
        if not start < cut < stop:
            raise ValueError(f"{path}: {stop} bytes are too few to hold out {fraction:.1%}; pass --eval-data")
        return [Span(path, start, cut)], [Span(path, cut, stop)]
    by_hash = sorted(spans, key=lambda span: hashlib.sha256("/".join(Path(span.path).parts[-2:]).encode()).digest())
    held_out = max(1, round(fraction * len(spans)))
    return sorted(by_hash[held_out:]), sorted(by_hash[:held_out])


def from_random_place(span: Span, size: int, generator: random.Random) -> Span:
    """The span from a random place on, with at least its last `size` bytes left (the whole of a shorter one)."""
    start = generator.randint(span.start, max(span.start, span.stop - size))
    return Span(span.path, max(span.start, _character_boundary(span.path, start)), span.stop)


def make_encode(tokenizer: "PreTrainedTokenizerBase") -> Encode:
    """The tokenizer's text -> ids, without special tokens: "[MASK]" written in a text stays those six characters."""
    from transformers import PerceiverTokenizer

    if isinstance(tokenizer, PerceiverTokenizer):  # bytes after 6 special ids: the same ids, 100 times faster
        return lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int64) + 6

    def encode(text: str) -> np.ndarray:
        encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return np.asarray(encoded["input_ids"], np.int64)

    return encode


def blocks(shards: list[list[Span]], encode: Encode, separator: int, length: int) -> Iterator[dict[str, np.ndarray]]:
    """Join each shard's documents with `separator` and cut the stream into blocks; a shard's last may be shorter.

    Yields:
        input_ids (length,) and special_tokens_mask (length,), 1 at separators.
    """
    for spans in shards:
        yield from _pack(spans, encode, separator, length)


def _pack(spans: list[Span], encode: Encode, separator: int, length: int) -> Iterator[dict[str, np.ndarray]]:
    parts: list[np.ndarray] = []
    held = 0
    for span in spans:
        pieces = (encode(text) for text in read_pieces(span))
        for ids in (*pieces, np.asarray([separator], np.int64)):
            parts.append(ids)
            held += len(ids)
            if held < length:
                continue
            joined = np.concatenate(parts)
            whole = held - held % length
            for block in joined[:whole].reshape(-1, length):
                yield {"input_ids": block, "special_tokens_mask": (block == separator).astype(np.int64)}
            parts, held = [joined[whole:]], held - whole
    rest = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if (rest != separator).any():
        yield {"input_ids": rest, "special_tokens_mask": (rest == separator).astype(np.int64)}


def read_pieces(span: Span) -> Iterator[str]:
    """The text of a span in pieces of about 1 MiB, cut at a line end where there is one, so that words stay whole."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    carried = ""
    with open(span.path, "rb") as file:
        file.seek(span.start)
        left = span.stop - span.start
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


def _character_boundary(path: str, offset: int) -> int:
    """The nearest place at or before `offset` where a UTF-8 character begins."""
    with open(path, "rb") as file:
        start = max(0, offset - 3)
        file.seek(start)
        near = file.read(offset - start + 1)
    while len(near) > offset - start and near[offset - start] & 0xC0 == 0x80:
        offset -= 1
    return offset
