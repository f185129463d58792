"""GLUE's files to examples, for all nine tasks, and predictions to the files that its server takes."""

import os
import re
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from nystrom.data import glue
from nystrom.data.examples import Example, decode
from nystrom.data.glue import TASKS, read, write_predictions

SHARED = Path(os.environ.get("NYSTROM_DATA", Path(__file__).parents[2] / "shared" / "data")) / "glue"

# The benchmark's own layout: first line, one row; what the row says. A quotation mark, a space at an end, a line
# separator that is not a line end: all are text.
MNLI = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
    "\tsentence1\tsentence2"
)
MNLI_ROW = "7\t31193\t31193n\tgovernment\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tHow do you know?\tThis information."
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
STSB_ROW = "7\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\tA plane.\tAn air plane."
FILES = {
    ("cola", "train"): ("", 'gj04\t1\t\t"So, he said.', ('"So, he said.', None, 1, 0)),
    ("cola", "dev"): ("", "gj04\t0\t*\tThem went.", ("Them went.", None, 0, 0)),
    ("cola", "test"): ("index\tsentence", "7\tBill whistled.", ("Bill whistled.", None, None, 7)),
    ("sst2", "train"): ("sentence\tlabel", "the parental units \t0", ("the parental units ", None, 0, 0)),
    ("sst2", "dev"): ("sentence\tlabel", "a charming\u2028journey\t1", ("a charming\u2028journey", None, 1, 0)),
    ("sst2", "test"): ("index\tsentence", "7\tuneasy mishmash", ("uneasy mishmash", None, None, 7)),
    ("mrpc", "train"): (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t702876\t702977\tHe said "no\tHe "said" no',
        ('He said "no', 'He "said" no', 1, 0),
    ),
    ("mrpc", "test"): ("index\t#1 ID\t#2 ID\t#1 String\t#2 String", "7\t1\t2\ta\tb", ("a", "b", None, 7)),
    ("stsb", "train"): (STSB + "\tscore", STSB_ROW + "\t3.800", ("A plane.", "An air plane.", 3.8, 7)),
    ("stsb", "test"): (STSB, STSB_ROW, ("A plane.", "An air plane.", None, 7)),
    ("qqp", "train"): (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "133273\t213221\t213222\tHow so?\tWhy?\t1",
        ("How so?", "Why?", 1, 133273),
    ),
    ("qqp", "test"): ("id\tquestion1\tquestion2", "7\tHow so?\tWhy?", ("How so?", "Why?", None, 7)),
    ("mnli", "train"): (
        MNLI + "\tlabel1\tgold_label",
        MNLI_ROW + "\tneutral\tcontradiction",
        ("How do you know?", "This information.", 2, 7),
    ),
    ("mnli", "dev_matched"): (
        MNLI + "\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label",
        MNLI_ROW + "\tneutral\tneutral\tneutral\tcontradiction\tentailment\tneutral",
        ("How do you know?", "This information.", 1, 7),
    ),
    ("mnli", "dev_mismatched"): (
        MNLI + "\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label",
        MNLI_ROW + "\tneutral\tneutral\tneutral\tcontradiction\tneutral\tentailment",
        ("How do you know?", "This information.", 0, 7),
    ),
    ("mnli", "test_matched"): (MNLI, MNLI_ROW, ("How do you know?", "This information.", None, 7)),
    ("mnli", "test_mismatched"): (MNLI, MNLI_ROW, ("How do you know?", "This information.", None, 7)),
    ("qnli", "dev"): (
        "index\tquestion\tsentence\tlabel",
        "7\tWhat?\tThat.\tnot_entailment",
        ("What?", "That.", 1, 7),
    ),
    ("qnli", "test"): ("index\tquestion\tsentence", "7\tWhat?\tThat.", ("What?", "That.", None, 7)),
    ("rte", "train"): ("index\tsentence1\tsentence2\tlabel", "7\tSo.\tNo.\tentailment", ("So.", "No.", 0, 7)),
    ("rte", "test"): ("index\tsentence1\tsentence2", "7\tSo.\tNo.", ("So.", "No.", None, 7)),
    ("wnli", "dev"): ("index\tsentence1\tsentence2\tlabel", "7\tSo.\tNo.\t0", ("So.", "No.", 0, 7)),
    ("wnli", "test"): ("index\tsentence1\tsentence2", "7\tSo.\tNo.", ("So.", "No.", None, 7)),
}
MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"


def put(folder: Path, task: str, name: str, content: str | bytes) -> Path:
    path = folder / TASKS[task].folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(("task", "split"), FILES, ids=["-".join(key) for key in FILES])
