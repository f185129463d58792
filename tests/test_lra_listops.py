"""ListOps: the law of ours against the exact one and the official files; files and cache, whose damage is named."""

import gzip
import lzma
import os
import re
import statistics
import zipfile
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from nystrom.data.lra import cache, listops
from nystrom.data.lra.listops import CLOSE, MAX, MED, MIN, SM, SYMBOLS, Expressions, Limits, evaluate, generate, splits
from nystrom.data.lra.listops_files import FILES, read, read_file, write_file

SHARED = Path(os.environ.get("NYSTROM_DATA", Path(__file__).parents[2] / "shared" / "data")) / "listops_official"
needs_official = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs ListOps examples; NYSTROM_DATA names the folder with listops_official/ in it"
)
SMALL = Limits(max_depth=4, max_args=5, min_length=10, max_length=60)


def tokens(text: str) -> list[int]:
    return [SYMBOLS.index(symbol) + 1 for symbol in text.split()]


def python_value(found: np.ndarray) -> int:
    """The value, by Python itself: the expression is turned into calls of its functions."""
    names = {
        "[MIN": "min((",
        "[MAX": "max((",
        "[MED": "statistics.median((",
        "[SM": "(lambda a: sum(a) % 10)((",
        "]": ")),",
    }
    text = "".join(names.get(symbol, symbol + ",") for symbol in (SYMBOLS[token - 1] for token in found))
    text = text.replace("statistics.median(", "(lambda a: int(statistics.median(a)))(")
    return eval(text, {"statistics": statistics})[0]


def exact_lengths(limits: Limits, p_operator: float) -> np.ndarray:
    """Probability of each length below max_length, from the deepest level up: an operator's arguments convolve."""
    law = np.zeros(limits.max_length)
    law[1] = 1
    for depth in range(limits.max_depth - 1, 0, -1):
        share = 1.0 if depth == 1 else p_operator
        sums, power = np.zeros_like(law), law
        for _ in range(2, limits.max_args + 1):
            power = np.convolve(power, law)[: len(law)]
            sums += power / (limits.max_args - 1)
        law = np.concatenate([[0, 1 - share], share * sums[:-2]])
    law[: limits.min_length + 1] = 0
    return law / law.sum()


def p_of_lengths(lengths: np.ndarray, law: np.ndarray, bins: int = 30) -> float:
    """Chi-square against the law, in bins of about the same probability."""
    bin_of = np.minimum((np.cumsum(law) * bins).astype(int), bins - 1)
    expected = np.bincount(bin_of, law, minlength=bins) * len(lengths)
    return float(stats.chisquare(np.bincount(bin_of[lengths], minlength=bins), expected).pvalue)


def features(found: Expressions) -> dict[str, np.ndarray]:
    """Numbers of each expression whose distribution tells its law."""
    starts, length = found.offsets[:-1], np.diff(found.offsets)
    operator = (found.tokens >= MIN) & (found.tokens < CLOSE)
    depth = np.cumsum(operator.astype(int) - (found.tokens == CLOSE))
    return {
        "length": length,
        "operators": np.add.reduceat(operator.astype(int), starts) / length,
        "depth": np.add.reduceat(depth, starts) / length,
        "value": found.labels,
    }


def p_values(one: Expressions, two: Expressions) -> dict[str, float]:
    """Kolmogorov-Smirnov of each feature, chi-square of the values."""
    first, second = features(one), features(two)
    values = [np.bincount(part.pop("value"), minlength=10) for part in (first, second)]
    found = {name: float(stats.ks_2samp(first[name], second[name]).pvalue) for name in first}
    return found | {"value": float(stats.chi2_contingency(values).pvalue)}


@pytest.fixture(scope="module")
def ours() -> Expressions:
    return generate(6_000, seed=5)


@pytest.fixture(scope="module")
def official() -> Expressions:
    return read(SHARED, "train")


def test_values_of_known_expressions():
    known = {
        "[MAX 2 9 [MIN 4 7 ] 0 ]": 9,
        "[MIN 4 7 ]": 4,
        "[MED 1 2 9 ]": 2,
        "[MED 9 1 4 2 ]": 3,
        "[MED 1 2 ]": 1,  # 1.5
        "[SM 9 9 9 ]": 7,
        "[SM [MED 8 6 ] [SM 5 5 ] 1 ]": 8,
        "7": 7,
    }
    for text, value in known.items():
        assert evaluate(tokens(text)) == value, text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[MAX 1 2", "1 brackets are not closed; 0 values at the top, not 1"),
        ("1 2", "0 brackets are not closed; 2 values at the top, not 1"),
        ("", "0 brackets are not closed; 0 values"),
        ("1 ]", "token ']' at place 1 is out of place"),
        ("[MAX ]", "token ']' at place 1 is out of place"),
    ],
)
def test_what_is_no_expression_is_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(tokens(text))
    with pytest.raises(ValueError, match="token number 0 at place 1"):
        evaluate([1, 0])


