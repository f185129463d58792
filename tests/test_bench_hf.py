"""Whole encoders with swapped attention: time, STS-B, retrieval; the commands on a tiny encoder, their numbers anew."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nystrom.cli import run

WORDS = [f"w{i}" for i in range(60)]
FORMS = ["sdpa", "nystrom", "nystrom_shift", "nystrom_residual"]


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from nystrom.cli import main; main()", "bench", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "140", "NO_COLOR": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny BERT with sharp attention and a tokenizer of single words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    special = dict(unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    vocab = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = BertConfig(
        vocab_size=len(vocab), max_position_embeddings=64, initializer_range=0.4, pad_token_id=vocab["[PAD]"], **sizes
    )
    BertModel(config).save_pretrained(folder)
    return folder


def sentences(count: int, longest: int) -> list[str]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, longest, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(60, (n,), generator=generator).tolist()) for n in lengths]


def embed(folder: Path, texts: list[str], length: int) -> torch.Tensor:
    """Each text alone, with transformers' own attention: no padding, no batch."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            rows.append(model(input_ids=ids).last_hidden_state[0].mean(0))
    return F.normalize(torch.stack(rows), dim=-1)


def test_sts(folder, tmp_path):
    left, right = sentences(24, 40)[:12], sentences(24, 40)[12:]
    scores = [round(5 * abs(torch.tensor(float(i)).sin().item()), 3) for i in range(12)]
    lines = [
        f"genre\tfile\tyear\t{i}\t{x}\t{a}\t{b}" for i, (x, a, b) in enumerate(zip(scores, left, right, strict=True))
    ]
    data, out = tmp_path / "sts.tsv", tmp_path / "out.jsonl"
    data.write_text("\n".join([*lines[:-1], lines[-1] + "\tsource\tsource"]) + "\n")
    done = bench("sts", "--model", folder, "--data", data, "--num-landmarks", "4", "--batch", "5", "--out", out)
    assert done.returncode == 0, done.stderr
    found = {line["method"]: line["spearman"] for line in read(out)}
    assert list(found) == FORMS
    cosines = (embed(folder, left, 64) * embed(folder, right, 64)).sum(1)
    ranks = torch.stack([cosines.argsort().argsort(), torch.tensor(scores).argsort().argsort()]).double()
    assert len({*scores}) == 12  # or ranks would be shared
    assert abs(found["sdpa"] - torch.corrcoef(ranks)[0, 1].item()) < 1e-9
    assert len({*found.values()}) > 1  # other attention, other embeddings
    assert f"{100 * found['nystrom']:.2f}" in done.stdout


def test_retrieval(folder, tmp_path):
    texts, out = sentences(20, 60), tmp_path / "out.jsonl"
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text)
    arguments = ("--model", folder, "--text", tmp_path / "texts", "--length", "48", "--nearest", "3", "--out", out)
    done = bench("retrieval", *arguments, "--num-landmarks", "4", "--batch", "6")
    assert done.returncode == 0, done.stderr
    lines = {line["method"]: line for line in read(out)}
    assert list(lines) == FORMS and lines["sdpa"]["overlap"] == lines["sdpa"]["first_same"] == 1
    assert all(line["documents"] == 20 and line["seconds"] > 0 for line in lines.values())
    assert 0 < lines["nystrom"]["overlap"] < 1
    done = bench("retrieval", *arguments, "--num-landmarks", "48")  # every cluster a single key: exact
    assert done.returncode == 0, done.stderr
    assert read(out)[-1]["method"] == "nystrom_residual" and read(out)[-1]["overlap"] == 1


def test_models(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    quick = ("--rounds", "2", "--seconds", "0.001", "--threads", "1", "--num-landmarks", "8", "--out", out)
    done = bench("models", "--lengths", "40", "90", "--heads", "2", "--head-dim", "8", "--layers", "1", *quick)
    assert done.returncode == 0, done.stderr
    assert "times as fast as sdpa" in done.stdout
    done = bench("models", "--model", folder, "--lengths", "90", "--backward", *quick)  # beyond its 64 positions
    assert done.returncode == 0, done.stderr
    lines = read(out)
    assert [(x["n"], x["method"]) for x in lines] == [(n, form) for n in (40, 90, 90) for form in FORMS]
    assert all(x["of_sdpa"] == 1 for x in lines if x["method"] == "sdpa")
    assert all(x["ms"] > 0 and len(x["ms_rounds"]) == 2 for x in lines)
    assert lines[-1]["what"] == f"{folder.parent.name}/tiny" and lines[-1]["backward"] and lines[-1]["layers"] == 2
    done = bench("table", "--lines", out)
    assert done.returncode == 0 and f"ms per forward + backward of {folder.parent.name}/tiny" in done.stdout, (
        done.stderr
    )


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sts --data {bad}", "line 1: the fifth column must be a score and the next two sentences: got 'a\\tb'"),
        ("sts --data nowhere.tsv", "nowhere.tsv"),
        ("retrieval --text {bad} --nearest 3", "more than nearest = 3 documents: got 1"),
        ("retrieval --text {bad} --nearest 0", "nearest must be at least 1: got 0"),
        ("retrieval --text {many} --nearest 1 --length 65", "at most the model's 64 positions: got 65"),
        ("models --rounds 0", "rounds must be at least 1: got 0"),
    ],
)
def test_refusals(folder, tmp_path, command, message):
    (tmp_path / "bad.tsv").write_text("a\tb\n")
    (tmp_path / "many").mkdir()
    for name in "abc":
        (tmp_path / "many" / f"{name}.txt").write_text("w1 w2")
    filled = [word.format(bad=tmp_path / "bad.tsv", many=tmp_path / "many") for word in command.split()]
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        run(["bench", *filled, "--model", str(folder)])
