"""Every file of examples/, run as its reader would, in a small form: random models, a few texts, no network."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    NystromformerConfig,
    NystromformerForMaskedLM,
)

from test_ecosystem import TEXTS, wordpiece

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES = {
    "vocab_size": 80,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def example(name: str, *arguments: object, cwd: Path, run: Sequence[object] = ()) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, run), EXAMPLES / f"{name}.py", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained(folder)
    wordpiece().save_pretrained(folder)
    return folder


def test_every_example_is_tested():
    tested = re.findall(r'example\(\s*"(\w+)"', Path(__file__).read_text())
    assert sorted(tested) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


def test_swap_attention(encoder, tmp_path):
    said = example("swap_attention", "--model", encoder, "--blocks", "2", "--lengths", "128", "200", cwd=tmp_path)
    assert "2 texts of 64 tokens" in said
    cosines = [float(x) for x in re.findall(r"mean (0\.\d+|1\.0+), least", said)]
    assert len(cosines) == 3 and min(cosines) > 0.5
    assert cosines[2] == 1  # 64 keys read exactly are all there are
    assert len(re.findall(r"^ +(?:128|200)(?: +\d+\.\d+){7}$", said, flags=re.MULTILINE)) == 2


def test_embed_documents(encoder, tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(" ".join([text] * 20))
    arguments = ("--model", encoder, "--texts", tmp_path, "--length", "256", "--queries", "liquor jugs", "a dog")
    said = example("embed_documents", *arguments, cwd=tmp_path)
    # 20 times 14, 8 and 2 tokens, and [CLS] and [SEP]
    assert "3 documents, 486 tokens, 2 longer than 64." in said
    assert "at 64 tokens they would lose 65% of their text, at 256 5%." in said
    assert said.count(".txt (") == 6
    best = re.search(r"a dog\n.* (\d\.txt)", said)
    assert best and best[1] == "2.txt"


def test_finetune(encoder, tmp_path):
    for label, text in (("few", "a dog"), ("many", "five dozen jugs")):
        (tmp_path / label).mkdir()
        for i in range(8):
            (tmp_path / label / f"{i}.txt").write_text(" ".join([text] * (300 + i)))
    arguments = ("--classes", "few", "many", "missing", "--length", "600", "--epochs", "1", "--out", "out")
    said = example("finetune", "--model", encoder, "--data", tmp_path, *arguments, cwd=tmp_path)
    assert "12 texts of 2 classes to train on, of 600 tokens in the mean" in said
    assert "Reloaded from out: nystrom, {'exact_below': 512}" in said
    accuracy = re.search(r"Accuracy on 4 held-out texts: ([\d.]+)% in batches, ([\d.]+)% one by one", said)
    assert accuracy and accuracy[1] == accuracy[2]
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_load_checkpoint(tmp_path):
    config = NystromformerConfig(**SIZES, num_landmarks=8, segment_means_seq_len=8, conv_kernel_size=5, pad_token_id=0)
    NystromformerForMaskedLM(config).save_pretrained(tmp_path / "model")
    wordpiece().save_pretrained(tmp_path / "model")
    said = example("load_checkpoint", "model", "--long", "256", cwd=tmp_path)
    rows = {row[0]: row[1:] for row in re.findall(r"^  (\w+) +([\d.]+)% +([\d.]+)% +([\d.]+)$", said, re.MULTILINE)}
    assert list(rows) == ["exact", "nystrom", "shift", "residual"]
    assert rows["exact"][1:] == ("100.0", "0.000") and 0 < float(rows["nystrom"][2]) < 1
    assert len(re.findall(r"^  \w+ +\d+\.\d\d$", said, flags=re.MULTILINE)) == 4


def test_pathology_bag(tmp_path):
    sizes = ("--instances", "2000", "--train-instances", "500", "--features", "64", "--dim", "64", "--share", "0.05")
    said = example("pathology_bag", *sizes, "--num-landmarks", "32", "--steps", "200", cwd=tmp_path)
    found = re.search(r"Of the 100 instances that a head of the class token reads most, (\d+) carry the sign;", said)
    assert found and int(found[1]) > 50  # by chance 5
    without, within = (float(x) for x in re.findall(r"positive with ([\d.]+)%", said))
    assert without < within


def test_sequence_parallel(tmp_path):
    """However the processes share the work and the model, the losses are those of one."""
    (tmp_path / "text.txt").write_text("How much wood would a woodchuck chuck, if a woodchuck could chuck wood? " * 9)

    def losses(processes, sequence, steps, *more):
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        flags = ["--text", "text.txt", "--sequence", sequence, "--length", 300, "--steps", steps, "--batch", 2]
        said = example("sequence_parallel", *flags, *more, cwd=tmp_path, run=run)
        assert f"{2 * sequence // processes} x {300 // sequence} tokens a process" in said
        return [float(found) for found in re.findall(r"loss ([\d.]+),", said)]

    alone = losses(1, 1, 4)
    assert alone[0] > alone[-1] and len(alone) == 4
    assert losses(2, 2, 4) == pytest.approx(alone, abs=2e-4)
    kept = "--checkpoint", "kept"
    assert losses(2, 2, 2, "--shard", *kept) == pytest.approx(alone[:2], abs=2e-4)
    assert len(list((tmp_path / "kept" / "step-2").glob("*.distcp"))) == 2  # a part of each process
    (tmp_path / "kept" / "step-9").mkdir()
    (tmp_path / "kept" / "step-9" / "__0_0.distcp").write_bytes(b"half")  # written by one that was killed
    assert losses(4, 2, 3, "--shard", *kept) == pytest.approx(alone[2:3], abs=2e-4)
    assert losses(1, 1, 4, *kept) == pytest.approx(alone[3:], abs=2e-4)
