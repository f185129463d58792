"""Rows as documents: .jsonl, .parquet and data sets, split without overlap, bad ones named by line."""

import gzip
import json
import re

import pyarrow
import pytest
from datasets import Dataset as HubDataset
from pyarrow import parquet

from nystrom.data import rows, sources
from nystrom.data.rows import Rows, check_rows, read_rows, split_rows

TEXTS = [f"Document {i % 90}.\nIts second line, {'very ' * (i % 7)}long." for i in range(100)]  # ten are there twice


def write(path, texts, field="text"):
    lines = "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts))
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), path, row_group_size=7)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


def texts_of(source) -> list[str]:
    return ["".join(document) for document in source.documents()]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "A.JSONL"])
def test_every_row_is_a_document(tmp_path, name):
    path = write(tmp_path / name, TEXTS, "body")
    found = check_rows(path, "body")
    assert texts_of(found) == TEXTS
    assert found.size == sum(map(len, TEXTS))
    assert [place for place, _ in read_rows(path, "body")][4] == f"{path}, " + ("row 4" if "parq" in name else "line 5")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("fraction", [0.0001, 0.2, 0.9999])
def test_no_text_is_on_both_sides(tmp_path, name, fraction):
    (train,), (held_out,) = split_rows([check_rows(write(tmp_path / name, TEXTS), "text")], fraction)
    kept, apart = texts_of(train), texts_of(held_out)
    assert sorted(kept + apart) == sorted(TEXTS) and not set(kept) & set(apart)
    assert kept and apart
    assert abs(len(set(apart)) / 90 - fraction) < 0.2
    write(tmp_path / name, TEXTS[::-1])  # by text, not by place
    _, (again,) = split_rows([check_rows(tmp_path / name, "text")], fraction)
    assert sorted(texts_of(again)) == sorted(apart)


@pytest.mark.parametrize("fraction", [0.0001, 0.2, 0.9999])
def test_no_text_of_several_files_is_on_both_sides(tmp_path, fraction):
    parts = TEXTS[:50], TEXTS[30:], [TEXTS[0]], [TEXTS[-1]]
    files = [check_rows(write(tmp_path / f"{i}.jsonl", texts), "text") for i, texts in enumerate(parts)]
    train, held_out = split_rows(files, fraction)
    kept, apart = ([text for source in part for text in texts_of(source)] for part in (train, held_out))
    assert sorted(kept + apart) == sorted(text for part in parts for text in part) and not set(kept) & set(apart)
    assert kept and apart
    assert all(texts_of(source) for source in (*train, *held_out))  # a file with nothing on one side is not there


