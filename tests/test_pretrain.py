"""Pretraining end to end: what a run leaves, resuming after a kill, every kind of input, and what is refused."""

import gzip
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    PerceiverTokenizer,
)

import nystrom.hf  # noqa: F401  # tells the Auto classes of our models
from nystrom.recipes import fill_mask
from nystrom.recipes.pretrain import Pretrain, plan, prepare, train
from ranks import kill_rank, torchrun

PROGRAM = (sys.executable, "-c", "from nystrom.cli import main; main()", "pretrain")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}
SIZES = dict(embed_dim=16, num_layers=1, num_heads=2, ffn_dim=32, num_landmarks=8, conv_kernel_size=5)
SHORT = dict(length=64, steps=4, eval_steps=2, batch_size=2, eval_blocks=6, precision="float32")
TINY = {**SIZES, **SHORT}


def flags(**settings) -> list[str]:
    return [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), str(value))]


def pretrain(*arguments: str | Path, **settings) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, *map(str, arguments), *flags(**settings)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def metrics_of(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"The {i} quick brown foxes jump over the lazy dog.\n" * 20)
    return folder


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    done = pretrain("--data", corpus, "--out", out, **TINY)
    assert done.returncode == 0, done.stderr
    assert f"{out}: held-out loss" in done.stdout
    return out


