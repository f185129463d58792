"""Long Range Arena's data beside the generated ones: reviews, papers, images; batches of them; what is refused."""

import io
import itertools
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nystrom.data.lra import cache, images, listops, retrieval, splits, text
from nystrom.data.lra.sequences import Sequences, cached, make_collate

SHARED = Path(os.environ.get("NYSTROM_DATA", Path(__file__).parents[2] / "shared" / "data"))


def needs(name: str) -> pytest.MarkDecorator:
    reason = f"needs real data; NYSTROM_DATA names the folder with {name}/ in it"
    return pytest.mark.skipif(not (SHARED / name).is_dir(), reason=reason)


# Batches


def rows(*lengths: int) -> list[np.ndarray]:
    return [np.arange(1, n + 1, dtype=np.uint8) for n in lengths]


def test_padding_is_masked_and_black_is_not():
    examples = [{"input_ids": np.array([0, 5, 0]), "labels": 1}, {"input_ids": np.array([7]), "labels": 0}]
    batch = make_collate(zero_is_padding=False)(examples)
    assert batch["input_ids"].tolist() == [[0, 5, 0], [7, 0, 0]] and batch["labels"].tolist() == [1, 0]
    assert batch["attn_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert make_collate(zero_is_padding=True)(examples)["attn_mask"].tolist() == [
        [False, True, False],
        [True, False, False],
    ]
    assert "attn_mask" not in make_collate(zero_is_padding=False)(examples[:1])  # none is needed
    assert batch["input_ids"].dtype == torch.int64


def test_pairs_are_batched_each_with_its_mask():
    pairs = Sequences(np.array([0, 1]), rows(3, 2), rows(1, 4))
    assert pairs.lengths() == [3, 4]
    batch = make_collate(zero_is_padding=False)([pairs[0], pairs[1]])
    assert batch["attn_mask"].sum(1).tolist() == [3, 2] and batch["pair_mask"].sum(1).tolist() == [1, 4]
    assert batch["pair_ids"][1].tolist() == [1, 2, 3, 4]


def test_parts_are_drawn_alike_and_overlap_in_nothing():
    whole = Sequences(np.arange(50), rows(*range(1, 51)))
    kept, aside = whole.divide(0.2)
    assert sorted([*kept.labels, *aside.labels]) == list(range(50)) and len(aside) == 10
    assert list(whole.divide(0.2)[1].labels) == list(aside.labels) != list(whole.divide(0.2, seed=1)[1].labels)
    few = whole.draw(7, "dev")
    assert len(few) == 7 and list(few.labels) == list(whole.draw(7, "dev").labels)
    assert all(len(few[i]["input_ids"]) == few[i]["labels"] + 1 for i in range(7))
    assert whole.draw(None, "dev") is whole
    with pytest.raises(ValueError, match="the dev set has 50 examples: asked for 51"):
        whole.draw(51, "dev")


def test_the_cache_gives_back_what_was_made_and_notices_damage(tmp_path):
    made = []

    def make(pairs: bool) -> Sequences:
        made.append(pairs)
        return Sequences(np.array([3, 1]), rows(4, 2), rows(1, 5) if pairs else None)

    for pairs in (False, True):
        path = tmp_path / "cache" / f"{pairs}.npz"
        first = cached(path, {"seed": 0}, lambda pairs=pairs: make(pairs), pairs)
        again = cached(path, {"seed": 0}, lambda: pytest.fail("made again"), pairs)
        for one, two in zip((first[0], first[1]), (again[0], again[1]), strict=True):
            assert one.keys() == two.keys()
            assert all(np.array_equal(one[name], two[name]) for name in one)
    assert made == [False, True]
    cached(path, {"seed": 1}, lambda: make(True), True)
    assert made == [False, True, True]  # another law: made again
    content = bytearray(path.read_bytes())
    content[content.index(b"\x01\x02\x03\x04")] = 9
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"True\.npz: .*delete it"):
        cached(path, {"seed": 1}, lambda: make(True), True)