def test_labels_are_the_values(ours):
    for i in range(300):
        found = ours.expression(i)
        assert ours.labels[i] == evaluate(found.tolist()) == python_value(found)


def test_law_of_the_lengths(ours):
    law = exact_lengths(Limits(), 0.25)
    lengths = np.diff(ours.offsets)
    assert lengths.min() > 500 and lengths.max() < 2000
    assert p_of_lengths(lengths, law) > 0.01
    assert abs(lengths.mean() - law @ np.arange(2000)) < 3 * lengths.std() / np.sqrt(len(lengths))
    wrong = {"p": exact_lengths(Limits(), 0.27), "depth": exact_lengths(Limits(max_depth=9), 0.25)}
    wrong["args"] = exact_lengths(Limits(max_args=9), 0.25)
    for name, other in wrong.items():
        assert p_of_lengths(lengths, other) < 1e-6, name


def test_small_trees_are_equally_likely():
    """With two levels and two arguments there are four operators and ten digits twice: 400, each once if distinct."""
    limits = Limits(max_depth=2, max_args=2, min_length=1, max_length=5)
    found = generate(400, 0, limits)
    assert len({found.expression(i).tobytes() for i in range(400)}) == 400
    with pytest.raises(ValueError, match="asked for 401 distinct expressions; found 400 within Limits"):
        generate(401, 0, limits)
    rng_draws = [listops._chunk(0, limits, number) for number in range(40)]  # before equal ones are left out
    counts = np.zeros((4, 10, 10))
    for chunk in rng_draws:
        operator, one, two, close = chunk.tokens.reshape(-1, 4).T
        assert (close == CLOSE).all()
        np.add.at(counts, (operator - MIN, one - 1, two - 1), 1)
    assert stats.chisquare(counts.ravel()).pvalue > 0.01


def test_operators_and_numbers_of_arguments():
    """Of trees with one operator at the root alone, all digits below, every number of arguments is equally likely."""
    found = generate(3000, 0, Limits(max_depth=2, max_args=10, min_length=5, max_length=13))
    assert stats.chisquare(np.unique(np.diff(found.offsets), return_counts=True)[1]).pvalue > 0.01
    assert set(np.diff(found.offsets)) == set(range(6, 13))
    assert set(found.tokens[found.offsets[:-1]]) == {MIN, MAX, MED, SM}


def test_the_limits_hold():
    limits = Limits(max_depth=4, max_args=5, min_length=10, max_length=30)
    found = generate(1000, 1, limits)
    assert set(np.diff(found.offsets)) == set(range(11, 30))
    depth = np.cumsum((found.tokens >= MIN) & (found.tokens < CLOSE)) - np.cumsum(found.tokens == CLOSE)
    assert depth.max() == limits.max_depth - 1  # operators above one another; digits are one level deeper


def test_seeds(ours):
    for field, again, fewer, other in zip(ours, generate(1000, 5), generate(7, 5), generate(1000, 6), strict=True):
        size = len(fewer)
        assert (field[:size] == fewer).all() and (again[:size] == fewer).all()
        assert len(other) != len(again) or (other != again).any()
    assert (generate(1000, 5).tokens == ours.between(0, 1000).tokens).all()
    assert len({ours.expression(i).tobytes() for i in range(len(ours.labels))}) == len(ours.labels)


def test_processes_change_nothing():
    one, two = (generate(900, 3, SMALL, processes) for processes in (1, 2))
    for field, other in zip(one, two, strict=True):
        assert field.dtype == other.dtype and (field == other).all()


