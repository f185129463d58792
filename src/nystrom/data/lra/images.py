"""CIFAR-10 (Krizhevsky 2009) as sequences of grey levels: the official files, PNG sheets, or the hub's parquet."""

import io
import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nystrom.data import archives, hub

HUB = "uoft-cs/cifar10"
SPLITS = ("train", "test")
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
LABELS = {"train": "train_lables.json", "test": "test_lables.json"}  # spelt so in the package that has the sheets
IMAGES = 10_000  # in an official batch
SIDE = 32
GREY = np.array([0.2989, 0.5870, 0.1140])


class Pictures(NamedTuple):
    """Grey images with their labels."""

    pixels: np.ndarray
    """uint8 (count, 1024), row by row; 0 is black."""
    labels: np.ndarray
    """uint8 (count,): class 0 to 9."""


def read(data: Path | None, split: str) -> Pictures:
    """The images of a split, in the official order.

    Args:
        data: a folder with the official python or binary batches, their .tar.gz, PNG sheets of 10,000 images a file
            with their labels in JSON, or the hub's parquet files; a folder of batches need not have all five.
            None: downloaded from the hub.
        split: train or test.

    Raises:
        FileNotFoundError: no such path, or nothing of the split in it.
        OSError: the hub is out of reach.
        ValueError: no such split; a file is damaged, truncated or of another kind, or there twice; a label is none of 0
            to 9.
    """
    if split not in SPLITS:
        raise ValueError(f"CIFAR-10 has no split {split!r}; it has {', '.join(SPLITS)}")
    if data is None:
        return _from_hub(hub.download(HUB, "plain_text", split, ("img", "label")), f"{HUB}, {split}")
    if not data.exists():
        raise FileNotFoundError(f"{data}: no such file or folder")
    if data.is_file():
        return _join(_archived(data, split), data, split)
    for folder in (data / "plain_text", data):
        if files := hub.parquet_files(folder, split):
            return _from_hub(hub.read_parquet(files, ("img", "label")), f"{folder}, {split}")
    folders = (data, data / "cifar-10-batches-py", data / "cifar-10-batches-bin")
    return _join(_in_folders(folders, split), data, split)


def grey(pixels: np.ndarray) -> np.ndarray:
    """Red, green and blue, uint8 (..., 3), to grey levels, uint8 (...), rounded as TensorFlow's are."""
    return np.floor(pixels @ GREY * (255.5 / 255)).astype(np.uint8)


