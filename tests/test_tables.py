"""A user's own tables to examples: four formats, the same examples; every wrong row named by its line."""

import csv
import gzip
import io
import json
import re
from pathlib import Path

import pyarrow
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pyarrow import parquet

from nystrom.data.examples import Example
from nystrom.data.tables import read

ROWS = [
    {"text": "Good, really.", "other": "So?", "label": "pos"},
    {"text": 'He said "no".', "other": "é漢😀 \u2028", "label": "neg"},
    {"text": '"Quoted"', "other": " spaced ", "label": "pos"},
]
EXAMPLES = [Example(r["text"], r["other"], int(r["label"] == "pos"), i) for i, r in enumerate(ROWS)]
NAMES = ("neg", "pos")


def csv_text(rows: list[dict]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def put(path: Path, rows: list[dict]) -> Path:
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if kind == "tsv":
        text = "".join("\t".join(map(str, row)) + "\n" for row in ([*rows[0]], *(row.values() for row in rows)))
    else:
        text = csv_text(rows) if kind == "csv" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


KINDS = ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.csv.gz", "a.tsv.gz", "a.jsonl.gz", "A.2024.CSV"]


@pytest.mark.parametrize("name", KINDS)
def test_four_formats_hold_the_same(tmp_path, name):
    path = put(tmp_path / name, ROWS) if name[0] == "a" else put(tmp_path / "a.csv", ROWS).rename(tmp_path / name)
    assert read(path, "text", "label", "other") == (EXAMPLES, NAMES)
    assert read(path, "text", "label", pair_column=None)[0] == [e._replace(pair=None) for e in EXAMPLES]
    assert read(path, "text", None) == ([e._replace(pair=None, label=None) for e in EXAMPLES], ())
    assert read(path, "other", "label", labels=("pos", "so-so", "neg")) == (
        [Example(e.pair or "", None, 0 if e.label else 2, e.index) for e in EXAMPLES],
        ("pos", "so-so", "neg"),
    )


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_numbers_to_predict(tmp_path, name):
    rows = [{"text": "a", "score": 1.5}, {"text": "b", "score": -2.0}]
    assert read(put(tmp_path / name, rows), "text", "score", regression=True) == (
        [Example("a", None, 1.5, 0), Example("b", None, -2.0, 1)],
        (),
    )
    rows[1]["score"] = float("nan")
    with pytest.raises(ValueError, match=r"(line [23]|row 2): score 'nan' is not finite"):
        read(put(tmp_path / name, rows), "text", "score", regression=True)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_whole_numbers_keep_their_order(tmp_path, name):
    rows = [{"text": "a", "label": label} for label in (10, 9, -1, 2)]
    examples, names = read(put(tmp_path / name, rows), "text", "label")
    assert names == ("-1", "2", "9", "10") and [e.label for e in examples] == [3, 2, 0, 1]


def test_truth_values_are_classes(tmp_path):
    rows = [{"text": "a", "label": True}, {"text": "b", "label": False}]
    for name in ("a.jsonl", "a.parquet"):
        assert read(put(tmp_path / name, rows), "text", "label") == (
            [Example("a", None, 1, 0), Example("b", None, 0, 1)],
            ("false", "true"),
        )


VALUES = st.text(min_size=1).filter(str.strip)  # any character at all, line ends and quotation marks among them


@example([("a", "b "), ("\n c\r", " d \t")], "\n", False)
@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=6), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_csv_gives_back_what_the_csv_module_wrote(tmp_path_factory, pairs, ending, quote_all):
    # Python's csv leaves a lone \r bare where a line ends with \n, and nobody can tell then what it was
    assume(quote_all or ending == "\r\n" or not any("\r" in v and "\n" not in v for v in sum(pairs, ())))
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
        writer = csv.writer(file, lineterminator=ending, quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL)
        writer.writerows([("one", "two"), *pairs])
    assert read(path, "one", None, "two") == ([Example(a, b, None, i) for i, (a, b) in enumerate(pairs)], ())


