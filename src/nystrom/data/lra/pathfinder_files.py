"""Pathfinder in Long Range Arena's files: LEVEL/imgs/N/sample_K.png, and LEVEL/metadata/N.npy with the labels.

Metadata are lines, or rows of an array of strings: folder and name of an image, its number, its label, and how it was
made. Some images of the release are empty files, which are left out, as Long Range Arena does.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nystrom.data import archives
from nystrom.data.lra.chunks import progress
from nystrom.data.lra.images import Pictures

LEVEL = "curv_contour_length_14"
"""The hardest; it is the one that is reported."""
IMAGE = re.compile(r"imgs/\d+/[^/]+\.png")
FIELDS = 4
"""Of a line, that are read (count)."""
NUMPY = b"\x93NUMPY"

Files = tuple[str, list[str], Callable[[str], bytes | None]]
"""Where they are, names of the metadata in order, and the content of a file, None where it is missing."""


class Found(NamedTuple):
    """What was read."""

    pictures: Pictures
    empty: int
    """Images that were left out (count)."""


def read(data: Path, side: int, level: str = LEVEL) -> Found:
    """The images of a level, in the order of the metadata's numbers and lines.

    Args:
        data: the folder of the level or one that holds it, as such or in the folder pathfinder32 (64, 128, 256); or a
            tar archive with it, which is read without unpacking.
        side: that the images must have (pixels).
        level: name of its folder.

    Raises:
        FileNotFoundError: no such path, no metadata of the level in it, or no such image as they name.
        ValueError: an archive, image or metadata file is damaged, an image of another size or not grey, a line too
            short, a label not 0 or 1; the message names file and line.
    """
    if not data.exists():
        raise FileNotFoundError(f"{data}: no such file or folder")
    where, names, content = _folder(data, side, level) if data.is_dir() else _archive(data, side, level)
    rows = [(f"{where}/{name}", *row) for name in names for row in _rows(content(name) or b"", f"{where}/{name}")]
    images, labels = list[np.ndarray](), list[int]()
    with progress(f"Pathfinder{side}", len(rows)) as advance:
        for file, line, image, label in rows:
            packed = content(image)
            if packed is None:
                raise FileNotFoundError(f"{where}/{image}: missing, but named in {file}, line {line}")
            if packed:
                images.append(_decode(packed, side, f"{where}/{image} (named in {file}, line {line})"))
                labels.append(label)
            advance(1)
    if not labels:
        raise ValueError(f"{where}: all {len(rows)} images are empty files; get them again")
    return Found(Pictures(np.stack(images), np.array(labels, np.uint8)), len(rows) - len(labels))


def _folder(data: Path, side: int, level: str) -> Files:
    for folder in (data, data / level, data / f"pathfinder{side}" / level):
        names = [f"metadata/{path.name}" for path in (folder / "metadata").glob("*.npy")]
        if names and (folder == data or folder.name == level):
            return str(folder), sorted(names, key=_number), partial(_content, folder)
    raise _nothing(data, level)


def _content(folder: Path, name: str) -> bytes | None:
    return (folder / name).read_bytes() if (folder / name).is_file() else None


def _archive(data: Path, side: int, level: str) -> Files:
    wanted = re.compile(rf"(?:\./)?(.*/)?{re.escape(level)}/(metadata/[^/.][^/]*\.npy|{IMAGE.pattern})")
    others = re.compile(rf"(?:.*/)?pathfinder(?!{side}/)\d+/.*")
    files: dict[str, bytes] = {}
    roots = set[str]()
    for name, content in archives.read(data, lambda name: bool(wanted.fullmatch(name)) and not others.fullmatch(name)):
        match = wanted.fullmatch(name)
        assert match
        roots.add(match[1] or "")
        files[match[2]] = content
    names = sorted((name for name in files if name.startswith("metadata/")), key=_number)
    if not names:
        raise _nothing(data, level)
    if len(roots) > 1:
        raise ValueError(f"{data}: holds {level} more than once, in {', '.join(sorted(map(repr, roots)))}; unpack one")
    return f"{data}: {roots.pop()}{level}", names, files.get


def _nothing(data: Path, level: str) -> FileNotFoundError:
    return FileNotFoundError(f"{data}: no {level}/metadata/*.npy in it; it should be a folder or tar archive of it")


def _number(name: str) -> tuple[int, str]:
    digits = re.search(r"\d+", name)
    return int(digits[0]) if digits else -1, name


def _rows(content: bytes, where: str) -> Iterator[tuple[int, str, int]]:
    """Number of the line, name of the image, label."""
    lines = _array(content, where) if content.startswith(NUMPY) else _text(content, where)
    for number, fields in enumerate(lines, start=1):
        if len(fields) < FIELDS or len(fields) != len(lines[0]):
            raise ValueError(
                f"{where}, line {number}: has {len(fields)} fields, not {max(FIELDS, len(lines[0]))}; is it cut short?"
            )
        name, label = f"{fields[0]}/{fields[1]}", fields[3]
        if not IMAGE.fullmatch(name):
            raise ValueError(f"{where}, line {number}: {name[:60]!r} names no image, as imgs/0/sample_0.png does")
        if label not in ("0", "1"):
            raise ValueError(f"{where}, line {number}: label {label[:20]!r} is not 0 or 1")
        yield number, name, int(label)


def _array(content: bytes, where: str) -> list[list[str]]:
    try:
        found = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{where}: not an array of strings, or a damaged one: {error}; get it again") from None
    if found.ndim != 2 or found.dtype.kind != "U":
        raise ValueError(f"{where}: holds an array of {found.dtype}, shape {found.shape}, not rows of strings")
    return found.tolist()


def _text(content: bytes, where: str) -> list[list[str]]:
    lines = content.decode("latin-1").split("\n")
    if lines.pop():
        raise ValueError(f"{where}, line {len(lines) + 1}: does not end; the file is cut short, get it again")
    if not lines:
        raise ValueError(f"{where}, line 1: the file is empty; get it again")
    return [line.rstrip("\r").split(" ") for line in lines]


def _decode(packed: bytes, side: int, where: str) -> np.ndarray:
    """uint8 (side * side,)"""
    from PIL import Image

    try:
        Image.open(io.BytesIO(packed)).verify()  # the checksums, which are else not looked at
        with Image.open(io.BytesIO(packed)) as image:
            pixels, mode = np.asarray(image), image.mode
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise ValueError(f"{where}: not a PNG, or a damaged one: {error}; get it again") from None
    if mode != "L" or pixels.shape != (side, side):
        size = " x ".join(map(str, pixels.shape[1::-1]))
        raise ValueError(f"{where}: is {size} pixels of mode {mode}, not {side} x {side} grey ones (L)")
    return pixels.ravel()
