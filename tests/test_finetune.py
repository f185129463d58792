"""Fine-tuning: what a run leaves behind, that it learns, that it repeats and resumes bit for bit, what it refuses."""

import contextlib
import csv
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
)

from nystrom import cli
from nystrom.data import jobs
from nystrom.hf import NystromformerConfig, NystromformerForMaskedLM
from nystrom.hf.classifier import OWN
from nystrom.presets import READ_BY
from nystrom.recipes import finetune
from nystrom.recipes.finetune import Csv, Glue, Imdb

KINDS = ("softmax", "nystrom", "nystrom_shift", "nystrom_residual")
GOOD, BAD = ("good", "fine", "grand"), ("bad", "dull", "poor")
WORDS = (*GOOD, *BAD, *"film plot actor scene the a is was very not and he she they saw it cat dog".split())
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
SIZES = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
SIZES |= dict(max_position_embeddings=64, initializer_range=0.1)
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
FAST = dict(length=32, batch_size=8, lr=2e-3, epochs=1.0, attention="nystrom", num_landmarks=4, exact_below=0)
FLAGS = [word for name, value in FAST.items() for word in (f"--{name.replace('_', '-')}", str(value))]

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def words_only() -> PreTrainedTokenizerFast:
    tokens = {word: i for i, word in enumerate((*SPECIAL.values(), *WORDS))}
    made = Tokenizer(models.WordPiece(tokens, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A pretrained encoder, as it were, without its pooler, which a masked language model has not."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(folder)
    words_only().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "own"
    torch.manual_seed(0)
    config = NystromformerConfig(**SIZES, num_landmarks=4, conv_kernel_size=5, pad_token_id=0)
    NystromformerForMaskedLM(config).save_pretrained(folder)
    words_only().save_pretrained(folder)
    return folder


class Texts:
    """Sentences of 3 to 10 words, of which the last says whether they are good."""

    def __init__(self) -> None:
        self.random = random.Random(0)

    def __call__(self, good: int | bool) -> str:
        filler = [self.random.choice(WORDS[6:]) for _ in range(self.random.randrange(2, 10))]
        return " ".join([*filler, self.random.choice(GOOD if good else BAD)])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """GLUE's folders of three tasks, aclImdb, and tables of our own."""
    folder, text = tmp_path_factory.mktemp("data"), Texts()
    for task in ("CoLA", "MRPC", "STS-B"):
        (folder / task).mkdir()
    for split, count in (("train", 96), ("dev", 32)):
        truth = [i % 2 for i in range(count)]
        cola = "".join(f"gj04\t{good}\t\t{text(good)}\n" for good in truth)
        (folder / "CoLA" / f"{split}.tsv").write_text(cola)
        mrpc = "".join(f"{good}\t1\t2\t{text(True)}\t{text(good)}\n" for good in truth)
        (folder / "MRPC" / f"{split}.tsv").write_text(MRPC + mrpc)
        stsb = "".join(
            f"{i}\tg\tf\ty\to\ts\ts\t{text(1)}\t{text(good)}\t{good * 5}.0\n" for i, good in enumerate(truth)
        )
        (folder / "STS-B" / f"{split}.tsv").write_text(STSB + stsb)
    (folder / "CoLA" / "test.tsv").write_text("index\tsentence\n" + "".join(f"{i}\t{text(i % 2)}\n" for i in range(9)))
    for split, (name, label) in itertools.product(("train", "test"), (("neg", 0), ("pos", 1))):
        (folder / "aclImdb" / split / name).mkdir(parents=True)
        for i in range(24):
            (folder / "aclImdb" / split / name / f"{i}_{1 + 8 * label}.txt").write_text(text(label))
    for split, count in (("train", 96), ("dev", 32)):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["text", "other", "kind", "value"])
            for i in range(count):
                one, two = i % 2, i // 2 % 2
                kind = ("both bad", "first good", "second good", "both good")[one + 2 * two]
                table.writerow([text(one), text(two), kind, one + two / 2])
    return folder


@pytest.fixture
def cola(bert, data, tmp_path) -> Glue:
    return Glue(task="cola", model=str(bert), data=data, out=tmp_path / "run", **FAST)


def command(*arguments: object, cwd: Path | None = None, **more: Any) -> subprocess.Popen[str]:
    """The real command, at work."""
    program = [sys.executable, "-c", "from nystrom.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment} | more
    return subprocess.Popen(program, cwd=cwd, **more)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def predictions(path: Path) -> list[tuple[str, str]]:
    """Label and prediction of each example."""
    header, *rows = path.read_text().splitlines()
    assert header == "index\tlabel\tprediction"
    return [(label, prediction) for _, label, prediction in (row.split("\t") for row in rows)]


# What a run leaves behind


def test_the_command_leaves_a_whole_run_behind(bert, data, tmp_path):
    arguments = ["glue", "--task", "cola", "--model", bert, "--data", data, "--attention", "nystrom", "--predict"]
    running = command("finetune", *arguments, *FLAGS, "--epochs", "6", "--out", "run", cwd=tmp_path)
    printed, progress = running.communicate()
    assert running.returncode == 0, progress
    run = tmp_path / "run"
    assert not list(run.glob("checkpoint-*")) and not list(run.rglob("*.partial"))
    assert list(run.glob("runs/*/events.out.tfevents.*"))
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    about = json.loads((run / "run.json").read_text())
    assert about["recipe"] == "finetune" and about["environment"]["packages"]["torch"] == torch.__version__
    assert about["config"]["task"] == "cola" and about["config"]["lr"] == 2e-3 and about["config"]["seeds"] == []
    found = metrics(run)
    assert (found["task"], found["attention"], found["seed"]) == ("cola", "nystrom", 0)
    assert found["examples"] == {"train": 96, "dev": 32} and found["steps"] == 72
    assert found["tokens_per_second"] > 0 and found["seconds"] > 0
    assert [entry["step"] for entry in found["curve"] if "eval_score" in entry] == [12, 24, 36, 48, 60, 72]
    seconds = [entry["seconds"] for entry in found["curve"]]
    assert seconds == sorted(seconds) and seconds[-1] == pytest.approx(found["seconds"], abs=1e-3)
    assert (
        found["score"] == {"name": "matthews", "value": found["scores"]["matthews"]} and found["score"]["value"] > 0.8
    )
    assert "96 examples to train on" in printed and "attention nystrom" in printed and "stays exact" not in printed
    assert f"matthews {found['score']['value']:.4f}" in printed and "Wrote run" in printed
    assert len(re.findall(r"step \d+: loss \d\.\d+, matthews -?\d\.\d+, score ", progress)) == 6
    assert "Loading weights" not in progress and "newly initialized" not in progress
    header, *rows = (run / "CoLA.tsv").read_text().splitlines()
    assert header == "index\tprediction" and [row.split("\t") for row in rows] == [
        [str(i), str(i % 2)] for i in range(9)
    ]

    # transformers opens the folder, attention and all, and says the same of the dev set
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    assert model.config._attn_implementation == "nystrom"
    assert model.config.nystrom == {"num_landmarks": 4, "exact_below": 0}
    texts = [line.split("\t")[3] for line in (data / "CoLA" / "dev.tsv").read_text().splitlines()]
    said = [model(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for text in texts]
    assert [str(label) for label in said] == [prediction for _, prediction in predictions(run / "predictions-dev.tsv")]


@pytest.mark.parametrize(
    ("settings", "names", "least"),
    [
        (lambda data: Glue(task="mrpc", data=data, **BASE), ("accuracy", "f1"), 0.7),
        (lambda data: Glue(task="stsb", data=data, **BASE), ("pearson", "spearman"), 0.7),
        (lambda data: Imdb(data=data / "aclImdb", **BASE), ("accuracy",), 0.7),
        (lambda data: Csv(label_column="kind", pair_column="other", **TABLES(data)), ("accuracy", "macro_f1"), 0.7),
        (lambda data: Csv(label_column="value", regression=True, **TABLES(data)), ("pearson", "spearman"), 0.7),
    ],
    ids=["mrpc", "stsb", "imdb", "classes", "numbers"],
)
def test_learns_and_scores(settings, names, least, bert, data, tmp_path):
    """The numbers of metrics.json, from the predictions that lie beside it."""
    config = replace(settings(data), model=str(bert), out=tmp_path / "run")
    found = finetune.train(config)
    name = "test" if isinstance(config, Imdb) else "eval" if isinstance(config, Csv) else "dev"
    labels, said = zip(*predictions(config.out / f"predictions-{name}.tsv"), strict=True)
    if names[0] == "pearson":
        labels, said = np.array(labels, float), np.array(said, float)
        expected = {"pearson": stats.pearsonr(labels, said)[0], "spearman": stats.spearmanr(labels, said)[0]}
    else:
        expected = {"accuracy": sk.accuracy_score(labels, said), "macro_f1": sk.f1_score(labels, said, average="macro")}
        expected["f1"] = sk.f1_score(labels, said, pos_label=labels[1]) if len(set(labels)) == 2 else 0.0
    assert {key: value for key, value in found["scores"].items() if key != "loss"} == pytest.approx(
        {key: expected[key] for key in names}, abs=1e-6
    )
    assert found["score"]["value"] == pytest.approx(np.mean([expected[key] for key in names]), abs=1e-6)
    assert found["score"]["value"] > least and found["score"]["name"] == " and ".join(names)
    assert found == json.loads((config.out / "metrics.json").read_text())


BASE: dict[str, Any] = {**FAST, "epochs": 10.0, "lr": 5e-3, "attention": "nystrom", "model": "", "out": Path()}


def TABLES(data: Path) -> dict[str, Any]:
    return {**BASE, "train": data / "train.csv", "eval": data / "dev.csv", "text_column": "text"}


# Attention


def test_every_attention_runs(cola, tmp_path):
    """From one start every kind goes its own way."""
    after = {}
    few = {"top_k": 2, "window": 0, "block": 4}  # or the residual form would be exact
    for kind in KINDS:
        config = of_kind(kind, replace(cola, out=tmp_path / kind, train_examples=16, **few))
        assert finetune.train(config)["attention"] == metrics(config.out)["attention"] == kind
        after[kind] = weights(config.out)
    assert len(set(after.values())) == len(KINDS)


def of_kind(kind: str, config: Any) -> Any:
    """With this attention, and its settings alone."""
    others = {name: None for name in finetune.SETTINGS if name not in READ_BY[kind]}
    return replace(config, attention=kind, **others)


def test_settings_that_nothing_reads_are_refused(cola, own):
    for kind, given, said in [
        ("softmax", {}, "attention softmax does not read num_landmarks 4, exact_below 0; leave it out"),
        (None, {}, "attention softmax does not read num_landmarks 4, exact_below 0"),
        ("nystrom", {"top_k": 3}, "attention nystrom does not read top_k 3; leave it out, or pass another --attention"),
    ]:
        with pytest.raises(ValueError, match=said):
            finetune.train(replace(cola, attention=kind, **given))
    with pytest.raises(ValueError, match="attention softmax does not read num_landmarks 4"):
        finetune.train(replace(cola, model=str(own), attention="softmax", exact_below=None))
    with pytest.raises(ValueError, match="seeds take the place of seed: got 3 beside 0, 1"):
        finetune.train(replace(cola, seed=3, seeds=(0, 1)))
    assert not cola.out.exists()


def test_our_own_model_runs_every_attention(own, cola, tmp_path):
    after = {}
    for kind, ours in OWN.items():
        config = replace(cola, model=str(own), exact_below=None, out=tmp_path / kind, train_examples=16)
        config = of_kind(kind, config)
        assert finetune.train(config)["attention"] == metrics(config.out)["attention"] == kind
        assert json.loads((config.out / "config.json").read_text())["attention"] == ours
        after[kind] = weights(config.out)
    assert len({after[kind] for kind in ("softmax", "nystrom", "nystrom_shift")}) == 3
    default = replace(cola, model=str(own), attention=None, exact_below=None, out=tmp_path / "default")
    finetune.train(replace(default, train_examples=16))
    assert weights(tmp_path / "default") == after["nystrom"]  # what its folder says


def test_says_where_attention_stays_exact(cola, tmp_path, capsys):
    finetune.train(replace(cola, attention="nystrom", exact_below=None, train_examples=16))
    assert "inputs have at most 12 tokens, and exact_below is 1024: attention stays exact; pass --exact-below 0" in (
        capsys.readouterr().out
    )
    twin = of_kind("softmax", replace(cola, out=tmp_path / "twin", train_examples=16))
    finetune.train(twin)
    assert "stays exact" not in capsys.readouterr().out
    assert metrics(cola.out)["scores"] == pytest.approx(metrics(twin.out)["scores"], abs=1e-6)
    assert (metrics(cola.out)["longest_input"], metrics(cola.out)["exact_below"]) == (12, 1024)
    finetune.train(replace(cola, attention="nystrom", exact_below=12, out=tmp_path / "some", train_examples=16))
    assert "stays exact" not in capsys.readouterr().out  # an input of 12 tokens is not below 12


def test_a_head_of_other_classes_is_replaced(cola, tmp_path):
    BertForSequenceClassification(BertConfig(**SIZES, num_labels=5)).to(torch.bfloat16).save_pretrained(
        tmp_path / "five"
    )
    words_only().save_pretrained(tmp_path / "five")
    default = replace(of_kind("softmax", cola), attention=None)
    found = finetune.train(replace(default, model=str(tmp_path / "five"), train_examples=16))
    assert found["attention"] == "softmax"
    model = AutoModelForSequenceClassification.from_pretrained(cola.out)
    assert model.config.num_labels == 2 and model.dtype == torch.float32  # weights of bfloat16 would not learn


# Seeds, resuming


def test_a_seed_repeats_and_another_differs(cola, tmp_path):
    cola = replace(cola, attention="nystrom", train_examples=40)
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        finetune.train(replace(cola, out=tmp_path / name, seed=seed))
    assert weights(tmp_path / "first") == weights(tmp_path / "again") != weights(tmp_path / "other")
    scores = [metrics(tmp_path / name)["scores"] for name in ("first", "again")]
    assert scores[0] == scores[1]
    found = finetune.train(replace(cola, out=tmp_path / "both", seeds=(4, 3)))
    assert weights(tmp_path / "both" / "seed-3") == weights(tmp_path / "first")
    assert weights(tmp_path / "both" / "seed-4") == weights(tmp_path / "other")
    each = [metrics(tmp_path / name)["scores"]["loss"] for name in ("other", "first")]
    assert found["scores"]["loss"] == {"mean": np.mean(each), "sd": pytest.approx(np.std(each, ddof=1)), "each": each}
    assert found == json.loads((tmp_path / "both" / "summary.json").read_text()) and found["seeds"] == [4, 3]
    assert json.loads((tmp_path / "both" / "seed-4" / "run.json").read_text())["config"]["seed"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "place", "step"),
    [
        ("--seed 5 --gradient-accumulation 2 --batch-size 4", ".", 6),  # within the second epoch
        ("--seeds 5 6 --hold-out 0.25 --early-stopping 2 --epochs 5 --lr 0.01", "seed-6", 6),
    ],
    ids=["within an epoch", "second seed, early stopping"],
)
def test_killed_and_resumed_ends_where_it_would_have(flags, place, step, bert, data, tmp_path):
    """kill -9 while it trains; a checkpoint that was cut off is not used."""
    arguments = ["finetune", "glue", "--task", "cola", "--model", str(bert), "--data", str(data), *FLAGS]
    arguments += "--attention nystrom --train-examples 32 --epochs 3 --checkpoint-steps 2".split()
    arguments += flags.split()
    run = tmp_path / "run"
    with open(tmp_path / "log", "w") as log:
        running = command(*arguments, "--out", run, stdout=log, stderr=log)
        while not (reached := [point for point in checkpoints(run / place) if point >= step]):
            assert running.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert not (run / place / "metrics.json").exists()
    half = run / place / "checkpoint-1000"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_step": 1000')
    earlier = {path: path.read_bytes() for path in run.glob("seed-5/*.*")}
    assert bool(earlier) == (place == "seed-6")
    cli.run([*arguments, "--out", str(run), "--resume"])
    assert not list(run.rglob("checkpoint-*"))
    assert earlier == {path: path.read_bytes() for path in earlier}  # a finished seed is not touched
    assert "resumed" in json.loads((run / "run.json").read_text())

    cli.run([*arguments, "--out", str(tmp_path / "whole")])
    one, two = metrics(tmp_path / "whole" / place), metrics(run / place)
    assert one["steps"] == two["steps"] > max(reached)
    for key in ("score", "scores", "examples"):
        assert one[key] == two[key]
    assert untimed(one["curve"]) == untimed(two["curve"])
    assert sum("eval_loss" in entry for entry in one["curve"]) >= 3
    for name in ("model.safetensors", "predictions-dev.tsv"):
        assert (run / place / name).read_bytes() == (tmp_path / "whole" / place / name).read_bytes()


def untimed(curve: list[dict]) -> list[dict]:
    """Without what no two runs share."""
    timed = ("seconds", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return [{name: value for name, value in entry.items() if name not in timed} for entry in curve]


@pytest.mark.parametrize(
    "settings",
    [dict(epochs=2.0), dict(epochs=1.5), dict(epochs=9.0, hold_out=0.25, early_stopping=1, lr=0.02)],
    ids=["whole epochs", "half an epoch", "stopped early"],
)
def test_interrupted_after_the_last_step_it_trains_no_more(settings, cola, tmp_path, monkeypatch):
    """The run is found elsewhere when it goes on."""
    cola = replace(cola, attention="nystrom", train_examples=32, checkpoint_steps=2, **settings)
    whole = finetune.train(replace(cola, out=tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune.jobs, "score_all", interrupt)
        finetune.train(cola)
    moved = cola.out.rename(tmp_path / "moved")
    resumed = finetune.train(replace(cola, out=moved, resume=True))
    assert untimed(resumed["curve"]) == untimed(whole["curve"])
    assert all(resumed[name] == whole[name] for name in ("steps", "scores", "score"))
    assert weights(moved) == weights(tmp_path / "whole")
    if "early_stopping" in settings:
        scores = [entry["eval_score"] for entry in whole["curve"] if "eval_score" in entry]
        assert scores.index(max(scores)) < len(scores) - 1 < 8  # it stopped, and an earlier epoch's model was kept


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_moved_run_finds_its_best_epoch(cola, tmp_path, monkeypatch):
    """Interrupted in an epoch after the best one."""
    cola = replace(cola, attention="nystrom", train_examples=32, hold_out=0.25, early_stopping=3, lr=0.02, epochs=6.0)
    whole = finetune.train(replace(cola, out=tmp_path / "whole"))
    scores = [entry["eval_score"] for entry in whole["curve"] if "eval_score" in entry]
    best = scores.index(max(scores))
    assert 0 <= best < len(scores) - 2, scores
    marked = []

    def mark(callback, args, state, control, **_):
        Path(args.output_dir, f"checkpoint-{state.global_step}", "complete").touch()
        marked.append(state.global_step)
        if len(marked) == best + 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nystrom.training.Checkpoints.on_save", mark)
        finetune.train(cola)
    moved = cola.out.rename(tmp_path / "moved")
    assert finetune.train(replace(cola, out=moved, resume=True))["scores"] == whole["scores"]
    assert weights(moved) == weights(tmp_path / "whole")


def checkpoints(folder: Path) -> list[int]:
    """Steps of the whole ones."""
    return [int(mark.parent.name.removeprefix("checkpoint-")) for mark in folder.glob("checkpoint-*/complete")]


def test_a_finished_run_is_not_repeated(cola, capsys):
    first = finetune.train(replace(cola, train_examples=16))
    before = weights(cola.out), os.stat(cola.out / "metrics.json").st_mtime_ns
    assert finetune.train(replace(cola, train_examples=16, resume=True)) == first
    assert before == (weights(cola.out), os.stat(cola.out / "metrics.json").st_mtime_ns)
    (cola.out / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"run/metrics.json: damaged: not JSON"):
        finetune.train(replace(cola, train_examples=16, resume=True))
    with pytest.raises(ValueError, match=r"settings: lr was 0.002, is 0.1; train_examples was 16, is None; pass"):
        finetune.train(replace(cola, resume=True, lr=0.1))


def test_a_full_disk_is_told_and_the_run_goes_on_once_there_is_room(bert, data, tmp_path):
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a small disk takes Linux and root to make")
    disk = tmp_path / "disk"
    disk.mkdir()
    arguments = ["finetune", "glue", "--task", "cola", "--model", str(bert), "--data", str(data), *FLAGS]
    arguments += ["--epochs", "2", "--checkpoint-steps", "2", "--attention", "nystrom"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mounted(disk, "400k"))
        with pytest.raises(OSError, match=r"the run needs about 1 MiB and the disk has 0 MiB left; make room or"):
            cli.run([*arguments, "--out", str(disk / "run")])
        assert not (disk / "run").exists()
        subprocess.run(["mount", "-o", "remount,size=900k", disk], check=True)
        running = command(*arguments, "--out", disk / "run")
        _, said = running.communicate()
        assert running.returncode == 2 and "Traceback" not in said, said
        assert (
            "run: the disk is full (0.0 MiB left); make room, then go on from the last checkpoint with --resume" in said
        )
        assert (disk / "run" / "checkpoint-4" / "complete").exists() and not (disk / "run" / "metrics.json").exists()
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        cli.run([*arguments, "--out", str(disk / "run"), "--resume"])
        cli.run([*arguments, "--out", str(tmp_path / "whole")])
        assert weights(disk / "run") == weights(tmp_path / "whole")


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


# Held-out examples, early stopping


def test_what_is_held_out_is_not_trained_on(cola):
    config = replace(cola, hold_out=0.25, train_examples=80, eval_examples=10)
    job, tokenizer, model = finetune.prepare(config)
    (dev, held_out), everything = job.evals.values(), {e.index for e in finetune.read(replace(cola)).train}
    train, aside = {e.index for e in job.train}, {e.index for e in held_out}
    assert len(train) == len(job.train) == 60 and len(aside) == len(held_out) == 20 and len(dev) == 10
    assert not train & aside and train | aside < everything
    trainer = finetune.build_trainer(config, job, model, tokenizer, jobs.encoded(job, tokenizer, 32), 0, config.out)
    assert len(trainer.train_dataset) == 60 and len(trainer.eval_dataset) == 20
    found = finetune.train(config)
    assert found["examples"] == {"train": 60, "dev": 10, "hold_out": 20}
    assert {"matthews", "loss", "hold_out_score", "hold_out_matthews"} <= found["scores"].keys()
    rows = (config.out / "predictions-hold_out.tsv").read_text().splitlines()[1:]
    assert {int(row.split("\t")[0]) for row in rows} == aside
    again = finetune.read(replace(config, seed=7))
    assert again == job  # the same for all seeds


def test_early_stopping_keeps_the_best_epoch(cola, tmp_path):
    """There is nothing to learn here, so that a later epoch is soon no better."""
    (tmp_path / "STS-B").mkdir()
    text = Texts()
    for split in ("train", "dev"):
        rows = "".join(f"{i}\tg\tf\ty\to\ts\ts\t{text(1)}\t{text(0)}\t{i * 7 % 5}\n" for i in range(80))
        (tmp_path / "STS-B" / f"{split}.tsv").write_text(STSB + rows)
    config = replace(cola, task="stsb", data=tmp_path, hold_out=0.3, early_stopping=2, epochs=30.0)
    found = finetune.train(config)
    curve = [entry["eval_score"] for entry in found["curve"] if "eval_score" in entry]
    assert found["steps"] == len(curve) * 7 and len(curve) == 3 + np.argmax(curve) < 30  # two epochs after the best
    assert found["scores"]["hold_out_score"] == max(curve) > curve[-1]
    with pytest.raises(ValueError, match=r"early_stopping .* hold_out = 0; pass --hold-out 0.1"):
        finetune.train(replace(cola, early_stopping=2, out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_gradient_accumulation_does_not_scale_the_loss(cola, tmp_path):
    found = finetune.train(replace(cola, batch_size=2, gradient_accumulation=4, lr=1e-9))
    assert found["steps"] == 12
    assert [entry["loss"] for entry in found["curve"] if "loss" in entry] == [pytest.approx(np.log(2), abs=0.1)] * 2


@pytest.mark.slow
def test_two_processes_train_one_model(bert, data, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    program = [sys.executable, "-c", "from nystrom.cli import main; main()", "finetune", "glue", "--task", "cola"]
    program += ["--model", bert, "--data", data, *FLAGS, "--batch-size", "4", "--lr", "1e-9", "--predict"]
    program += ["--attention", "nystrom", "--seeds", "0", "1", "--out", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("96 examples to train on") == done.stdout.count("Wrote run") == 1
    assert "over 2 seeds" in done.stdout
    found = metrics(tmp_path / "run" / "seed-1")
    assert found["steps"] == 12 and found["examples"] == {"train": 96, "dev": 32}
    assert found["scores"]["loss"] == pytest.approx(np.log(2), abs=0.1)
    assert len(predictions(tmp_path / "run" / "seed-0" / "predictions-dev.tsv")) == 32
    assert len((tmp_path / "run" / "seed-0" / "CoLA.tsv").read_text().splitlines()) == 10
    assert len(list((tmp_path / "run").rglob("events.out.tfevents.*"))) == 2


@pytest.mark.slow
def test_two_processes_learn_what_one_does(data, tmp_path):
    """With as many examples a step, launched by accelerate."""
    torch.manual_seed(0)
    still = BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    BertForMaskedLM(still).save_pretrained(tmp_path / "bert")
    words_only().save_pretrained(tmp_path / "bert")
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--no_python"]
    program = [sys.executable, "-c", "from nystrom.cli import main; main()", "finetune", "glue", "--task", "cola"]
    program += [
        "--model",
        "bert",
        "--data",
        data,
        *FLAGS,
        "--batch-size",
        "4",
        "--attention",
        "nystrom",
        "--out",
        "two",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chosen = {**FAST, "attention": "nystrom", "batch_size": 8}
    finetune.train(Glue(task="cola", model=str(tmp_path / "bert"), data=data, out=tmp_path / "one", **chosen))
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    curves = [[entry["loss"] for entry in found["curve"] if "loss" in entry] for found in (one, two)]
    assert one["steps"] == two["steps"] and curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert two["scores"]["loss"] == pytest.approx(one["scores"]["loss"], rel=1e-3)


# What is refused, before anything is written


def test_an_earlier_run_is_not_written_over(cola):
    cola.out.mkdir()
    (cola.out / "thesis.txt").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"run: exists and is not an empty folder; pass another --out, or --resume"
    ):
        finetune.train(replace(cola, model="nowhere"))  # told before the model is looked for
    with pytest.raises(FileNotFoundError, match=r"run: no run to resume \(run.json is missing\)"):
        finetune.train(replace(cola, resume=True))
    assert [path.read_text() for path in cola.out.rglob("*")] == ["mine"]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file/run", r"file is not a folder; pass another --out"),
        ("file", r"exists and is not an empty folder"),
        ("/proc/run", r"/proc/run: cannot be written: .*; pass another --out"),
    ],
)
def test_an_out_that_cannot_be_written_is_refused(place, said, cola, tmp_path):
    if place.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("there is no /proc here")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=said):
        finetune.train(replace(cola, out=tmp_path / place))
    assert (tmp_path / "file").read_bytes() == b""


def spoilt(data: Path, tmp_path: Path, name: str, line: int, content: str) -> Path:
    """A copy of the data in which a file has this line (counted from 1)."""
    shutil.copytree(data, tmp_path / "data")
    lines = (tmp_path / "data" / name).read_text().splitlines()
    lines[line - 1] = content
    (tmp_path / "data" / name).write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("task", "name", "line", "content", "said"),
    [
        ("cola", "CoLA/train.tsv", 7, "gj04\t1\tThe text", r"CoLA/train.tsv: every row has 4 columns .* line 7 has 3"),
        ("cola", "CoLA/dev.tsv", 9, "gj04\t2\t\tThe text", r"CoLA/dev.tsv, line 9: label '2' is none of '0', '1'"),
        (
            "stsb",
            "STS-B/dev.tsv",
            3,
            "1\tg\tf\ty\to\ts\ts\ta\tb\t6",
            r"STS-B/dev.tsv, line 3: score '6' is outside 0 to 5",
        ),
        ("mrpc", "MRPC/train.tsv", 1, "Quality\t#1 ID\t#2 ID\t#1 String\tX", r"MRPC/train.tsv: no column '#2 String'"),
        ("csv", "train.csv", 4, "a text,other,,1", r"train.csv, line 4: column 'kind' is empty"),
        (
            "csv",
            "dev.csv",
            5,
            "a text,other,third good,1",
            r"dev.csv, line 5: label 'third good' is none of 'both bad'",
        ),
        ("csv", "dev.csv", 1, "text,other,sort,value", r"dev.csv, line 2: no column 'kind'"),
        ("imdb", "aclImdb/test/neg/3_1.txt", 1, "", r"aclImdb/test/neg/3_1.txt: this review is empty"),
    ],
)
def test_bad_data_are_refused(task, name, line, content, said, bert, data, tmp_path):
    spoilt_data = spoilt(data, tmp_path, name, line, content)
    base = {**FAST, "model": str(bert), "out": tmp_path / "run"}
    tables = {"train": spoilt_data / "train.csv", "eval": spoilt_data / "dev.csv", "text_column": "text"}
    config = {
        "csv": lambda: Csv(**base, **tables, label_column="kind"),
        "imdb": lambda: Imdb(**base, data=spoilt_data / "aclImdb"),
    }.get(task, lambda: Glue(**base, task=task, data=spoilt_data))()
    with pytest.raises(ValueError, match=said):
        finetune.train(config)
    assert not config.out.exists()


def test_a_refusal_is_one_line_and_exits_with_2(bert, data, tmp_path):
    spoilt_data = spoilt(data, tmp_path, "CoLA/train.tsv", 7, "gj04\t1\tThe text")
    arguments = ["--task", "cola", "--model", bert, "--data", spoilt_data, "--out", tmp_path / "run"]
    running = command("finetune", "glue", *arguments)
    printed, said = running.communicate()
    assert running.returncode == 2 and printed == ""
    assert said.startswith("nystrom: ") and "line 7 has 3" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"length": 65}, r"at most the 64 tokens .*/bert reads: got 65; .* nystrom convert .*/bert OUT --length 65"),
        ({"length": 2}, r"length must be at least 3: got 2"),
        ({"lr": float("nan")}, r"lr must be positive and finite: got nan"),
        ({"seed": 2**32}, r"a seed must be at least 0 and below 2\*\*32: got 4294967296"),
        ({"seeds": (1, 1)}, r"seeds must differ: got 1, 1"),
        ({"hold_out": 1.0}, r"hold_out must be at least 0 and below 1: got 1.0"),
        (
            {"task": "stsb", "eval_examples": 1},
            r"pearson and spearman need two examples or more: got 1 in the dev set",
        ),
        ({"hold_out": 0.999}, r"hold_out 0.999 of 96 training examples leaves none to train on"),
        ({"train_examples": 97}, r"the train set has 96 examples: asked for 97"),
        ({"precision": "float16"}, r"precision float16 needs a GPU"),
        ({"num_landmarks": 0}, r"num_landmarks must be an integer of at least 1: got 0"),
        ({"model": "./nowhere"}, r"\./nowhere: no such folder"),
        ({"tokenizer": "/nowhere"}, r"/nowhere: no such folder"),
    ],
)
def test_settings_out_of_range_are_refused(changes, said, cola):
    if changes.get("precision") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises((ValueError, OSError), match=said):
        finetune.train(replace(cola, attention="nystrom", **changes))
    assert not cola.out.exists()