def test_runs_that_start_together_fill_one_cache(tmp_path):
    program = """
import sys, time
import numpy as np
from pathlib import Path
from nystrom.data.lra import cache
print("ready", flush=True), sys.stdin.readline()
for _ in range(40):
    cache.write(Path(sys.argv[1]), {"x": np.arange(200_000)}, {"seed": 0})
"""
    path = tmp_path / "both.npz"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen([sys.executable, "-c", program, str(path)], **pipes) for _ in range(2)]
    for one in both:
        assert one.stdout.readline() == "ready\n"
    for one in both:
        one.stdin.write("go\n")
        one.stdin.flush()
    for one in both:
        _, told = one.communicate(timeout=120)
        assert one.returncode == 0, told
    arrays, made = cache.read(path, ["x"])
    assert np.array_equal(arrays["x"], np.arange(200_000)) and made == {"seed": 0}
    assert list(tmp_path.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # bytes of a file
    try:
        with pytest.raises(OSError, match="File too large"):
            cache.write(tmp_path / "x.npz", {"x": np.arange(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


# Text


@pytest.fixture
def reviews(tmp_path) -> Path:
    for split, label in itertools.product(("train", "test"), ("neg", "pos")):
        (tmp_path / split / label).mkdir(parents=True)
        for i in range(20):
            (tmp_path / split / label / f"{i}_1.txt").write_text(f"{split} {label} {i} é" * 3)
    return tmp_path


def test_reviews_are_bytes_one_higher(reviews):
    found = text.read(reviews, "train", 10)
    assert found.first[0].tolist() == [byte + 1 for byte in "train neg 0 é".encode()[:10]]
    assert found.labels.tolist() == [0] * 20 + [1] * 20 and max(found.lengths()) == 10
    assert (text.tokens("é\xff", 9) > 1).all()  # 0 is padding alone


def test_text_has_a_dev_set_of_its_own_unless_as_published(reviews):
    clean, paper = (splits.reviews(reviews, 30, dev_is_test=published) for published in (False, True))
    assert paper.dev is paper.test and len(paper.train) == 40
    assert len(clean.dev) == 4 and len(clean.train) == 36 and len(clean.test) == 40
    kept, aside = ({row.tobytes() for row in part.first} for part in (clean.train, clean.dev))
    assert not kept & aside


# Papers


def test_published_pairs_are_read_and_bad_rows_named(tmp_path):
    path = tmp_path / "new_aan_pairs.train.tsv"
    lines = [b"1\ta\tb\tone text\tother \xff text", b"0.0\tc\td\tx\ty"]
    path.write_bytes(b"\n".join(lines) + b"\n")
    found = retrieval.read(tmp_path, "train", 5)
    assert found.labels.tolist() == [1, 0] and found.first[0].tolist() == [byte + 1 for byte in b"one t"]
    assert found.second[0].tolist() == [byte + 1 for byte in b"other"]
    for bad, message in (
        (b"1\ta\tb\tone", r"train\.tsv, line 3: got 4 columns, not label, two ids and two texts"),
        (b"2\ta\tb\tone\ttwo", r"train\.tsv, line 3: label '2' is not 0 or 1"),
        (b"1\ta\tb\t \ttwo", r"train\.tsv, line 3: an empty text; delete the row"),
    ):
        path.write_bytes(b"\n".join([*lines, bad]) + b"\n")
        with pytest.raises(ValueError, match=message):
            retrieval.read(tmp_path, "train", 5)
    path.write_bytes(b"\n".join([*lines, b"1\ta\tb\tone\ttw"]))
    with pytest.raises(
        ValueError, match=r"train\.tsv, line 3: the file ends within the line, .* or end the line if it is"
    ):
        retrieval.read(tmp_path, "train", 5)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"train\.tsv: no pairs in this file"):
        retrieval.read(tmp_path, "train", 5)
    path.write_bytes(lines[0] + b"\n")
    with pytest.raises(FileNotFoundError, match="eval"):
        splits.papers(tmp_path, 5)


@pytest.fixture(scope="module")
def papers(tmp_path_factory) -> Path:
    """Papers, each of which cites up to four earlier ones, the popular ones more often."""
    folder, generator = tmp_path_factory.mktemp("papers"), random.Random(0)
    names = [f"P{i // 10:02}-{1000 + i}" for i in range(400)]
    citations = []
    with tarfile.open(folder / "papers.tar.xz", "w:xz") as archive:
        for i, name in enumerate(names):
            xml = f'<PAPER><S sid="0">{name} &amp;amp; title</S><S sid="1">{"word " * 300}</S></PAPER>'.encode()
            member = tarfile.TarInfo(f"top/{name}/Reference_XML/{name}.xml")
            member.size = len(xml)
            archive.addfile(member, io.BytesIO(xml))
            for j in {int(i * generator.random() ** 2) for _ in range(4)} - {i}:
                citations.append((name, names[j]))
    lines = [*citations, citations[0], ("Z99-9999", names[0]), (names[3], names[3])]  # twice, unknown, itself
    (folder / "acl.txt").write_text("".join(f"{one} , {two}\n" for one, two in lines))
    return folder


def name_of(row: np.ndarray) -> str:
    return bytes((row - 1).astype(np.uint8)).decode()


def test_our_pairs_are_balanced_true_and_divided_by_citing_paper(papers):
    lines = (papers / "acl.txt").read_text().splitlines()
    cited = {tuple(line.split(" , ")) for line in lines}
    everything, sets = Counter(), []
    for split in ("train", "dev", "test"):
        found = retrieval.build(papers, split, 8)
        pairs = [(name_of(one), name_of(two)) for one, two in zip(found.first, found.second, strict=True)]
        positive = [pair for pair, label in zip(pairs, found.labels, strict=True) if label]
        negative = [pair for pair, label in zip(pairs, found.labels, strict=True) if not label]
        assert set(positive) <= cited and len(set(positive)) == len(positive)
        assert not {*negative} & (cited | {(two, one) for one, two in cited}) and len({*negative}) == len(negative)
        assert 0.9 * len(positive) <= len(negative) <= len(positive)
        if split == "train":  # how often a paper is the second one tells nothing
            counts = [Counter(two for _, two in part) for part in (positive, negative)]
            assert sum((counts[0] - counts[1]).values()) <= len(positive) - len(negative)
        assert all(one != two for one, two in negative)
        everything.update(positive)
        sets.append({one for one, _ in pairs})
    known = {pair for pair in cited if pair[0] != pair[1] and pair[0] != "Z99-9999"}
    assert everything == Counter(known)
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    again = retrieval.build(papers, "dev", 30)
    assert name_of(again.first[0]).endswith(" & title\nword word wor")
    assert [row.tolist() for row in again.second] == [row.tolist() for row in retrieval.build(papers, "dev", 30).second]
    assert splits.papers(papers, 8).task == "aan-subset"


def test_bad_papers_are_named(papers, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no papers in it: neither ID\.xml, nor a tar archive"):
        retrieval.build(tmp_path, "train", 9)
    whole = (papers / "papers.tar.xz").read_bytes()
    (tmp_path / "papers.tar.xz").write_bytes(whole)
    with pytest.raises(FileNotFoundError, match=r"acl\.txt"):
        retrieval.build(tmp_path, "train", 9)
    (tmp_path / "acl.txt").write_text("P00-1000 , P00-1001\nP00-1002\n")
    with pytest.raises(ValueError, match=r"acl\.txt, line 2: got 'P00-1002', not 'citing , cited'"):
        retrieval.build(tmp_path, "train", 9)
    (tmp_path / "acl.txt").write_bytes(b"P00-1000 , P00-1001\nP00-1002 , P00\xff\n")
    with pytest.raises(ValueError, match=r"acl\.txt, line 2: not UTF-8 text .*; get it again"):
        retrieval.build(tmp_path, "train", 9)
    (tmp_path / "acl.txt").write_text("P00-1000 , P00-1001\nP00-1002 , P0")
    with pytest.raises(ValueError, match=r"acl\.txt, line 2: the file ends within the line"):
        retrieval.build(tmp_path, "train", 9)
    (tmp_path / "A00-1000.xml").write_text('<PAPER><S sid="0">the beginn')
    with pytest.raises(ValueError, match=r"A00-1000\.xml: ends in .*the beginn', not in </PAPER>: cut short"):
        retrieval.build(tmp_path, "train", 9)
    (tmp_path / "A00-1000.xml").unlink()
    (tmp_path / "acl.txt").write_text("P00-1000 , P00-1001\n")
    with pytest.raises(ValueError, match="citations between its papers are too few to train on"):
        retrieval.build(tmp_path, "train", 9)
    (tmp_path / "papers.tar.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"papers\.tar\.xz: not a tar archive, or a damaged one"):
        retrieval.build(tmp_path, "train", 9)


@needs("aan_subset")
def test_the_real_papers_make_eleven_thousand_pairs():
    found = splits.papers(SHARED / "aan_subset", 4000)
    assert [len(part) for part in found[1:]] == [9120, 1154, 1016]
    assert all(part.labels.mean() == 0.5 for part in found[1:])
    assert np.mean(found.train.lengths()) > 3990


# Images


def colours(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 32, 32, 3), np.uint8), generator.integers(0, 10, count)


def grey_of(pixels: np.ndarray) -> np.ndarray:
    """One value after the other."""
    weights = (0.2989, 0.5870, 0.1140)
    flat = pixels.reshape(len(pixels), -1, 3)
    return np.array(
        [[int(sum(w * int(c) / 255 for w, c in zip(weights, p, strict=True)) * 255.5) for p in row] for row in flat]
    )


def write_batches(folder: Path, kind: str) -> None:
    """The official layouts, with 4 images a batch."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels, labels = colours(4, seed)
        planes = pixels.transpose(0, 3, 1, 2).reshape(4, -1)
        if kind == "bin":
            records = np.concatenate([labels[:, None].astype(np.uint8), planes], 1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        else:
            content = {b"data": planes, b"labels": labels.tolist(), b"batch_label": b"x"}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("kind", ["bin", "py"])
@pytest.mark.parametrize("packed", [False, True])
def test_official_batches_are_read_in_order(kind, packed, tmp_path):
    write_batches(tmp_path / f"cifar-10-batches-{kind}", kind)
    data = tmp_path
    if packed:
        data = tmp_path / "cifar.tar.gz"
        with tarfile.open(data, "w:gz") as archive:
            archive.add(tmp_path / f"cifar-10-batches-{kind}", arcname=f"cifar-10-batches-{kind}")
    train, test = (images.read(data, split) for split in images.SPLITS)
    every = [colours(4, seed) for seed in range(6)]
    assert np.array_equal(train.pixels, np.concatenate([grey_of(pixels) for pixels, _ in every[:5]]))
    assert np.array_equal(test.pixels, grey_of(every[5][0])) and test.labels.tolist() == every[5][1].tolist()
    assert train.labels.tolist() == [label for _, labels in every[:5] for label in labels]
    found = splits.pictures(data)
    assert [len(part) for part in found[1:]] == [18, 2, 4]
    assert np.array_equal(np.stack([*found.train.first, *found.dev.first]), train.pixels)  # the last ones are aside


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_that_is_there_twice_is_not_read_twice(packed, tmp_path):
    """Or the last tenth of the training pictures would be copies of others."""
    for kind in ("bin", "py"):
        write_batches(tmp_path / f"cifar-10-batches-{kind}", kind)
    data = tmp_path
    if packed:
        data = tmp_path / "cifar.tar.gz"
        with tarfile.open(data, "w:gz") as archive:
            for kind in ("bin", "py"):
                archive.add(tmp_path / f"cifar-10-batches-{kind}", arcname=f"cifar-10-batches-{kind}")
    with pytest.raises(ValueError, match=r"data_batch_1 is there more than once: .*batch.*, .*batch.*; keep one"):
        images.read(data, "train")
    assert len(images.read(tmp_path / "cifar-10-batches-py", "train").labels) == 20


def test_the_hubs_rows_are_read(tmp_path):
    import pyarrow
    from pyarrow import parquet

    pixels, labels = colours(3)
    packed = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        packed.append({"bytes": file.getvalue(), "path": None})
    for split in images.SPLITS:
        table = pyarrow.table({"img": packed, "label": labels.tolist()})
        parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    found = images.read(tmp_path, "train")
    assert np.array_equal(found.pixels, grey_of(pixels)) and found.labels.tolist() == labels.tolist()
    table = pyarrow.table({"img": [{"bytes": b"no image", "path": None}], "label": [1]})
    parquet.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="row 0: no image of 32 x 32 pixels"):
        images.read(tmp_path, "test")


class Harmful:
    def __reduce__(self):
        return print, ("code in a pickle has run",)


def test_bad_images_are_named_and_no_pickle_runs_code(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"no CIFAR-10 images to test on in it; it should hold test_batch"):
        images.read(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        images.read(tmp_path / "nowhere", "test")
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        images.read(tmp_path, "dev")
    binary, pickled = tmp_path / "test_batch.bin", tmp_path / "test_batch"
    binary.write_bytes(bytes(3073 + 10))
    with pytest.raises(ValueError, match=r"test_batch\.bin: 3083 bytes are no whole number of records of 3073"):
        images.read(tmp_path, "test")
    binary.write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(ValueError, match=r"test_batch\.bin, image 0: label .*10.* is none of 0 to 9"):
        images.read(tmp_path, "test")
    binary.unlink()
    pickled.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match=r"test_batch: not a batch of CIFAR-10, .*it asks for builtins\.print"):
        images.read(tmp_path, "test")
    assert "has run" not in capsys.readouterr().out
    pickled.write_bytes(pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}))
    with pytest.raises(ValueError, match=r"got images uint8 \(2, 3072\) for 1 labels"):
        images.read(tmp_path, "test")
    (tmp_path / "cut.tar.gz").write_bytes(b"\x1f\x8b cut")
    with pytest.raises(ValueError, match=r"cut\.tar\.gz: not a tar archive, or a damaged one"):
        images.read(tmp_path / "cut.tar.gz", "test")


@needs("cifar10")
def test_real_sheets_are_read_and_damage_named(tmp_path):
    found = images.read(SHARED / "cifar10", "test")
    assert found.pixels.shape == (10_000, 1024) and np.bincount(found.labels).tolist() == [1000] * 10
    with Image.open(SHARED / "cifar10" / "test_batch.png") as sheet:
        first = np.asarray(sheet.crop((0, 7, 1024, 8)).convert("RGB"))
    assert np.array_equal(found.pixels[7], grey_of(first.reshape(1, 32, 32, 3))[0])
    for name in ("test_batch.png", "test_lables.json"):
        (tmp_path / name).write_bytes((SHARED / "cifar10" / name).read_bytes())
    (tmp_path / "test_lables.json").write_text(json.dumps([1, 2]))
    with pytest.raises(ValueError, match=r"test_lables\.json: has 2 labels for test_batch\.png, not 10000"):
        images.read(tmp_path, "test")
    (tmp_path / "test_batch.png").write_bytes((tmp_path / "test_batch.png").read_bytes()[:50_000])
    with pytest.raises(ValueError, match=r"test_batch\.png: not a PNG, or a damaged one"):
        images.read(tmp_path, "test")


# Generated tasks


def test_made_pictures_are_kept_and_divided(tmp_path):
    found = splits.paths(None, 32, 40, tmp_path, 1)
    assert found.task == "pathfinder32" and [len(part) for part in found[1:]] == [32, 4, 4]
    (kept,) = tmp_path.iterdir()
    written = kept.stat().st_mtime_ns
    again = splits.paths(None, 32, 40, tmp_path, 1)
    assert kept.stat().st_mtime_ns == written
    for one, two in zip(found[1:], again[1:], strict=True):
        assert np.array_equal(np.stack(one.first), np.stack(two.first)) and one.labels.tolist() == two.labels.tolist()
    everything = {row.tobytes() for part in found[1:] for row in part.first}
    assert len(everything) == 40
    with pytest.raises(ValueError, match="examples must be at least 10, of which a tenth is the test set: got 9"):
        splits.paths(None, 32, 9, tmp_path, 1)


def test_made_expressions_are_kept_and_divided(tmp_path, monkeypatch):
    monkeypatch.setattr(listops, "SIZES", {"train": 20, "dev": 4, "test": 5})
    found = splits.list_ops(None, tmp_path, 1)
    assert found.task == "listops" and [len(part) for part in found[1:]] == [20, 4, 5]
    again = splits.list_ops(None, tmp_path, 1)
    for one, two in zip(found[1:], again[1:], strict=True):
        for i in range(len(one)):
            assert one.first[i].tolist() == two.first[i].tolist()
            assert listops.evaluate(one.first[i]) == one.labels[i]
    everything = [row.tobytes() for part in found[1:] for row in part.first]
    assert len(set(everything)) == len(everything) == 29 and all(500 < len(row) < 2000 for row in everything)


@needs("pathfinder32")
def test_the_real_pictures_are_divided():
    found = splits.paths(SHARED / "pathfinder32" / "pathfinder32_hard_2000.tar.xz", 32, 0, Path("nowhere"), 1)
    assert [len(part) for part in found[1:]] == [1600, 200, 200]