def test_empty_rows_hold_nothing(tmp_path):
    assert check_rows(write(tmp_path / "a.jsonl", ["", "a", ""]), "text").size == 1
    with pytest.raises(ValueError, match=r"a\.jsonl: no text in its rows"):
        check_rows(write(tmp_path / "a.jsonl", ["", ""]), "text")
    with pytest.raises(ValueError, match=r"a\.jsonl: needs two rows of different text or more"):
        split_rows([check_rows(write(tmp_path / "a.jsonl", ["a", "a", ""]), "text")], 0.05)
    with pytest.raises(ValueError, match=r"a\.jsonl and 1 more: needs two rows"):
        split_rows([check_rows(tmp_path / "a.jsonl", "text")] * 2, 0.05)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"', r"a\.jsonl, line 2: not JSON: "),
        ("", r"a\.jsonl, line 2: blank; remove the line"),
        ('{"body": "b", "id": 3}', r"a\.jsonl, line 2: no field 'text': got fields body, id; pass --text-field"),
        ('["b"]', r"a\.jsonl, line 2: no field 'text': got \['b'\]"),
        ('{"text": 3}', r"a\.jsonl, line 2: 'text' must be a string: got 3"),
        ('{"text": null}', r"a\.jsonl, line 2: 'text' must be a string: got None"),
        ('{"text": "a\\ud800"}', r"a\.jsonl, line 2: 'text' is not text: surrogates not allowed at character 1"),
        (b'{"text": "caf\xe9"}', r"a\.jsonl, line 2: not JSON: .*utf-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "c"}\n')
    with pytest.raises(ValueError, match=message):
        check_rows(tmp_path / "a.jsonl", "text")


def test_bad_parquet_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'body'; its columns: id, text; pass --text-field"):
        check_rows(path, "body")
    with pytest.raises(ValueError, match=r"a\.parquet, row 0: 'id' must be a string: got 0"):
        check_rows(path, "id")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a\.parquet: not a parquet file, or a damaged one"):
        check_rows(path, "text")
    (tmp_path / "a.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: not a gzip file"):
        check_rows(tmp_path / "a.jsonl.gz", "text")


def test_a_folder_of_all_kinds_is_split_kind_by_kind(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.md").write_text(f"file {i}")
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "image.png.gz").write_bytes(b"not read")
    write(tmp_path / "a.jsonl", TEXTS[:40])
    write(tmp_path / "b.parquet", TEXTS[40:])
    train, held_out = sources.corpus([tmp_path], [], "text", "utf-8", 0.1)
    kept, apart = ([text for source in part for text in texts_of(source)] for part in (train, held_out))
    assert sorted(kept + apart) == sorted([*TEXTS, *(f"file {i}" for i in range(30)), "packed"])
    assert sum(text.startswith("file") or text == "packed" for text in apart) == 3
    assert {source.path.rpartition(".")[2] for source in held_out} >= {"jsonl", "parquet"}
    whole, named = sources.corpus([tmp_path / "a.jsonl"], [tmp_path / "b.parquet"], "text", "utf-8", 0.1)
    assert [texts_of(source) for source in (*whole, *named)] == [TEXTS[:40], TEXTS[40:]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A folder that load_dataset opens: two files of a train split, one of a validation split."""
    folder = tmp_path_factory.mktemp("dataset")
    for name, texts in (("train-0", TEXTS[:50]), ("train-1", TEXTS[50:]), ("validation-0", ["held", "out"])):
        HubDataset.from_dict({"text": texts, "id": list(range(len(texts)))}).to_parquet(folder / f"{name}.parquet")
    return folder


def test_a_dataset_is_streamed_shard_by_shard(dataset):
    train, held_out = rows.corpus(str(dataset), None, "train", None, "text", 0.2)
    assert len(train) == len(held_out) == 2
    kept, apart = ([text for shard in part for text in texts_of(shard)] for part in (train, held_out))
    assert sorted(kept + apart) == sorted(TEXTS) and kept and apart and not set(kept) & set(apart)
    assert texts_of(train[0]) + texts_of(held_out[0]) != kept  # the shards hold other rows
    train, held_out = rows.corpus(str(dataset), None, "train", "validation", "text", 0.2)
    assert [text for shard in train for text in texts_of(shard)] == TEXTS
    assert [text for shard in held_out for text in texts_of(shard)] == ["held", "out"]


def test_what_is_wrong_with_a_dataset_is_told(dataset):
    with pytest.raises(ValueError, match=r"no column 'body'; its columns: text, id; pass --text-field"):
        rows.corpus(str(dataset), None, "train", None, "body", 0.1)
    with pytest.raises(ValueError, match="must be another than the one to train on: got train for both"):
        rows.corpus(str(dataset), None, "train", "train", "text", 0.1)
    with pytest.raises(OSError, match=re.escape(f"{dataset} (config None, split nosuch) cannot be had with")):
        rows.corpus(str(dataset), None, "nosuch", None, "text", 0.1)
    with pytest.raises(
        OSError, match=r"no/such-set \(config en, split train\) cannot be had .*check the name and the n"
    ):
        rows.corpus("no/such-set", "en", "train", None, "text", 0.1)
    (shard, _), _ = rows.corpus(str(dataset), None, "train", None, "id", 0.1)
    with pytest.raises(ValueError, match=r"\(train, shard 0\), row 0: 'id' must be a string: got 0"):
        texts_of(shard)


def test_rows_that_were_checked_are_read_again_the_same(tmp_path):
    (train,), _ = split_rows([check_rows(write(tmp_path / "a.jsonl", TEXTS), "text")], 0.1)
    assert isinstance(train, Rows) and texts_of(train) == texts_of(train)