def test_our_own_model_has_other_settings(cola, own):
    with pytest.raises(ValueError, match=r"exact_below is no setting of a Nyströmformer of ours: got 0; leave it out"):
        finetune.train(replace(cola, model=str(own)))
    with pytest.raises(ValueError, match=r"64 tokens .* got 65; .* nystrom pretrain --init .*/own --length 65"):
        finetune.train(replace(cola, model=str(own), exact_below=None, length=65))


def model_folder(folder: Path, bert: Path, change: str) -> Path:
    """A folder that is no model to start from."""
    shutil.copytree(bert, folder)
    if change == "larger tokenizer":
        tokenizer = words_only()
        tokenizer.add_tokens([f"new{i}" for i in range(30)])
        tokenizer.save_pretrained(folder)
    elif change == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif change == "no padding":
        PreTrainedTokenizerFast(tokenizer_object=words_only().backend_tokenizer).save_pretrained(folder)
    elif change == "no config":
        (folder / "config.json").unlink()
    elif change == "damaged weights":
        (folder / "model.safetensors").write_bytes(weights(folder)[:5000])
    elif change == "other weights":
        BertForMaskedLM(BertConfig(**SIZES | {"num_hidden_layers": 1})).save_pretrained(folder / "one")
        (folder / "one" / "model.safetensors").replace(folder / "model.safetensors")
    else:
        GPT2Model(
            GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=3)
        ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("larger tokenizer", r"the tokenizer has 59 tokens, and .*/model knows 40; pass the model's own"),
        ("no tokenizer", r"model: no tokenizer in this folder; pass --tokenizer"),
        ("no padding", r"model: this tokenizer has no padding token"),
        ("no config", r"model/config.json: no such file; is .*/model a Hugging Face model's folder"),
        ("damaged weights", r"model: its weights cannot be read, or do not fit config.json"),
        ("other weights", r"model: weights of the encoder are missing, .*: bert.encoder.layer.1"),
        ("decoder", r"GPT2ForSequenceClassification is causal"),
    ],
)
def test_a_folder_that_is_no_encoder_is_refused(change, said, bert, cola, tmp_path):
    folder = model_folder(tmp_path / "model", bert, change)
    with pytest.raises((ValueError, OSError), match=said):
        finetune.train(replace(cola, model=str(folder)))
    assert not cola.out.exists()


def test_divergence_is_an_error(cola):
    with pytest.raises(ValueError, match=r"training has diverged: the model answers NaN or infinity; lower --lr"):
        finetune.train(replace(cola, lr=1e30, train_examples=32))
    assert not (cola.out / "metrics.json").exists()


# Before the run


def test_a_dry_run_writes_nothing(cola, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    finetune.run(replace(cola, dry_run=True, attention="nystrom"))
    assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr().out
    assert "96 examples to train on" in said and "attention nystrom" in said
    assert "minutes of training" in said and "MiB of memory" in said


@pytest.mark.parametrize("task", ["glue", "imdb", "csv"])
def test_help_is_worth_reading(task, capsys):
    with pytest.raises(SystemExit):
        cli.run(["finetune", task, "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for phrase in ("--model STR", "Landmarks per head (count)", "--seeds [INT", "Peak learning rate"):
        assert phrase in shown
    own = {"glue": "--predict", "imdb": "(default: 512)", "csv": "--text-column STR"}
    assert own[task] in shown