def test_splits_share_nothing():
    parts = splits(0, {"train": 30, "dev": 5, "test": 6}, SMALL)
    whole = generate(41, 0, SMALL)
    assert {name: len(part.labels) for name, part in parts.items()} == {"train": 30, "dev": 5, "test": 6}
    assert (np.concatenate([part.tokens for part in parts.values()]) == whole.tokens).all()
    assert all(part.offsets[0] == 0 and part.offsets[-1] == len(part.tokens) for part in parts.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "count must be 1 or more: got 0"),
        ((1, -1), "seed must be 0 or more: got -1"),
        ((1, 0, Limits(max_args=1)), "max_depth and max_args must be 2 or more, and min_length 1 or more: got Limits"),
        ((1, 0, Limits(min_length=0)), "got Limits.*min_length=0"),
        ((1, 0, SMALL, 0), "processes must be 1 or more: got 0"),
        ((1, 0, Limits(max_depth=2, max_args=2)), "asked for 1 distinct expressions; found 0 within Limits"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(*arguments)


def test_progress_is_shown_on_a_terminal(monkeypatch, capsys):
    generate(20, 0, SMALL)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    generate(20, 0, SMALL)
    out, err = capsys.readouterr()
    assert out == "" and "ListOps" in err and "20/20" in err


@needs_official
@pytest.mark.parametrize(("split", "count"), [("train", 2000), ("dev", 200), ("test", 200)])
def test_official_files(tmp_path, official, split, count):
    found = official if split == "train" else read(SHARED, split)
    assert len(found.labels) == count
    for i in range(count):
        assert evaluate(found.expression(i).tolist()) == found.labels[i]
    write_file(tmp_path / "again.tsv", found)
    (packed,) = SHARED.glob(FILES[split] + "*")
    assert (tmp_path / "again.tsv").read_bytes() == lzma.decompress(packed.read_bytes())


@needs_official
def test_ours_are_as_the_official_ones(ours, official, monkeypatch):
    """The official sample itself has p = 0.017 against the exact law of the lengths, so no other does much better."""
    assert min(p_values(official, ours).values()) > 0.01
    for name, limits in {"args": Limits(max_args=9), "depth": Limits(max_depth=9)}.items():
        assert min(p_values(official, generate(2000, 0, limits)).values()) < 1e-6, name
    monkeypatch.setattr(listops, "P_OPERATOR", 0.27)
    assert min(p_values(official, generate(2000, 0)).values()) < 1e-6


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz", "a.tsv.xz"])
def test_files(tmp_path, name):
    found = generate(30, 0, SMALL)
    write_file(tmp_path / name, found)
    for field, again in zip(found, read_file(tmp_path / name), strict=True):
        assert field.dtype == again.dtype and (field == again).all()
    first = (tmp_path / name).read_bytes()
    write_file(tmp_path / name, found)
    assert (tmp_path / name).read_bytes() == first and [path.name for path in tmp_path.iterdir()] == [name]


def test_format(tmp_path):
    text = "[MAX 2 [MIN 4 7 ] ]"
    found = Expressions(np.array(tokens(text), np.uint8), np.array([0, 8]), np.array([4], np.uint8))
    write_file(tmp_path / "a.tsv", found)
    source = "( ( ( [MAX 2 ) ( ( ( [MIN 4 ) 7 ) ] ) ) ] )"
    assert (tmp_path / "a.tsv").read_bytes() == f"Source\tTarget\r\n{source}\t4\r\n".encode()
    (tmp_path / "a.tsv").write_text(f"Source\tTarget\n{text}\t4")  # without parentheses, with other ends of lines
    assert (read_file(tmp_path / "a.tsv").tokens == found.tokens).all()


def test_splits_of_files(tmp_path):
    write_file(tmp_path / "basic_val.tsv.gz", generate(3, 0, SMALL))
    assert len(read(tmp_path, "dev").labels) == 3
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no basic_train.tsv in it, nor one with .gz or .xz"):
        read(tmp_path, "train")
    with pytest.raises(ValueError, match="ListOps has no split 'val'; it has train, dev, test"):
        read(tmp_path, "val")


ROW = "( ( ( [MAX 2 ) 4 ) ] )"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 0: no expressions and no header"),
        ("Source\tTarget\r\n", "line 1: no expressions"),
        (f"{ROW}\t4\r\n", "line 1: the header must be 'Source\\tTarget': got"),
        (f"Target\tSource\r\n4\t{ROW}\r\n", "line 1: the header must be"),
        (f"Source\tTarget\r\n{ROW}\t4\r\n{ROW}\r\n", "line 3: has 1 columns, not Source and Target"),
        (f"Source\tTarget\r\n{ROW}\t4\t4\r\n", "line 2: has 3 columns"),
        (f"Source\tTarget\r\n\r\n{ROW}\t4\r\n", "line 2: has 1 columns"),
        (f"Source\tTarget\r\n4\t{ROW}\r\n", f"line 2: label '{ROW[:20]}' is no digit"),
        (f"Source\tTarget\r\n{ROW}\tfour\r\n", "line 2: label 'four' is no digit from 0 to 9"),
        (f"Source\tTarget\r\n{ROW}\t14\r\n", "line 2: label '14' is no digit"),
        (f"Source\tTarget\r\n{ROW}\t", "line 2: label '' is no digit"),
        (f"Source\tTarget\r\n{ROW}\t3\r\n", "line 2: label 3, but the expression's value is 4"),
        ("Source\tTarget\r\n( ( ( [FIRST 2 ) 4 ) ] )\t4\r\n", "line 2: symbol 1, '[FIRST', is none of 0 1 2"),
        ("Source\tTarget\r\n( ( ( [MAX 12 ) 4 ) ] )\t4\r\n", "line 2: symbol 2, '12', is none of"),
        ("Source\tTarget\r\n( ( ( [MAX 2 ) 4 )\t4\r\n", "line 2: not one whole expression: 1 brackets are not closed"),
        ("Source\tTarget\r\n( ( ( [MAX 2 ) 4 ) ]\t4\r\n", "line 2: its parentheses are not where"),
    ],
)
def test_defects_are_named_with_file_and_line(tmp_path, content, message):
    path = tmp_path / "a.tsv"
    path.write_bytes(content.encode())
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read_file(path)
    assert str(raised.value).startswith(f"{path}, line")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    """But for a cut between two rows, or one that takes the end of the last line, where no more is missing."""
    path, found = tmp_path / "a.tsv", generate(3, 0, SMALL)
    write_file(path, found)
    whole = path.read_bytes()
    ends = [match.start() for match in re.finditer(b"\r\n", whole)]
    complete = {end + i for end in ends[1:] for i in range(3)}
    for place in range(len(whole)):
        path.write_bytes(whole[:place])
        if place in complete:
            assert (read_file(path).labels == found.labels[: sum(end <= place for end in ends) - 1]).all()
        else:
            with pytest.raises(ValueError, match=f"{path}, line"):
                read_file(path)


