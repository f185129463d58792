"""Text files to blocks: nothing lost, nothing shared between the splits, bad input named."""

import gzip
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PerceiverTokenizer, PreTrainedTokenizerFast

from nystrom.data import text
from nystrom.data.packing import blocks, make_encode
from nystrom.data.text import Span, check_text, from_random_place, read_pieces, split, text_files

BYTES = PerceiverTokenizer()
SEPARATOR = BYTES.sep_token_id


def spans_of(folder, *contents: str, suffix: str = ".txt") -> list[Span]:
    for i, content in enumerate(contents):
        with open_bytes(folder / f"{i}{suffix}", "wb") as file:
            file.write(content.encode())
    return [check_text(folder / f"{i}{suffix}") for i in range(len(contents))]


def open_bytes(path: Path, mode: str):
    return gzip.open(path, mode) if path.suffix == ".gz" else path.open(mode)


@given(
    documents=st.lists(st.text(min_size=1, alphabet="ab\n é漢😀"), min_size=1, max_size=5),
    length=st.integers(1, 40),
    chunk=st.integers(4, 20),
    suffix=st.sampled_from([".txt", ".txt.gz"]),
)
@settings(max_examples=100, deadline=None)
def test_blocks_hold_every_byte_once_in_order(tmp_path_factory, documents, length, chunk, suffix):
    spans = spans_of(tmp_path_factory.mktemp("text"), *documents, suffix=suffix)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CHUNK", chunk)  # many pieces per file
        made = list(blocks([spans], make_encode(BYTES), SEPARATOR, length))
    assert all(len(block["input_ids"]) == length for block in made[:-1])
    stream = np.concatenate([block["input_ids"] for block in made])
    whole = bytes(np.where(stream == SEPARATOR, 0, stream - 6).astype(np.uint8))
    want = b"".join(document.encode() + b"\0" for document in documents)
    assert whole == want or whole + b"\0" == want  # a last block that is only a separator is not made


def test_fast_bytes_are_the_tokenizers_own_ids():
    sample = "naïve 漢字 😀\n\tx = 1\n"
    slow = BYTES(sample, add_special_tokens=False)["input_ids"]
    assert make_encode(BYTES)(sample)[0].tolist() == make_encode(BYTES, whole_words=True)(sample)[0].tolist() == slow
    assert BYTES.decode(slow) == sample


def test_with_documents_apart_no_block_holds_two(tmp_path):
    spans = spans_of(tmp_path, "a" * 7, "b" * 4, "c" * 3)
    made = [block["input_ids"] for block in blocks([spans], make_encode(BYTES), SEPARATOR, 4, "documents")]
    texts = [bytes(np.where(ids == SEPARATOR, 0, ids - 6).astype(np.uint8)) for ids in made]
    assert texts == [b"aaaa", b"aaa\0", b"bbbb", b"ccc\0"]  # a block of nothing but the separator is not made


def test_shards_are_packed_apart(tmp_path):
    a, b = spans_of(tmp_path, "a" * 5, "b" * 5)
    made = [block["input_ids"].tolist() for block in blocks([[a], [b]], make_encode(BYTES), SEPARATOR, 4)]
    assert [len(block) for block in made] == [4, 2, 4, 2]


def test_split_of_many_holds_out_whole_files(tmp_path):
    spans = spans_of(tmp_path, *(f"file {i}" for i in range(40)))
    train, held_out = split(spans, 0.1)
    assert len(held_out) == 4 and sorted(train + held_out) == sorted(spans)
    assert split(spans[::-1], 0.1) == (train, held_out)  # by name, not by order
    moved = tmp_path / "elsewhere" / tmp_path.name
    moved.mkdir(parents=True)
    for span in spans:
        shutil.copy(span.path, moved)
    _, again = split([check_text(path) for path in sorted(moved.iterdir())], 0.1)
    assert [Path(span.path).name for span in again] == [Path(span.path).name for span in held_out]  # nor by place


def test_equal_files_are_on_one_side(tmp_path):
    spans = spans_of(tmp_path, *(f"text {i % 7}" for i in range(40)))
    for fraction in (0.01, 0.3, 0.99):
        sides = split(spans, fraction)
        train, held_out = ({Path(span.path).read_text() for span in side} for side in sides)
        assert train and held_out and not train & held_out
        assert sorted(sides[0] + sides[1]) == sorted(spans)
    with pytest.raises(ValueError, match=r"and 2 more hold the same text; pass --eval-data"):
        split(spans_of(tmp_path, "a", "a", "a"), 0.1)


