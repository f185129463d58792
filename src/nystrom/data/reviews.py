"""The film reviews of IMDB (Maas et al. 2011), labelled negative (0) or positive (1): aclImdb's files to examples."""

import math
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from nystrom.data import archives, hub
from nystrom.data.examples import Example, decode

HUB = "stanfordnlp/imdb"
LABELS = ("neg", "pos")
SPLITS = ("train", "test")
PARTS = {"train": ("train", "val"), "test": ("test",)}
FILE = re.compile(r"(?:.*/)?(train|val|test)/(neg|pos)/([^./][^/]*\.txt)")

Review = tuple[str, str, str, bytes]  # where it is, label, file name, content


def read(data: Path | None, split: str) -> list[Example]:
    """The reviews of a split, the negative first, in the order of their numbers; the texts are unchanged.

    Some copies have moved part of the 25,000 training reviews to a folder val/: train is then train/ and val/ together.

    Args:
        data: the folder aclImdb or the one that holds it, a tar archive of it (.tar, .tar.gz, .tar.xz, .tar.bz2; read
            without unpacking), or a copy of the hub's parquet files. None: downloaded from the hub.
        split: train or test.

    Raises:
        FileNotFoundError: no such file or folder, or no reviews of the split in it.
        OSError: the hub is out of reach.
        ValueError: no such split; a damaged archive; a review that is empty, not UTF-8 or there twice.
    """
    if split not in SPLITS:
        raise ValueError(f"the film reviews have no split {split!r}; they have {', '.join(SPLITS)}")
    if data is None:
        return _from_hub(hub.download(HUB, "plain_text", split, ("text", "label")), f"{HUB}, {split}")
    if not data.exists():
        raise FileNotFoundError(f"{data}: no such file or folder")
    for folder in (data / "plain_text", data):
        if files := hub.parquet_files(folder, split):
            return _from_hub(hub.read_parquet(files, ("text", "label")), f"{folder}, {split}")
    found: dict[tuple[int, float, str], str] = {}  # neg before pos, then by number
    for where, label, name, content in _folder(data, PARTS[split]) if data.is_dir() else _archive(data, PARTS[split]):
        number = re.match(r"\d+", name)
        key = (LABELS.index(label), int(number[0]) if number else math.inf, name)
        if key in found:
            raise ValueError(f"{where}: {label}/{name} is there twice, in {' or '.join(PARTS[split])}; delete one")
        found[key] = decode(content, where)
        if not found[key].strip():
            raise ValueError(f"{where}: this review is empty; delete it")
    for label in LABELS:
        if not any(key[0] == LABELS.index(label) for key in found):
            raise FileNotFoundError(
                f"{data}: no {split}/{label}/*.txt in it; it should be the folder aclImdb, a tar archive of it, or a "
                f"copy of the data set {HUB} of the Hugging Face hub"
            )
    return [Example(found[key], None, key[0], index) for index, key in enumerate(sorted(found))]


def _folder(data: Path, parts: tuple[str, ...]) -> Iterator[Review]:
    root = data / "aclImdb" if (data / "aclImdb").is_dir() else data
    for part, label in product(parts, LABELS):
        for path in sorted((root / part / label).glob("[!.]*.txt")):
            yield str(path), label, path.name, path.read_bytes()


def _archive(data: Path, parts: tuple[str, ...]) -> Iterator[Review]:
    def is_wanted(name: str) -> bool:
        match = FILE.fullmatch(name)
        return match is not None and match[1] in parts

    for name, content in archives.read(data, is_wanted):
        match = FILE.fullmatch(name)
        assert match is not None
        yield f"{data}: {name}", match[2], match[3], content


def _from_hub(rows: hub.Rows, where: str) -> list[Example]:
    if not rows:
        raise ValueError(f"{where}: no reviews; get the files again")
    for number, row in enumerate(rows):
        if not isinstance(row["text"], str) or row["label"] not in (0, 1):
            raise ValueError(
                f"{where}, row {number + 1}: got label {row['label']!r} and text {row['text']!r:.40}; "
                "get the files again"
            )
    return [Example(row["text"], None, row["label"], index) for index, row in enumerate(rows)]