@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=6), st.booleans())
def test_jsonl_gives_back_what_was_written(tmp_path_factory, pairs, escaped):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    lines = [json.dumps({"one": a, "two": b}, ensure_ascii=escaped) for a, b in pairs]
    path.write_bytes("\n".join(lines).encode())
    assert read(path, "one", None, "two") == ([Example(a, b, None, i) for i, (a, b) in enumerate(pairs)], ())


def test_a_document_longer_than_csvs_own_limit(tmp_path):
    csv.field_size_limit(131_072)
    rows = [{"text": "long " * 100_000, "label": "a"}, {"text": "b", "label": "b"}]
    examples, _ = read(put(tmp_path / "a.csv", rows), "text", "label")
    assert examples[0].text == rows[0]["text"]
    assert csv.field_size_limit() == 131_072  # the whole process's, left as it was


def test_tsv_is_read_as_it_stands(tmp_path):
    path = tmp_path / "a.tsv"
    texts = ['"all of it"', '"', '""', '"he" said ""no"" "again"', "a 'b", "d\u2028e\rf", " c "]
    path.write_bytes("".join(f"{line}\r\n" for line in ("label\ttext", *(f"x\t{text}" for text in texts))).encode())
    assert [example.text for example in read(path, "text", None)[0]] == texts


WRONG = {
    # a text over three lines, then the row at fault: lines are those of the file
    "csv-label": ("a.csv", 'text,label\n"a\n\nb",x\nc,\n', "a.csv, line 5: column 'label' is empty"),
    "csv-text": ("a.csv", 'text,label\n"a\nb",x\n  ,y\n', "a.csv, line 4: column 'text' is empty; fill it in or del"),
    "csv-wide": (
        "a.csv",
        'text,label\n"a\nb",x\nc,d,y\n',
        "a.csv, line 4: got 3 columns, but the header names 2 (text",
    ),
    "csv-narrow": ("a.csv", "text,label\nc\n", "a.csv, line 2: got 1 columns, but the header names 2 (text, label)"),
    "csv-blank": ("a.csv", "text,label\na,x\n\nb,y\n", "a.csv, line 3: blank; remove the line"),
    "csv-quotes": (
        "a.csv",
        'text,label\na,x\n"b" c,y\n',
        "a.csv, line 3: the row that begins here is not CSV: ',' exp",
    ),
    "csv-open": ("a.csv", 'text,label\na,x\n"b,y\nc,z\n', "a.csv, line 3: the row that begins here is not CSV: unexp"),
    "csv-mac": ("a.csv", "text,label\ra,x\rb,y\r", "a.csv, line 1: the row that begins here is not CSV: new-line"),
    "csv-column": ("a.csv", "Text,label\na,x\n", "a.csv, line 2: no column 'text'; its columns: Text, label"),
    "csv-twice": ("a.csv", "text,label,text\na,x,b\n", "two columns have the same name: text, label, text; rename one"),
    "csv-encoding": ("a.csv", "text,label\na,x\ncaf\xe9,y\n".encode("latin-1"), "a.csv, line 3: not UTF-8 text"),
    "csv-label-of-lines": (
        "a.csv",
        'text,label\na,x\nb,"y\nz"\n',
        r"a.csv, line 3: label 'y\nz' holds a tab or a line",
    ),
    "csv-spaces": ("a.csv", "text,label\na,x\nb, x\n", "a.csv, line 3: label ' x' begins or ends with a space"),
    "one-class": ("a.csv", "text,label\na,x\nb,x\n", "a.csv: every row has the label 'x'; a classifier needs two or"),
    "header-only": ("a.csv", "text,label\n", "a.csv: no rows in this file"),
    "jsonl-empty": ("a.jsonl", "", "a.jsonl: no rows in this file"),
    "empty": ("a.csv", "\n", "a.csv: no rows in this file"),
    "tsv-wide": ("a.tsv", "text\tlabel\na\tb\tx\n", "a.tsv, line 2: got 3 columns, but the header names 2 (text, lab"),
    "tsv-quoted": ("a.tsv", 'text\tlabel\na\tx\n"say ""b"""\ty\n', 'a.tsv, line 3: \'"say ""b"""\' is quoted as in a'),
    "jsonl-syntax": ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": }\n', "a.jsonl, line 2: not JSON: Expecting va"),
    "jsonl-blank": (
        "a.jsonl",
        '{"text": "a", "label": "x"}\n\n{"text": "b", "label": "y"}\n',
        "line 2: blank; remove the line",
    ),
    "jsonl-list": ("a.jsonl", '["a", "x"]\n', "a.jsonl, line 1: got ['a', 'x'], not a JSON object; write one object"),
    "jsonl-key": (
        "a.jsonl",
        '{"text": "a", "label": "x"}\n{"text": "b"}\n',
        "line 2: no column 'label'; its columns: t",
    ),
    "jsonl-null": ("a.jsonl", '{"text": null, "label": "x"}\n', "a.jsonl, line 1: column 'text' is empty"),
    "jsonl-text": ("a.jsonl", '{"text": 3, "label": "x"}\n', "a.jsonl, line 1: column 'text' holds 3, not text"),
    "jsonl-surrogate": (
        "a.jsonl",
        '{"text": "a\\ud800", "label": "x"}\n',
        "line 1: column 'text' holds half a character",
    ),
    "jsonl-fraction": (
        "a.jsonl",
        '{"text": "a", "label": 1.0}\n',
        "line 1: label 1.0 is neither text nor a whole number",
    ),
    "kind": ("a.json", "{}", "a.json: not a .csv, .tsv or .jsonl file, nor one of these with .gz, nor a .parquet file"),
    "no-kind": ("a", "text\n", "a: not a .csv, .tsv or .jsonl file"),
    "no-gz": ("a.csv.gz", "text,label\na,x\n", "a.csv.gz: not a gzip file, or a damaged one"),
    "cut-gz": ("a.csv.gz", gzip.compress(b"text,label\na,x\n")[:-4], "a.csv.gz: not a gzip file, or a damaged one"),
    "bad-gz": ("a.csv.gz", gzip.compress(b"text")[:-8] + bytes(8), "a.csv.gz: not a gzip file, or a damaged one"),
    "bad-deflate": ("a.csv.gz", gzip.compress(b"text")[:10] + b"\xff" * 20, "not a gzip file, or a damaged one"),
    "parquet": ("a.parquet", "text", "a.parquet: not a parquet file, or a damaged one"),
}