@pytest.mark.parametrize("name", ["a.tsv.gz", "a.tsv.xz"])
def test_a_damaged_packed_file_is_refused(tmp_path, name):
    path = tmp_path / name
    write_file(path, generate(50, 0, SMALL))
    whole = path.read_bytes()
    for place in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place])
        with pytest.raises(ValueError, match=f"{path}, (after )?line"):
            read_file(path)
    for place in (1, len(whole) // 3, len(whole) // 2, len(whole) - 6):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=f"{path}, (after )?line"):
            read_file(path)
    with pytest.raises(ValueError, match="damaged or cut short"):
        path.write_bytes(b"Source\tTarget\n1\t1\n")
        read_file(path)


def test_cache(tmp_path):
    path, found, made = tmp_path / "a.npz", generate(30, 0, SMALL), {"seed": 0, "limits": list(SMALL)}
    cache.write(path, found._asdict(), made)
    arrays, how = cache.read(path, Expressions._fields)
    assert how == made
    for field, again in zip(found, Expressions(**arrays), strict=True):
        assert field.dtype == again.dtype and (field == again).all()
    assert [other.name for other in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ValueError, match=f"{path}: holds labels, offsets, tokens, not labels, pixels; delete it"):
        cache.read(path, ("pixels", "labels"))
    with pytest.raises(FileNotFoundError):
        cache.read(tmp_path / "b.npz", Expressions._fields)


def test_a_damaged_cache_is_refused(tmp_path):
    path, found = tmp_path / "a.npz", generate(30, 0, SMALL)
    cache.write(path, found._asdict(), {})
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:place])
        with pytest.raises(ValueError, match=f"{path}: not a file of cached arrays, or a damaged one"):
            cache.read(path, Expressions._fields)
    place = whole.index(found.tokens.tobytes())
    path.write_bytes(whole[:place] + b"\x01" + whole[place + 1 :])
    with pytest.raises(ValueError, match=f"{path}: not a file of cached arrays, or a damaged one: Bad CRC-32"):
        cache.read(path, Expressions._fields)
    cache.write(path, found._asdict(), {})
    with zipfile.ZipFile(path) as archive:  # whole, but another content under the same checksum
        content = {name: archive.read(name) for name in archive.namelist()}
    content["labels.npy"] = content["labels.npy"][:-1] + b"\x0b"
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in content.items():
            archive.writestr(name, part)
    with pytest.raises(ValueError, match=f"{path}: its checksum is not that of its content; delete it"):
        cache.read(path, Expressions._fields)


def test_gzip_is_the_same_at_any_time(tmp_path):
    write_file(tmp_path / "a.tsv.gz", generate(3, 0, SMALL))
    with gzip.open(tmp_path / "a.tsv.gz") as file:
        file.read()
        assert file.mtime == 0