def test_split_of_one_holds_out_its_end(tmp_path):
    content = "é漢😀x" * 50
    ((whole,), size) = spans_of(tmp_path, content), len(content.encode())
    for fraction in (0.05, 0.1, 0.101, 0.102, 0.103, 0.104, 0.5):
        ((start,), (end,)) = split([whole], fraction)
        assert start.start == 0 and start.stop == end.start and end.stop == size
        assert "".join(read_pieces(start)) + "".join(read_pieces(end)) == content
        assert abs((size - end.start) / size - fraction) < 4 / size + 1 / size


def test_random_places_begin_at_characters_and_leave_enough(tmp_path):
    content = "é漢😀x" * 10
    (span,) = spans_of(tmp_path, content)
    starts = set()
    for seed in range(60):
        found = from_random_place(span, 30, random.Random(seed))
        assert content.endswith("".join(read_pieces(found)))
        assert found.stop - found.start >= 30 and found.stop == span.stop
        starts.add(found.start)
    assert len(starts) > 10
    assert from_random_place(span, 1000, random.Random(0)) == span


def test_pieces_end_with_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK", 16)
    (span,) = spans_of(tmp_path, "some words\n" * 9 + "and an end")
    *pieces, last = read_pieces(span)
    assert len(pieces) > 4 and all(piece.endswith("\n") or not piece for piece in pieces)
    assert last.endswith("and an end")


def test_specials_written_in_a_text_stay_text():
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[MASK]", "[SEP]", "[", "]", "MASK", "a"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, mask_token="[MASK]", sep_token="[SEP]")
    assert tokenizer("a [MASK]")["input_ids"] == [6, 1]
    assert make_encode(tokenizer)("a [MASK]")[0].tolist() == [6, 3, 5, 4]
    assert BYTES.mask_token_id not in make_encode(BYTES)("a [MASK]")[0]


def test_a_file_named_twice_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    assert len(text_files([tmp_path, tmp_path / "a.txt", tmp_path / ".." / tmp_path.name])) == 1


def test_folders_are_searched_for_text(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.txt", "deep/b.PY", "image.png", "deep/c.md"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty.txt").touch()
    assert sorted(p.name for p in text_files([tmp_path])) == ["a.txt", "b.PY", "c.md"]
    assert sorted(p.name for p in text_files([tmp_path, tmp_path / "image.png"])) == [
        "a.txt",
        "b.PY",
        "c.md",
        "image.png",
    ]


def test_latin_1_is_read_as_such(tmp_path):
    (tmp_path / "a.txt").write_bytes("café §§§ naïve".encode("latin-1"))
    span = check_text(tmp_path / "a.txt", "latin-1")
    assert "".join(read_pieces(span)) == "café §§§ naïve" and span.size == 14
    ((start,), (end,)) = split([span], 0.5)  # between two bytes that could not begin a character of UTF-8
    assert ["".join(read_pieces(part)) for part in (start, end)] == ["café §§", "§ naïve"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.txt: empty file"),
        (b"some\0thing", r"bad\.txt: not a text file: NUL byte at offset 4"),
        (b"x" * 30 + b"caf\xe9 ", r"bad\.txt: not UTF-8 text: .* at offset 33"),
        (b"x" * 15 + "é".encode()[:1] + b"y" * 9, r"bad\.txt: not UTF-8 text: .* at offset 15"),
        (b"ends in \xc3", r"bad\.txt: not UTF-8 text: ends inside a character"),
    ],
)
def test_bad_files_are_named(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(text, "CHUNK", 16)  # errors near and across the edge of a piece
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_text(tmp_path / "bad.txt")


@pytest.mark.parametrize("damage", [lambda packed: b"plain text", lambda packed: packed[:-12]])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    (tmp_path / "bad.txt.gz").write_bytes(damage(gzip.compress(b"some text " * 100)))
    with pytest.raises(ValueError, match=r"bad\.txt\.gz: not a gzip file, or a damaged one"):
        check_text(tmp_path / "bad.txt.gz")


def test_missing_and_textless_paths_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file or folder"):
        text_files([tmp_path / "nowhere"])
    (tmp_path / "image.png").write_text("x")
    with pytest.raises(ValueError, match=r"no text in this folder \(suffixes read: \.c \.cpp"):
        text_files([tmp_path])


def test_a_file_cut_short_meanwhile_is_named(tmp_path):
    (span,) = spans_of(tmp_path, "hello world")
    (tmp_path / "0.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"0\.txt: 6 bytes shorter than when it was checked"):
        list(read_pieces(span))


def test_a_lone_file_too_small_to_split_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"0\.txt: 1 bytes are too few to hold out 5\.0%; pass --eval-data"):
        split(spans_of(tmp_path, "x"), 0.05)
