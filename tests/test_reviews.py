"""IMDB's reviews to examples: from a folder, from any archive of it, from a copy of the hub's; damage is named."""

import os
import random
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from nystrom.data.examples import Example
from nystrom.data.reviews import read

SHARED = Path(os.environ.get("NYSTROM_DATA", Path(__file__).parents[2] / "shared" / "data")) / "imdb"

FILES = {
    "train/pos/0_9.txt": "good",
    "train/pos/10_7.txt": "fair",
    "train/pos/9_10.txt": "fine",
    "train/neg/2_1.txt": 'bad<br /><br />"so"\n',
    "train/unsup/0_0.txt": "unlabelled",
    "train/pos/._0_9.txt": "a Mac's own",
    "train/urls_pos.txt": "http://",
    "test/neg/0_2.txt": "dull",
    "test/pos/0_8.txt": "grand",
    "README": "about",
}
TRAIN = [('bad<br /><br />"so"\n', 0), ("good", 1), ("fine", 1), ("fair", 1)]
TEST = [("dull", 0), ("grand", 1)]
MOVED = {"val/neg/1_1.txt": "worse", "val/pos/4_8.txt": "better"}
WITH_MOVED = [("worse", 0), TRAIN[0], ("good", 1), ("better", 1), *TRAIN[2:]]


def examples(rows: list[tuple[str, int]]) -> list[Example]:
    return [Example(text, None, label, index) for index, (text, label) in enumerate(rows)]


def lay(folder: Path, files: dict[str, str] = FILES) -> Path:
    for name, content in files.items():
        path = folder / "aclImdb" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())
    return folder / "aclImdb"


def pack(folder: Path, name: str) -> Path:
    path = folder / name
    packed = name.removeprefix("a.tar").removeprefix(".")
    with tarfile.open(path, f"w:{packed}") as archive:
        archive.add(folder / "aclImdb", "aclImdb")
    return path


def test_folder(tmp_path):
    root = lay(tmp_path)
    for data in (root, tmp_path):
        assert read(data, "train") == examples(TRAIN)
        assert read(data, "test") == examples(TEST)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.xz", "a.tar.bz2"])
def test_archive(tmp_path, name):
    lay(tmp_path)
    data = pack(tmp_path, name)
    assert read(data, "train") == examples(TRAIN)
    assert read(data, "test") == examples(TEST)


def test_reviews_moved_to_val_belong_to_train(tmp_path):
    root = lay(tmp_path, FILES | MOVED)
    for data in (root, pack(tmp_path, "a.tar.gz")):
        assert read(data, "train") == examples(WITH_MOVED)
        assert read(data, "test") == examples(TEST)


def test_a_review_that_was_copied_to_val_is_refused(tmp_path):
    root = lay(tmp_path, FILES | {"val/pos/9_10.txt": "fine"})
    for data in (root, pack(tmp_path, "a.tar")):
        with pytest.raises(ValueError, match=r"val/pos/9_10.txt: pos/9_10.txt is there twice, in train or val"):
            read(data, "train")


def test_copy_of_the_hub(tmp_path):
    rows = {"text": [text for text, _ in TRAIN], "label": [label for _, label in TRAIN]}
    path = tmp_path / "plain_text" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    parquet.write_table(pyarrow.table(rows), path)
    assert read(tmp_path, "train") == read(path.parent, "train") == examples(TRAIN)
    wrong = {"label": (-1, r"row 1: got label -1 and text 'bad"), "text": (None, "row 1: got label 0 and text None")}
    for column, (value, message) in wrong.items():
        parquet.write_table(pyarrow.table(rows | {column: [value, *rows[column][1:]]}), path)
        with pytest.raises(ValueError, match=message):
            read(tmp_path, "train")
    parquet.write_table(pyarrow.table({"text": [], "label": []}), path)
    with pytest.raises(ValueError, match="no reviews"):
        read(tmp_path, "train")


def test_the_hub_out_of_reach():
    with pytest.raises(OSError, match=r"stanfordnlp/imdb \(plain_text, train\) cannot be had"):
        read(None, "train")


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the film reviews have no split 'dev'; they have train, test"):
        read(tmp_path, "dev")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none: no such file or folder"):
        read(tmp_path / "none", "train")
    lay(tmp_path, {name: text for name, text in FILES.items() if not name.startswith("train/neg")})
    for data in (tmp_path, pack(tmp_path, "a.tar")):
        with pytest.raises(
            FileNotFoundError, match=rf"{data}: no train/neg/\*.txt in it; it should be the folder aclImdb"
        ):
            read(data, "train")


def test_a_wrong_review_is_refused_by_name(tmp_path):
    root = lay(tmp_path)
    wrong = {"empty; delete it": b" \n", "line 2: not UTF-8 text": b"a\ncaf\xe9"}
    for message, content in wrong.items():
        (root / "train" / "pos" / "9_10.txt").write_bytes(content)
        for data in (root, pack(tmp_path, "a.tar.xz")):
            with pytest.raises(ValueError, match=rf"train/pos/9_10.txt.*{message}") as raised:
                read(data, "train")
            assert str(raised.value).startswith(str(data))
        assert read(root, "test") == examples(TEST)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.xz", "a.tar.bz2"])
def test_a_damaged_archive_is_refused(tmp_path, name):
    """Cut anywhere, so also between two members; and with some bytes changed."""
    words = random.Random(0).choices([f"word{i}" for i in range(500)], k=60_000)
    lay(tmp_path, FILES | {"train/pos/11_7.txt": " ".join(words)})  # more than is read ahead
    whole = pack(tmp_path, name).read_bytes()
    data = tmp_path / f"damaged-{name}"
    with tarfile.open(tmp_path / name) as archive:  # the end mark follows the last member, whose content fills a block
        last = archive.getmembers()[-1]
    end = last.offset_data + 512 if name == "a.tar" else len(whole)
    assert last.size <= 512
    between = range(last.offset, end, 512) if name == "a.tar" else ()
    for place in (*range(0, end, end // 60), *between, end - 1):
        data.write_bytes(whole[:place])
        with pytest.raises(ValueError, match=f"{data}: not a tar archive, or a damaged one"):
            read(data, "train")
    # a plain archive has no checksum of what it holds; the last eight bytes are one, in the others
    changes = () if name == "a.tar" else (*range(end // 4, end - 8, end // 60), end - 8)
    for place in changes:
        data.write_bytes(whole[:place] + b"\xff" * 8 + whole[place + 8 :])
        with pytest.raises(ValueError, match=f"{data}: not a tar archive, or a damaged one"):
            read(data, "train")
    data.write_bytes(b"text")
    with pytest.raises(ValueError, match=f"{data}: not a tar archive, or a damaged one"):
        read(data, "train")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs IMDB; NYSTROM_DATA names the folder with imdb/ in it")
@pytest.mark.parametrize("split", ["train", "test"])
def test_real_data(split):
    (archive,) = SHARED.glob("*.tar.xz")
    found = read(archive, split)
    assert Counter(example.label for example in found) == {0: 12500, 1: 12500}
    assert [example.index for example in found] == list(range(25000))
    # as the hub's card counts the bytes, less the 12 of each row that are not text
    assert sum(len(example.text.encode()) for example in found) == {"train": 33_132_823, "test": 32_350_685}[split]