@pytest.mark.parametrize(("name", "content", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_table_is_refused_by_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read(path, "text", "label")
    assert str(raised.value).startswith(str(path))


def test_a_wrong_parquet_file_is_refused_by_row(tmp_path):
    first = {"text": "a", "label": "y"}
    for column, row in {"text": {"text": None, "label": "x"}, "label": {"text": "b", "label": None}}.items():
        with pytest.raises(ValueError, match=rf"a\.parquet, row 2: column '{column}' is empty"):
            read(put(tmp_path / "a.parquet", [first, row]), "text", "label")
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'body'; its columns: text, other, label"):
        read(put(tmp_path / "a.parquet", ROWS), "body", "label")
    with pytest.raises(ValueError, match=r"row 1: label 1.0 is neither text nor a whole number; scores need --regr"):
        read(put(tmp_path / "a.parquet", [{"text": "a", "label": 1.0}]), "text", "label")


def test_a_label_that_training_did_not_have_is_refused(tmp_path):
    path = put(tmp_path / "a.csv", [*ROWS, {"text": "a\nb", "other": "c", "label": "pos"}, ROWS[0] | {"label": "Pos"}])
    with pytest.raises(ValueError, match=r"a.csv, line 7: label 'Pos' is none of 'neg', 'pos'; correct the row"):
        read(path, "text", "label", labels=NAMES)
    assert read(put(path, ROWS[:1]), "text", "label", labels=NAMES)[0][0].label == 1  # one class is enough to be scored


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path}: no such file"):
            read(path, "text", "label")