@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "mark"])
def test_files_of_the_benchmark(tmp_path, task, split, ending, mark):
    header, row, expected = FILES[task, split]
    lines = [line for line in (header, row) if line]
    for end in ("", ending, 3 * ending):  # the last line of CoLA's dev.tsv has no end
        path = put(tmp_path, task, f"{split}.tsv", mark + ending.join(lines) + end)
        assert read(TASKS[task], tmp_path, split) == [Example(*expected)]
        assert read(TASKS[task], path.parent, split) == [Example(*expected)]  # the task's own folder


def test_every_task_and_split_is_covered():
    assert list(TASKS) == "cola sst2 mrpc stsb qqp mnli qnli rte wnli".split()
    assert {task for task, _ in FILES} == set(TASKS)
    assert {split for task, split in FILES if task == "mnli"} == set(TASKS["mnli"].splits)


def test_test_set_of_mrpc_where_the_download_script_was_not_run_to_its_end(tmp_path):
    put(tmp_path, "mrpc", "msr_paraphrase_test.txt", f"\ufeff{MRPC}\r\n1\t3\t4\ta\tb\r\n")
    assert read(TASKS["mrpc"], tmp_path, "test") == [Example("a", "b", 1, 0)]
    put(tmp_path, "mrpc", "test_with_labels.tsv", f"{MRPC}\n0\t3\t4\tc\td\n")
    assert read(TASKS["mrpc"], tmp_path, "test") == [Example("c", "d", 0, 0)]
    put(tmp_path, "mrpc", "test.tsv", "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n5\t3\t4\te\tf\n")
    assert read(TASKS["mrpc"], tmp_path, "test") == [Example("e", "f", None, 5)]


QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
WRONG = {
    "narrow": ("qqp", QQP + "1\t2\t3\ta\tb\t0\n4\t5\t6\tsplit\n\tin two\t0\n", "line 3 has 4, line 4 has 3; correct"),
    "wide": ("mrpc", f"{MRPC}\n1\t2\t3\ta\tb\tc\n", "every row has 5 columns (Quality, #1 ID, #2 ID, #1 String, #2"),
    "narrow-headless": (
        "cola",
        "gj04\t1\t\tYes.\ngj04\t1\tNo.\n",
        "4 columns (source, label, star, sentence), but line 2",
    ),
    "many": ("sst2", "sentence\tlabel\n" + "x\n" * 12, "line 11 has 1 and 2 more; correct or delete these lines"),
    "blank": ("sst2", "sentence\tlabel\na\t1\n\nb\t1\n", "line 3 has 1"),
    "class": ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tneutral\n", "line 2: label 'neutral' is none of"),
    "classes": ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t\n", "of 'entailment', 'not_entailment'"),
    "headless-class": ("cola", "gj04\t1\t\tYes.\ngj04\t2\t\tNo.\n", "train.tsv, line 2: label '2' is none of '0', '1'"),
    "no-gold": (
        "mnli",
        MNLI + "\tgold_label\n" + MNLI_ROW + "\t-\n",
        "line 2: label '-' is none of 'entailment', 'neu",
    ),
    "high": ("stsb", f"{STSB}\tscore\n{STSB_ROW}\t5.001\n", "line 2: score '5.001' is outside 0 to 5"),
    "low": ("stsb", f"{STSB}\tscore\n{STSB_ROW}\t-0.1\n", "line 2: score '-0.1' is outside 0 to 5"),
    "nan": ("stsb", f"{STSB}\tscore\n{STSB_ROW}\tnan\n", "line 2: score 'nan' is not finite"),
    "no-number": ("stsb", f"{STSB}\tscore\n{STSB_ROW}\tfour\n", "line 2: score 'four' is not a number"),
    "index": ("wnli", "index\tsentence1\tsentence2\tlabel\n-1\ta\tb\t0\n", "line 2: index '-1' is not a whole number"),
    "column": ("sst2", "text\tlabel\na\t1\n", "no column 'sentence'; its columns: text, label"),
    "label-column": ("stsb", f"{STSB}\n{STSB_ROW}\n", "no column 'score'; its columns: index, genre,"),
    "encoding": ("sst2", "sentence\tlabel\na\t1\ncaf\xe9\t1\n".encode("latin-1"), "line 3: not UTF-8 text (invalid"),
    "header-only": ("sst2", "sentence\tlabel\n", "no examples"),
    "empty-headless": ("cola", "", "no examples"),
    "empty": ("sst2", "\n\n", "no examples"),
}