def _join(batches: Iterable[Pictures], data: Path, split: str) -> Pictures:
    found = list(batches)
    if not found:
        raise FileNotFoundError(
            f"{data}: no CIFAR-10 images to {split} on in it; it should hold {BATCHES[split][0]}, {BATCHES[split][0]}"
            f".bin or {BATCHES[split][0]}.png, be a tar archive of the first or second, or hold parquet files of {HUB}"
        )
    return Pictures(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _in_folders(folders: Iterable[Path], split: str) -> Iterable[Pictures]:
    files = {
        name: [
            path
            for folder in folders
            for suffix in (*_PARSERS, ".png")
            if (path := folder / f"{name}{suffix}").is_file()
        ]
        for name in BATCHES[split]
    }
    _check_once(files)
    for place, paths in enumerate(files.values()):
        for path in paths:
            if path.suffix == ".png":
                yield _sheet(path, path.parent / LABELS[split], place)
            else:
                yield _PARSERS[path.suffix](path.read_bytes(), str(path))


def _check_once(files: Mapping[str, Sequence[object]]) -> None:
    """Two copies of a batch would make one example a training and a dev example."""
    for name, found in files.items():
        if len(found) > 1:
            raise ValueError(
                f"{name} is there more than once: {', '.join(map(str, found))}; keep one, or name its folder"
            )


def _archived(data: Path, split: str) -> Iterable[Pictures]:
    parsers = {f"{name}{suffix}": parse for name in BATCHES[split] for suffix, parse in _PARSERS.items()}
    found: dict[str, dict[str, Pictures]] = {name: {} for name in BATCHES[split]}
    for file, content in archives.read(data, lambda name: name.rpartition("/")[2] in parsers):
        bare = file.rpartition("/")[2]
        found[bare.removesuffix(".bin")][f"{data}: {file}"] = parsers[bare](content, f"{data}: {file}")
    _check_once({name: list(copies) for name, copies in found.items()})
    return [batch for copies in found.values() for batch in copies.values()]


def _binary(content: bytes, where: str) -> Pictures:
    """Records of a label and 3072 bytes: 1024 red, 1024 green, 1024 blue."""
    size = 1 + 3 * SIDE * SIDE
    if not content or len(content) % size:
        raise ValueError(f"{where}: {len(content)} bytes are no whole number of records of {size}; get it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return _pictures(records[:, 1:], records[:, 0], where)


def _pickled(content: bytes, where: str) -> Pictures:
    try:
        found = _Arrays(io.BytesIO(content), encoding="bytes").load()
        pixels, labels = np.asarray(found[b"data"]), np.asarray(found[b"labels"])
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{where}: not a batch of CIFAR-10, or a damaged one: {error}; get it again") from None
    return _pictures(pixels, labels, where)


class _Arrays(pickle.Unpickler):
    """Of a pickle, arrays and plain values alone: no code in it is run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),  # how Python 3 writes bytes for Python 2
        }:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


_PARSERS: dict[str, Callable[[bytes, str], Pictures]] = {"": _pickled, ".bin": _binary}


def _pictures(pixels: np.ndarray, labels: np.ndarray, where: str) -> Pictures:
    """Planes of red, green and blue to grey, checked."""
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3 * SIDE * SIDE):
        raise ValueError(f"{where}: got images {pixels.dtype} {pixels.shape} for {len(labels)} labels; get it again")
    checked = _labels(labels, where)
    return Pictures(grey(pixels.reshape(-1, 3, SIDE * SIDE).transpose(0, 2, 1)), checked)


def _labels(labels: Any, where: str) -> np.ndarray:
    for number, label in enumerate(labels):
        if isinstance(label, bool) or not isinstance(label, int | np.integer) or not 0 <= label <= 9:
            raise ValueError(f"{where}, image {number}: label {label!r} is none of 0 to 9; get it again")
    return np.asarray(labels, np.uint8)


def _sheet(path: Path, labels: Path, place: int) -> Pictures:
    """A PNG whose rows are images, each of 1024 pixels, row by row; the labels of all sheets are in one file."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the sheet is larger than it lets through
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not a PNG, or a damaged one: {error}; get it again") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    if pixels.shape != (IMAGES, SIDE * SIDE, 3):
        raise ValueError(f"{path}: got {pixels.shape[1]} x {pixels.shape[0]} pixels, not {SIDE * SIDE} x {IMAGES}")
    try:
        found = json.loads(labels.read_text())
    except ValueError as error:
        raise ValueError(f"{labels}: not JSON: {error}; get it again") from None
    chosen = found[place * IMAGES : (place + 1) * IMAGES] if isinstance(found, list) else []
    if len(chosen) != IMAGES:
        raise ValueError(f"{labels}: has {len(chosen)} labels for {path.name}, not {IMAGES}; get it again")
    return Pictures(grey(pixels), _labels(chosen, str(labels)))


def _from_hub(rows: hub.Rows, where: str) -> Pictures:
    from PIL import Image

    pixels = []
    for number, row in enumerate(rows):
        image = row["img"]
        content = image.get("bytes") if isinstance(image, dict) else image
        try:
            picture: Any = Image.open(io.BytesIO(content)) if isinstance(content, bytes) else content
            pixels.append(np.asarray(picture.convert("RGB")).reshape(SIDE * SIDE, 3))
        except (AttributeError, OSError, ValueError) as error:
            raise ValueError(
                f"{where}, row {number}: no image of 32 x 32 pixels: {error}; get the files again"
            ) from None
    if not pixels:
        raise ValueError(f"{where}: no images; get the files again")
    return Pictures(grey(np.stack(pixels)), _labels([row["label"] for row in rows], where))