@pytest.fixture(scope="module")
def words(corpus, tmp_path_factory) -> Path:
    """A folder with a WordPiece tokenizer."""
    folder = tmp_path_factory.mktemp("words")
    letters = [c for c in "abcdefghijklmnopqrstuvwxyz0123456789."]
    entries = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "fox",
        "##es",
        *letters,
        *("##" + c for c in letters),
    ]
    (folder / "vocab.txt").write_text("\n".join(entries))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_a_run_leaves_its_model_and_its_numbers(trained):
    metrics = metrics_of(trained)
    assert metrics["task"] == "pretrain" and metrics["attention"] == "nystrom" and metrics["seed"] == 0
    assert metrics["score"] == {"name": "masked accuracy", "value": metrics["scores"]["accuracy"]}
    assert 0 <= metrics["score"]["value"] <= 1
    assert metrics["scores"]["perplexity"] == pytest.approx(math.exp(metrics["scores"]["loss_nats"]))
    assert metrics["examples"]["eval"] == metrics["held_out"]["blocks"] == 6 and metrics["steps"] == 4
    assert metrics["tokens"] == 4 * 2 * 64
    assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / metrics["seconds"])
    assert [e["step"] for e in metrics["curve"] if "loss" in e] == [1, 2, 3, 4]
    assert [e["step"] for e in metrics["curve"] if "eval_score" in e] == [2, 4]
    run = json.loads((trained / "run.json").read_text())
    assert run["recipe"] == "pretrain" and run["environment"]["packages"]["torch"] == torch.__version__
    assert run["config"]["length"] == 64 and run["config"]["lr"] == 2e-3 and run["config"]["tokenizer"] == "bytes"
    assert (trained / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list(trained.glob("runs/*/events.out.tfevents.*"))
    model, info = AutoModelForMaskedLM.from_pretrained(trained, output_loading_info=True)
    assert not any(info.values()) and model.num_parameters() == metrics["parameters"]
    assert model.config.max_position_embeddings == 64 and model.config.norm_first
    tokens = torch.randint(262, (1, 64))
    assert math.log(262) / 2 < torch.nn.functional.cross_entropy(model(tokens).logits[0], tokens[0]).item() < 20


def kill(out: Path, moment: Callable[[], bool], *arguments: str | Path, **settings) -> None:
    """Run until then, and kill it as no program can forestall."""
    command = [*PROGRAM, *map(str, arguments), *flags(**settings), "--out", str(out)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 200
    while not moment() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_a_killed_run_ends_as_if_never_interrupted(corpus, tmp_path):
    """Killed before the first checkpoint and while one is written; another is left half-written. The data, some 63
    batches, are read a second time in between.
    """
    settings = {**TINY, "steps": 100, "eval_steps": 20, "dropout": 0.2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = pretrain("--data", corpus, "--out", whole, "--sentence-order", **settings)
    assert done.returncode == 0, done.stderr
    arguments = ("--data", corpus, "--sentence-order")
    kill(cut, (cut / "run.json").is_file, *arguments, **settings)
    kill(cut, (cut / "checkpoint-60").exists, *arguments, "--resume", **settings)
    assert not (cut / "metrics.json").exists()
    shutil.copytree(cut / "checkpoint-40", cut / "checkpoint-80")
    (cut / "checkpoint-80" / "complete").unlink()
    (cut / "checkpoint-80" / "model.safetensors").write_bytes(b"half")
    done = pretrain(*arguments, "--out", cut, "--resume", **settings)
    assert done.returncode == 0, done.stderr
    assert weights(cut) == weights(whole)
    (a, b) = map(metrics_of, (whole, cut))
    assert a["scores"] == b["scores"] and a["steps"] == b["steps"] and a["tokens"] == b["tokens"]
    losses = [[{k: v for k, v in e.items() if k != "seconds"} for e in metrics["curve"]] for metrics in (a, b)]
    assert losses[0] == losses[1]


def test_a_run_killed_after_its_last_checkpoint_ends_too(corpus, tmp_path):
    """Then there is nothing to train, and no step too many is taken."""
    out = tmp_path / "run"
    train(Pretrain(data=(corpus,), out=out, **TINY))
    before = metrics_of(out), weights(out)
    (out / "model.safetensors").write_bytes(b"half")
    (out / "metrics.json").unlink()
    train(Pretrain(data=(corpus,), out=out, resume=True, **TINY))
    assert (metrics_of(out), weights(out)) == before and before[0]["steps"] == 4


def test_two_processes_train_one_model(corpus, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*launch, *PROGRAM, "--data", str(corpus), "--out", "run", *flags(**TINY)]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss") == 1
    checkpoint = tmp_path / "run" / "checkpoint-4"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["train_batch_size"] == 2 and len(list(checkpoint.glob("rng_state_*.pth"))) == 2
    metrics = metrics_of(tmp_path / "run")
    assert metrics["held_out"]["blocks"] == 6 and metrics["tokens"] == 2 * 4 * 2 * 64
    fill_mask.load(tmp_path / "run")


LEARNING = {**TINY, "dropout": 0.0, "lr": 0.01, "steps": 8}


@pytest.fixture(scope="module")
def by_accelerate(corpus, tmp_path_factory) -> dict:
    """Two processes, each with its own part of the corpus."""
    out = tmp_path_factory.mktemp("accelerate") / "run"
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--no_python"]
    command = [*launch, *PROGRAM, "--data", str(corpus), "--out", str(out), *flags(**LEARNING)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return metrics_of(out)


def losses(metrics: dict) -> list[float]:
    return [entry["loss"] for entry in metrics["curve"] if "loss" in entry]


def test_two_processes_learn_what_one_does(corpus, by_accelerate, tmp_path):
    """With as many blocks a step; each reads its own part of the corpus, so they are others."""
    train(Pretrain(data=(corpus,), out=tmp_path / "one", **{**LEARNING, "batch_size": 4}))
    one = metrics_of(tmp_path / "one")
    assert one["tokens"] == by_accelerate["tokens"]
    assert losses(by_accelerate) == pytest.approx(losses(one), rel=0.02) and losses(one)[-1] < 0.9 * losses(one)[0]
    assert by_accelerate["held_out"]["loss_nats"] == pytest.approx(one["held_out"]["loss_nats"], rel=0.02)


def test_processes_that_share_each_block_count_as_one(corpus, by_accelerate, tmp_path):
    """Two rows of two: the same blocks as two processes have, a half each, and the same losses."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "--no-python"]
    command = [*launch, *PROGRAM, "--data", str(corpus), "--out", "run", "--sequence-processes", "2"]
    done = subprocess.run([*command, *flags(**LEARNING)], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = metrics_of(tmp_path / "run")
    assert found["tokens"] == by_accelerate["tokens"] and found["held_out"]["blocks"] == 6
    assert losses(found) == pytest.approx(losses(by_accelerate), rel=1e-4)
    for name, value in by_accelerate["scores"].items():
        assert found["scores"][name] == pytest.approx(value, rel=1e-4), name
    fill_mask.load(tmp_path / "run")


def launch(corpus: Path, out: Path, *options: str, **settings) -> subprocess.Popen:
    return torchrun([*PROGRAM, "--data", str(corpus), *flags(**settings), "--out", str(out)], *options)


MANY = {**TINY, "steps": 60, "eval_steps": 20, "dropout": 0.2}


@pytest.fixture(scope="module")
def by_two(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two") / "run"
    process = launch(corpus, out, **MANY)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    return out


@pytest.mark.parametrize("rank", ["0", "1"])
def test_torchrun_begins_a_run_again_from_its_last_checkpoint(corpus, by_two, tmp_path, rank):
    out = tmp_path / "run"
    process = launch(corpus, out, "--max-restarts", "1", **MANY)
    kill_rank(process, (out / "checkpoint-20" / "complete").is_file, rank)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    abouts = [json.loads((folder / "run.json").read_text()) for folder in (out, by_two)]
    assert [len(about.get("resumed", [])) for about in abouts] == [1, 0]
    assert weights(out) == weights(by_two)
    assert metrics_of(out)["steps"] == 60


def test_a_rank_that_is_killed_stops_the_others_with_an_error(corpus, tmp_path):
    process = launch(corpus, tmp_path / "run", **{**MANY, "steps": 100_000})
    kill_rank(process, (tmp_path / "run" / "checkpoint-20" / "complete").is_file, "1")
    start = time.monotonic()
    _, told = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - start < 60
    assert "exitcode" in told and "-9" in told and "local_rank: 1" in told
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_held_out_loss_is_a_mean_over_tokens(corpus, tmp_path):
    """However the blocks, of unequal length, fall into batches. One step at a vanishing rate leaves equal weights."""
    losses = []
    for batch_size in (1, 6):
        settings = {**TINY, "steps": 1, "lr": 1e-30, "length": 512, "batch_size": batch_size}
        done = train(Pretrain(data=(corpus,), out=tmp_path / str(batch_size), **settings))
        losses.append(done["held_out"]["loss_nats"])
    assert abs(losses[0] - losses[1]) < 1e-5


@pytest.mark.parametrize("attention", ["softmax", "nystrom_shift", "nystrom_residual"])
def test_twins_train(corpus, tmp_path, attention):
    changes = {**TINY, "steps": 1, "conv_kernel_size": None, "gradient_accumulation": 2, "schedule": "linear"}
    changes |= {"num_landmarks": None if attention == "softmax" else 8}
    metrics = train(Pretrain(data=(corpus,), out=tmp_path, attention=attention, **changes))
    assert metrics["attention"] == attention and metrics["tokens"] == 2 * 2 * 64
    model, _ = fill_mask.load(tmp_path)
    assert model.config.attention == {"softmax": "exact"}.get(attention, attention.removeprefix("nystrom_"))
    assert not any("conv" in name for name in model.state_dict())


def test_order_and_whole_words_of_every_kind_of_file(words, tmp_path):
    texts = [f"The {i} quick foxes jump. Over the lazy dog they go.\nOn it goes. And on." for i in range(30)]
    data = tmp_path / "data"
    data.mkdir()
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    (data / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(pyarrow.table({"body": texts[::-1]}), data / "b.parquet")
    (data / "c.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    config = Pretrain(
        **{**TINY, "length": 40},
        **dict(data=(data,), text_field="body", out=tmp_path / "run", tokenizer=str(words)),
        **dict(sentence_order=True, whole_words=True),
    )
    metrics = train(config)
    assert 0 <= metrics["scores"]["sentence_order_accuracy"] <= 1
    assert metrics["train"]["files"] == 3 and metrics["train"]["bytes"] > 2 * sum(map(len, texts))
    assert "sentence_order_accuracy" in json.dumps(metrics_of(tmp_path / "run")["curve"])
    model, info = AutoModelForPreTraining.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not any(info.values()) and model.config.sentence_order
    filled = fill_mask.fill(*fill_mask.load(tmp_path / "run"), "the [MASK] foxes jump.")
    assert filled.text.startswith("the") and filled.text.endswith("jump.")  # no [CLS] nor [SEP] about it


def test_a_dataset_is_trained_on(tmp_path):
    for name in ("train", "validation"):
        rows = {"text": [f"Row {i} of {name}, with some more words." * 3 for i in range(20)]}
        (tmp_path / "set").mkdir(exist_ok=True)
        parquet.write_table(pyarrow.table(rows), tmp_path / "set" / f"{name}.parquet")
    names = dict(dataset=str(tmp_path / "set"), dataset_eval_split="validation")
    metrics = train(Pretrain(**names, out=tmp_path / "run", packing="documents", **TINY))
    assert metrics["train"]["files"] == 1 and metrics["held_out"]["blocks"] == 6
    with pytest.raises(ValueError, match=r"held-out text of 0 blocks is too short .* --dataset-eval-split"):
        train(Pretrain(dataset=names["dataset"], out=tmp_path / "other", **TINY))


def test_a_run_is_gone_on_with_at_a_longer_length(trained, corpus, tmp_path, capsys):
    config = Pretrain(init=trained, data=(corpus,), out=tmp_path, sentence_order=True, **{**SHORT, "length": 96})
    before, _ = fill_mask.load(trained)
    resolved, tokenizer, model = prepare(config)
    assert "run: new, untrained weights: pooler.bias, pooler.weight, sentence_order.bias" in capsys.readouterr().out
    assert resolved.embed_dim == 16 and resolved.conv_kernel_size == 5 and resolved.attention == "nystrom"
    ids = torch.randint(6, 262, (1, 64))
    torch.testing.assert_close(model.eval()(ids).prediction_logits, before(ids).logits)
    metrics = train(config)
    assert 0 < metrics["tokens"] <= 4 * 2 * 96
    model, tokenizer = fill_mask.load(tmp_path)
    assert model.config.max_position_embeddings == 96 == tokenizer.model_max_length
    for positions, last in (("tile", 31), ("interpolate", 63)):
        (*_, longer) = prepare(Pretrain(init=trained, positions=positions, length=96))
        tables = [m.nystromformer.encoder.embeddings.position.weight[2:] for m in (longer, before)]
        torch.testing.assert_close(tables[0][95], tables[1][last])


def test_bert_is_gone_on_with(words, corpus, tmp_path):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=82)
    BertForMaskedLM(BertConfig(**sizes, max_position_embeddings=32)).save_pretrained(words)
    changes = {**SHORT, "length": None, "steps": 1}
    metrics = train(Pretrain(init=words, data=(corpus,), out=tmp_path, conv_kernel_size=7, num_landmarks=4, **changes))
    assert metrics["attention"] == "nystrom" and metrics["tokens"] == 2 * 32
    assert fill_mask.load(tmp_path)[0].config.conv_kernel_size == 7
    filled = fill_mask.fill(*fill_mask.load(words), "the [MASK] fox")  # nor need it be a model of ours
    assert filled.text.startswith("the") and filled.text.endswith("fox")


def test_a_dry_run_tells_and_writes_nothing(corpus, tmp_path):
    done = pretrain("--data", corpus, "--out", tmp_path / "run", "--dry-run", **TINY)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    parameters, memory, minutes = done.stdout.splitlines()
    assert parameters == "8,112 parameters, attention nystrom"
    assert "weights, gradients and the moments of AdamW" in memory and "(an estimate)" in memory
    assert "minutes for 4 steps of" in minutes


def test_memory_grows_with_the_length(corpus, tmp_path):
    """Linearly: what is kept for the backward pass is counted from the tensors."""
    kept = {}
    for length in (64, 512):
        (_, memory, _) = plan(Pretrain(data=(corpus,), **{**TINY, "length": length, "embed_dim": 64, "ffn_dim": 256}))
        kept[length] = float(memory.split(", ")[-1].split()[0].replace(",", ""))
    assert 4 < kept[512] / kept[64] < 16


def test_fill_mask_fills(trained):
    command = [*PROGRAM[:-1], "fill-mask", "--model", str(trained), "--top-k", "2", "--text"]
    text = "The [MASK] quick brown f[MASK]xes"
    done = subprocess.run([*command, text], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line, *candidates = done.stdout.splitlines()
    assert line.startswith("The ") and len(line) == len("The 1 quick brown foxes")
    assert [c.split(":")[0] for c in candidates] == ["  mask 1", "  mask 2"]
    assert all(c.count("%") == 2 for c in candidates)


def test_filled_line_takes_the_likeliest_tokens(trained):
    model, tokenizer = fill_mask.load(trained)
    filled = fill_mask.fill(model, tokenizer, "ab[MASK]d", top_k=262)
    assert abs(sum(p for _, p in filled.candidates[0]) - 1) < 1e-4
    assert filled.text == f"ab{filled.candidates[0][0][0]}d"


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(conv_kernel_size=4), "conv_kernel_size must be odd"),
        (dict(embed_dim=15), "embed_dim must be a positive multiple of num_heads"),
        (dict(num_landmarks=0), "num_landmarks must be an integer of at least 1"),
        (dict(dropout=1.0), r"dropout_p must be in \[0, 1\): got 1.0"),
        (dict(steps=0), "steps must be at least 1: got 0"),
        (dict(gradient_accumulation=0), "gradient_accumulation must be at least 1: got 0"),
        (dict(length=1), "length must be at least 2: got 1"),
        (dict(length=7, sentence_order=True), "length must be at least 8: got 7"),
        (dict(lr=-1.0), "lr must be positive and finite: got -1.0"),
        (dict(lr=math.nan), "lr must be positive and finite: got nan"),
        (dict(sequence_processes=0), "sequence_processes must be at least 1: got 0"),
        (dict(sequence_processes=2), "sequence_processes must divide the number of processes: got 2 for 1; start"),
        (dict(sequence_processes=2, dry_run=True), "dry_run is of one process: got sequence_processes 2; leave it out"),
        (dict(warmup=1.5), r"warmup must be in \[0, 1\]: got 1.5"),
        (dict(mask_probability=0.0), "mask_probability must be above 0 and at most 1: got 0.0"),
        (dict(sentence_order=True, packing="stream"), "packing is settled by sentence_order, .*: got stream"),
        (dict(dataset="x"), "dataset takes the place of data, eval_data and encoding: got x beside them"),
        (dict(dataset="x", data=(), encoding="latin-1"), "dataset takes the place of data, eval_data and encoding"),
        (dict(dataset_split="test"), "dataset_split is read beside dataset alone: got test without it; leave it out"),
        (dict(positions="interpolate"), "positions is read beside init alone: got interpolate without it"),
        (dict(init="trained", positions="interpolate"), "positions is of a length above the model's own: got inter"),
        (dict(attention="softmax", num_landmarks=8), "attention softmax reads no num_landmarks: got 8; leave it out"),
        (dict(text_field="body"), "text_field is of .jsonl and .parquet files, and there are none: got body; leave"),
        (dict(data=("rows.jsonl",), encoding="latin-1"), "encoding is of text files, and there are none: got latin-1"),
        (dict(init="nowhere"), "nowhere/config.json: no such file; is nowhere a model's folder"),
        (dict(init="mute"), "mute: no tokenizer in this folder; pass --tokenizer"),
        (dict(init="mute", tokenizer="wide"), "wide has 270 tokens, and the model of mute knows 262"),
        (dict(init="trained", num_heads=4), "num_heads is 2 in .*run: got 4; leave it out"),
        (dict(init="trained", conv_kernel_size=None), "conv_kernel_size is 5 in .*run: got None; leave it out"),
        (dict(eval_data=("fine.txt",)), "must share no file: both hold .*fine.txt"),
        (dict(eval_data=("one.txt",)), "too short to mask a token"),
        (dict(data=("empty.txt",)), "empty.txt: empty file"),
        (dict(data=("bad.jsonl",)), "bad.jsonl, line 2: not JSON"),
        (
            dict(data=("latin.txt",)),
            "latin.txt: not UTF-8 text: .* at offset 3; convert it, or pass --encoding latin",
        ),
        (dict(resume=True), "run: no run to resume"),
        (dict(out="fine.txt"), "fine.txt: exists and is not an empty folder"),
        (dict(out="fine.txt/run"), "fine.txt"),
    ],
)
def test_refusals_name_the_cause_and_write_nothing(tmp_path, trained, monkeypatch, settings, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "fine.txt").write_text("words " * 500)
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text\n')
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    shutil.copytree(trained, tmp_path / "mute", ignore=shutil.ignore_patterns("token*", "special*", "*-*"))
    wide = PerceiverTokenizer()
    wide.add_tokens([f"<{i}>" for i in range(8)])
    wide.save_pretrained(tmp_path / "wide")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    changes = {"data": ("fine.txt",), "out": "run", **settings}
    for name in ("data", "eval_data"):
        changes[name] = tuple(map(Path, changes.get(name, ())))
    if "init" in changes:
        sizes, changes["init"] = {}, trained if changes["init"] == "trained" else Path(changes["init"])
    else:
        sizes = SIZES
    with pytest.raises((ValueError, OSError), match=message):
        train(Pretrain(**{**sizes, **SHORT, **changes, "out": Path(changes["out"])}))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.unhooked
def test_a_run_is_never_written_over_nor_changed(trained, corpus):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="exists and is not an empty folder; pass another --out, or --resume"):
        train(Pretrain(data=(corpus,), out=trained, **TINY))
    with pytest.raises(ValueError, match=r"a resumed run keeps its settings: lr was 0.002, is 0.5; pass"):
        train(Pretrain(data=(corpus,), out=trained, resume=True, lr=0.5, **TINY))
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


@pytest.mark.unhooked
def test_what_cannot_fill_masks_is_told(trained, tmp_path):
    model, tokenizer = fill_mask.load(trained)
    with pytest.raises(ValueError, match=r"at least one \[MASK\]: got 'plain'"):
        fill_mask.fill(model, tokenizer, "plain")
    with pytest.raises(ValueError, match="top_k must be between 1 and the vocabulary of 262: got 263"):
        fill_mask.fill(model, tokenizer, "[MASK]", top_k=263)
    with pytest.raises(ValueError, match="got 65, max_position_embeddings 64"):
        fill_mask.fill(model, tokenizer, "[MASK]" * 65)
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file; is .* a model's folder"):
        fill_mask.load(tmp_path)
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(trained / name, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights(trained)[:-100])
    with pytest.raises(ValueError, match=r"its weights cannot be read, or do not fit config\.json"):
        fill_mask.load(tmp_path)
    model.nystromformer.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare: no masked language model: it lacks decoder\.bias, norm\.bias"):
        fill_mask.load(tmp_path / "bare")