@pytest.mark.parametrize(("task", "content", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_by_name_and_line(tmp_path, task, content, message):
    path = put(tmp_path, task, "train.tsv", content)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read(TASKS[task], tmp_path, "train")
    assert str(raised.value).startswith(str(path))


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mrpc has no split 'validation'; it has train, dev, test"):
        read(TASKS["mrpc"], tmp_path, "validation")
    with pytest.raises(ValueError, match=r"mnli has no split 'dev'; it has train, dev_matched, dev_mismatched, test_m"):
        read(TASKS["mnli"], tmp_path, "dev")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=rf"{folder}: neither QQP/dev.tsv nor dev.tsv is in this folder"):
            read(TASKS["qqp"], folder, "dev")


def test_lines_are_counted_with_and_without_a_byte_order_mark():
    for content in (b"\xef\xbb\xbfa\n\xff\n", b"\n\xff"):
        with pytest.raises(ValueError, match="there, line 2: not UTF-8"):
            decode(content, "there")


def put_parquet(folder: Path, name: str, **columns: list) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    parquet.write_table(pyarrow.table(columns), folder / name)
    return folder / name


def test_copy_of_the_hub(tmp_path):
    first = dict(sentence1=["a", "b"], sentence2=["c", "d"], label=[1, 0], idx=[0, 2])
    put_parquet(tmp_path / "mrpc", "train-00000-of-00002.parquet", **first)
    put_parquet(tmp_path / "mrpc", "train-00001-of-00002.parquet", idx=[3], label=[1], sentence1=["e"], sentence2=["f"])
    wanted = [Example("a", "c", 1, 0), Example("b", "d", 0, 2), Example("e", "f", 1, 3)]
    assert read(TASKS["mrpc"], tmp_path, "train") == read(TASKS["mrpc"], tmp_path / "mrpc", "train") == wanted
    for split in ("validation_mismatched", "test_matched"):
        columns = dict(premise=["a"], hypothesis=["b"], label=[2 if split[0] == "v" else -1], idx=[9])
        put_parquet(tmp_path / "mnli", f"{split}-00000-of-00001.parquet", **columns)
    assert read(TASKS["mnli"], tmp_path, "dev_mismatched") == [Example("a", "b", 2, 9)]
    assert read(TASKS["mnli"], tmp_path, "test_matched") == [Example("a", "b", None, 9)]
    columns = dict(sentence1=["a"], sentence2=["b"], label=pyarrow.array([2.5], pyarrow.float32()), idx=[0])
    put_parquet(tmp_path / "stsb", "validation-00000-of-00001.parquet", **columns)
    assert read(TASKS["stsb"], tmp_path, "dev") == [Example("a", "b", 2.5, 0)]
    put_parquet(tmp_path / "stsb", "test-00000-of-00001.parquet", **columns | dict(label=[-1.0]))
    assert read(TASKS["stsb"], tmp_path, "test") == [Example("a", "b", None, 0)]


HUB_WRONG = {
    "unlabelled": (dict(label=[1, -1]), r"mrpc train, row 2: label -1 is none of 0 to 1"),
    "class": (dict(label=[2, 1]), r"row 1: label 2 is none of 0 to 1"),
    "fraction": (dict(label=[1.0, 0.0]), r"row 1: label 1.0 is none of 0 to 1"),
    "null": (dict(label=[None, 0]), r"row 1: label None is none of 0 to 1"),
    "text": (dict(sentence2=["c", None]), r"row 2: column 'sentence2' holds None"),
    "index": (dict(idx=["0", "1"]), r"row 1: column 'idx' holds '0'"),
    "empty": (dict(sentence1=[], sentence2=[], label=[], idx=[]), r"no examples of mrpc train"),
}


@pytest.mark.parametrize(("changed", "message"), HUB_WRONG.values(), ids=HUB_WRONG)
def test_a_wrong_copy_of_the_hub_is_refused(tmp_path, changed, message):
    columns = dict(sentence1=["a", "b"], sentence2=["c", "d"], label=[1, 0], idx=[0, 1])
    put_parquet(tmp_path / "mrpc", "train-00000-of-00001.parquet", **columns | changed)
    with pytest.raises(ValueError, match=message):
        read(TASKS["mrpc"], tmp_path, "train")


def test_a_damaged_copy_of_the_hub_is_refused(tmp_path):
    columns = dict(sentence1=["a"], sentence2=["c"], label=[1])
    path = put_parquet(tmp_path / "mrpc", "train-00000-of-00001.parquet", **columns)
    with pytest.raises(ValueError, match=rf"{path}: no column 'idx'; its columns: sentence1, sentence2, label"):
        read(TASKS["mrpc"], tmp_path, "train")
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:4] + bytes(100) + whole[104:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{path}: not a parquet file, or a damaged one"):
            read(TASKS["mrpc"], tmp_path, "train")
    path.rename(path.with_name("train-00000-of-00002.parquet"))
    with pytest.raises(ValueError, match="1 files of train are here, not as many as their names say"):
        read(TASKS["mrpc"], tmp_path, "train")


def test_the_hub_through_datasets(tmp_path, monkeypatch):
    """`datasets` itself loads a repository laid out as the hub's, from a folder; nothing is downloaded."""
    columns = dict(sentence1=["a", "b"], sentence2=["c", "d"], label=[1, 0], idx=[0, 1])
    put_parquet(tmp_path / "glue" / "mrpc", "train-00000-of-00001.parquet", **columns)
    card = "---\nconfigs:\n- config_name: mrpc\n  data_files:\n  - split: train\n    path: mrpc/train-*\n---\n"
    (tmp_path / "glue" / "README.md").write_text(card)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(glue, "HUB", str(tmp_path / "glue"))
    assert read(TASKS["mrpc"], None, "train") == [Example("a", "c", 1, 0), Example("b", "d", 0, 1)]
    with pytest.raises(OSError, match=r"\(mrpc, test\) cannot be had from the Hugging Face hub: .*; name a copy on"):
        read(TASKS["mrpc"], None, "test")


def test_the_hub_out_of_reach():
    with pytest.raises(OSError, match=r"nyu-mll/glue \(rte, train\) cannot be had .*: Couldn't reach .* with --data"):
        read(TASKS["rte"], None, "train")


NAMES = "CoLA SST-2 MRPC STS-B QQP QNLI RTE WNLI".split()


def test_submission_has_the_names_and_lines_that_the_server_expects(tmp_path):
    assert [task.submission("test") for task in TASKS.values() if task.name != "mnli"] == [f"{n}.tsv" for n in NAMES]
    mnli = TASKS["mnli"]
    assert [mnli.submission(s) for s in mnli.splits if s.startswith("test")] == ["MNLI-m.tsv", "MNLI-mm.tsv"]
    for task, split in (("mrpc", "dev"), ("mnli", "test"), ("mrpc", "test_matched")):
        with pytest.raises(ValueError, match=f"'{split}' is no test split of {task}; it has train, dev"):
            TASKS[task].submission(split)
    written = {
        "cola": ([1, 0], "1", "0"),
        "mnli": (np.asarray([2, 1]), "contradiction", "neutral"),
        "rte": ([1, 0], "not_entailment", "entailment"),
        "stsb": (np.asarray([5.2, 3.14159], np.float32), "5.000", "3.142"),
    }
    for name, (predictions, first, second) in written.items():
        path = tmp_path / f"{name}.tsv"
        write_predictions(TASKS[name], path, [0, 4], predictions)
        assert path.read_bytes().decode() == f"index\tprediction\n0\t{first}\n4\t{second}\n"
    write_predictions(TASKS["stsb"], path, np.arange(2), [-0.3, 0.0])
    assert path.read_text().splitlines()[1:] == ["0\t0.000", "1\t0.000"]


def test_wrong_predictions_leave_the_file_as_it_was(tmp_path):
    path = tmp_path / "MRPC.tsv"
    path.write_text("before")
    wrong = {
        "got 2 indices, 2 of them different, and 1 predictions": ("mrpc", [0, 1], [1]),
        "got 2 indices, 1 of them different, and 2 predictions": ("mrpc", [3, 3], [1, 1]),
        "mrpc: prediction 2 for index 1 is no class of it": ("mrpc", [0, 1], [0, 2]),
        "mrpc: prediction -1 for index 0 is no class of it": ("mrpc", [0], [-1]),
        "mrpc: prediction 0.5 for index 0 is no class of it": ("mrpc", [0], [0.5]),
        "stsb: prediction nan for index 0 is not finite": ("stsb", [0], [float("nan")]),
        "stsb: prediction inf for index 0 is not finite": ("stsb", [0], [float("inf")]),
    }
    for message, (task, indices, predictions) in wrong.items():
        with pytest.raises(ValueError, match=message):
            write_predictions(TASKS[task], path, indices, predictions)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


COUNTS = {
    "cola": (8551, 1043, 1063),
    "sst2": (67349, 872, 1821),
    "mrpc": (3668, 408, 1725),
    "rte": (2490, 277, 3000),
    "stsb": (5749, 1500, 1379),
    "wnli": (635, 71, 146),
    "qnli": (None, 5463, 5463),
}


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the data of GLUE; NYSTROM_DATA names the folder with glue/ in it"
)
@pytest.mark.parametrize(("task", "counts"), COUNTS.items(), ids=COUNTS)
def test_real_data(task, counts):
    for split, count in zip(("train", "dev", "test"), counts, strict=True):
        if count is None:
            continue
        found = read(TASKS[task], SHARED, split)
        assert [example.index for example in found] == list(range(count))
        assert all(example.text.strip() for example in found)
        labels = {example.label for example in found}
        if split == "test" and task != "mrpc":
            assert labels == {None}
        elif task == "stsb":
            assert min(labels) == 0 and max(labels) == 5
        else:
            assert labels == {0, 1}
            positive = {"cola": 0.70, "mrpc": 0.67}.get(task, 0.5)  # of the published sets
            assert sum(example.label for example in found) / count == pytest.approx(positive, abs=0.07)
