"""The real command line, in a subprocess: every subcommand in a small form, and what it refuses."""

import ast
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nystrom.bench.error import Error
from nystrom.bench.front import Front
from nystrom.bench.memory import Memory
from nystrom.bench.plot import Plot
from nystrom.bench.speed import Speed
from nystrom.bench.synthetic import Synthetic
from nystrom.bench.table import Table
from nystrom.checkpoint import load_masked_lm
from nystrom.data.text import check_text, text_files
from nystrom.demo import Demo
from nystrom.recipes import fill_mask
from nystrom.recipes.fill_mask import FillMask
from nystrom.recipes.pretrain import Pretrain, collate, fixed_eval_set, load_tokenizer, make_mask

TINY = "--length 64 --steps 4 --eval-steps 2 --batch-size 2 --eval-blocks 6 --embed-dim 16 --num-layers 1 --num-heads 2"
TINY += " --ffn-dim 32 --num-landmarks 8 --conv-kernel-size 5"


def nystrom(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from nystrom.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"The {i} quick brown foxes jump over the lazy dog.\n" * 20)
    return folder


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    done = nystrom("pretrain", "--data", corpus, "--out", out, *TINY.split())
    assert done.returncode == 0, done.stderr
    assert f"{out}: held-out loss" in done.stdout
    return out


HELP = {
    (): ("Linear-cost attention", "pretrain", "fill-mask", "bench", "demo"),
    ("pretrain",): ("--length INT", "Tokens in a block", "(default: 2048)", "--resume"),
    ("demo",): ("--steps INT", "Training steps (count)."),
    ("fill-mask",): ("--text STR", "Text with at least one mask", "(required)"),
    ("bench",): ("speed", "memory", "error", "synthetic", "table", "plot", "front", "One JSON line per measurement"),
    ("bench", "speed"): ("--lengths [INT [INT ...]]", "--backward", "--peers", "The published comparison"),
}


@pytest.mark.parametrize(("command", "phrases"), HELP.items(), ids=["-".join(c) or "nystrom" for c in HELP])
def test_help_is_worth_reading(command, phrases):
    done = nystrom(*command, "--help")
    assert done.returncode == 0
    shown = " ".join(done.stdout.replace("│", " ").split())
    for phrase in phrases:
        assert phrase in shown, done.stdout


def test_every_flag_is_explained():
    """Each field of a command's dataclass is followed by its docstring, which is its help text."""
    commands = [Demo, Pretrain, FillMask, Speed, Memory, Error, Synthetic, Table, Plot, Front]
    for command in commands:
        (body,) = (
            node.body for node in ast.walk(ast.parse(inspect.getsource(command))) if isinstance(node, ast.ClassDef)
        )
        for field, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(following, ast.Expr), f"{command.__name__}: {ast.unparse(field)}"


def test_pretrain_writes_a_model_that_loads(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert 0 <= metrics["held_out"]["accuracy"] <= 1
    assert metrics["held_out"]["blocks"] == 6
    assert [e["step"] for e in metrics["curve"] if "loss" in e] == [1, 2, 3, 4]
    resolved = json.loads((trained / "pretrain.json").read_text())
    assert resolved["config"]["length"] == 64 and resolved["environment"]["packages"]["torch"] == torch.__version__
    assert list(trained.glob("runs/*/events.out.tfevents.*"))
    model = load_masked_lm(trained)
    assert model.encoder_config.max_length == 64 and not model.training
    tokens = torch.randint(262, (1, 64))
    assert math.log(262) / 2 < torch.nn.functional.cross_entropy(model(tokens).logits[0], tokens[0]).item() < 20


@pytest.mark.parametrize("steps", [4, 110])  # 8 files of about 1,000 bytes make some 63 batches
def test_same_seed_same_weights_and_resume_ends_there_too(steps, corpus, tmp_path):
    """Stopped within the first pass over the data, and within the second."""
    first, second = tmp_path / "first", tmp_path / "second"
    settings = [*TINY.replace("--steps 4", f"--steps {steps}").split(), "--dropout", "0.2"]
    settings[settings.index("--eval-steps") + 1] = str(steps * 3 // 4)
    for out in (first, second):
        done = nystrom("pretrain", "--data", corpus, "--out", out, *settings)
        assert done.returncode == 0, done.stderr
    weights = (first / "model.safetensors").read_bytes()
    assert (second / "model.safetensors").read_bytes() == weights
    for leftover in ("model.safetensors", "metrics.json"):  # as if killed after the first checkpoint
        (second / leftover).unlink()
    shutil.rmtree(second / f"checkpoint-{steps}")
    done = nystrom("pretrain", "--data", corpus, "--out", second, "--resume", *settings)
    assert done.returncode == 0, done.stderr
    assert (second / "model.safetensors").read_bytes() == weights


def test_two_processes_train_one_model(corpus, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    program = [sys.executable, "-c", "from nystrom.cli import main; main()", "pretrain", "--data", str(corpus)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *program, "--out", "run", *TINY.split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss") == 1
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert (
        state["train_batch_size"] == 2 and len(list((tmp_path / "run" / "checkpoint-4").glob("rng_state_*.pth"))) == 2
    )
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["held_out"]["blocks"] == 6
    load_masked_lm(tmp_path / "run")


def test_held_out_loss_is_a_mean_over_tokens(corpus, tmp_path):
    """However the blocks, of unequal length, fall into batches. One step at a vanishing rate leaves equal weights."""
    losses = []
    for batch_size in ("1", "6"):
        settings = [*TINY.replace("--steps 4", "--steps 1").split(), "--lr", "1e-30", "--length", "512"]
        settings[settings.index("--batch-size") + 1] = batch_size
        out = tmp_path / batch_size
        done = nystrom("pretrain", "--data", corpus, "--out", out, *settings)
        assert done.returncode == 0, done.stderr
        losses.append(json.loads((out / "metrics.json").read_text())["held_out"]["loss_nats"])
    assert abs(losses[0] - losses[1]) < 1e-5


def test_evaluation_spreads_over_the_held_out_files(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"{i} " * (50 if i else 5000))
    config = Pretrain(length=64, eval_blocks=10)
    spans = [check_text(path) for path in text_files([tmp_path])]
    masked, files = fixed_eval_set(config, load_tokenizer(config), spans)
    assert files == 5 and len(masked) == 10
    again, _ = fixed_eval_set(config, load_tokenizer(config), spans)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(masked, again, strict=True))


def test_softmax_twin_trains(corpus, tmp_path):
    done = nystrom("pretrain", "--data", corpus, "--out", tmp_path / "run", "--attention", "softmax", *TINY.split())
    assert done.returncode == 0, done.stderr
    assert load_masked_lm(tmp_path / "run").encoder_config.kind == "softmax"


def test_a_hugging_face_tokenizer_by_path(corpus, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["[UNK]", "[PAD]", "[SEP]", "[MASK]"]
    words.train([str(p) for p in corpus.iterdir()], trainers.WordLevelTrainer(special_tokens=names))
    special = dict(unk_token="[UNK]", pad_token="[PAD]", sep_token="[SEP]", mask_token="[MASK]")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path / "words")
    arguments = ("--data", corpus, "--out", tmp_path / "run", "--tokenizer", tmp_path / "words", *TINY.split())
    done = nystrom("pretrain", *arguments)
    assert done.returncode == 0, done.stderr
    assert load_masked_lm(tmp_path / "run").encoder_config.vocab_size == words.get_vocab_size()
    done = nystrom("fill-mask", "--model", tmp_path / "run", "--text", "The quick [MASK] foxes")
    assert done.returncode == 0 and done.stdout.startswith("The quick "), done.stderr


def test_masking_rates():
    """15 % chosen; of them 80 % masked, 10 % random, 10 % left: counted, within five standard errors."""
    tokenizer = load_tokenizer(Pretrain())
    mask = make_mask(Pretrain(), tokenizer)
    original = torch.randint(6, 262, (2000,))
    original[::10] = tokenizer.sep_token_id
    block = {"input_ids": original.numpy(), "special_tokens_mask": (original < 6).long().numpy()}
    batch = collate([mask(block, place) for place in range(100)])
    original = original.expand(100, -1)
    chosen = batch["labels"] != -100
    assert (batch["labels"] == original)[chosen].all()
    assert not chosen[:, ::10].any()
    assert (batch["input_ids"] == original)[~chosen].all()

    def close(part: torch.Tensor, of: torch.Tensor, rate: float) -> bool:
        count = int(of.sum())
        return abs(int((part & of).sum()) / count - rate) < 5 * (rate * (1 - rate) / count) ** 0.5

    eligible = torch.ones_like(chosen)
    eligible[:, ::10] = False
    assert close(chosen, eligible, 0.15)
    assert close(batch["input_ids"] == tokenizer.mask_token_id, chosen, 0.8 + 0.1 / 262)
    assert close(batch["input_ids"] == original, chosen, 0.1 + 0.1 / 262)
    assert "attn_mask" not in batch


def test_masks_depend_on_place_and_seed_alone():
    tokenizer = load_tokenizer(Pretrain())
    block = {"input_ids": torch.randint(6, 262, (500,)).numpy(), "special_tokens_mask": torch.zeros(500).numpy()}

    def draw(place: int, seed: int = 0) -> list[int]:
        return make_mask(Pretrain(seed=seed), tokenizer)(block, place)["labels"].tolist()

    state = torch.get_rng_state()
    assert draw(3) == draw(3)
    assert draw(3) != draw(4) and draw(3) != draw(3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_padding_is_masked_out_of_the_batch():
    examples = [{"input_ids": torch.arange(6, 6 + n), "labels": torch.arange(6, 6 + n)} for n in (50, 20)]
    batch = collate(examples)
    assert batch["attn_mask"].sum(1).tolist() == [50, 20]
    assert (batch["labels"][1, 20:] == -100).all()


def test_fill_mask_fills(trained):
    done = nystrom("fill-mask", "--model", trained, "--text", "The [MASK] quick brown f[MASK]xes", "--top-k", "2")
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


def test_bench_speed_writes_its_lines(tmp_path):
    out = tmp_path / "lines.jsonl"
    sizes = ("--lengths", "128", "130", "--heads", "2", "--num-landmarks", "16", "--rounds", "1", "--seconds", "0.01")
    for extra in ((), ("--backward",)):
        done = nystrom("bench", "speed", *sizes, "--out", out, *extra)
        assert done.returncode == 0, done.stderr
        assert "times nystrom" in done.stdout
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    at = {n: sorted(line["method"] for line in lines if line["n"] == n and not line["backward"]) for n in (128, 130)}
    assert at[128] == ["exact", "hf", "nystrom", "residual", "shift", "three_factor"]
    assert at[130] == ["exact", "nystrom", "residual", "shift"]  # the others need whole segments
    assert all(line["ms"] > 0 and {"commit", "packages", "processor"} <= line["environment"].keys() for line in lines)


def test_bench_memory_sees_the_stored_factors(tmp_path):
    """The plain form keeps n x m arrays: 8 heads x 8192 x 64 floats are 16 MiB each, ours keeps none."""
    out = tmp_path / "lines.jsonl"
    sizes = ("--lengths", "8192", "--heads", "8", "--head-dim", "16", "--forms", "nystrom", "three_factor")
    done = nystrom("bench", "memory", *sizes, "--threads", "1", "--out", out)
    assert done.returncode == 0, done.stderr
    extra = {line["method"]: line["extra_mib"] for line in map(json.loads, out.read_text().splitlines())}
    assert extra["three_factor"] > 16
    assert extra["nystrom"] < extra["three_factor"] / 4


def test_bench_synthetic_falls_with_landmarks(tmp_path):
    out = tmp_path / "lines.jsonl"
    arguments = ("--lengths", "128", "--landmarks", "4", "128", "--pinv-iters", "6", "30", "--heads", "2")
    done = nystrom("bench", "synthetic", *arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    steps = [line for line in lines if "what" not in line]
    error = {(line["num_landmarks"], line["num_pinv_iters"]): line["relative_error"] for line in steps}
    assert error[128, 30] < 1e-8 < error[128, 6] < error[4, 6]
    kinds = {(line["method"], line["num_landmarks"]): line["relative_error"] for line in lines if "what" in line}
    assert kinds["published", 4] == error[4, 6]
    assert len({kinds[kind, 4] for kind in ("published", "chebyshev", "ridge", "svd", "strided", "kmeans")}) == 6
    assert "by kind" in done.stdout


def test_demo_runs_in_small(tmp_path):
    done = nystrom("demo", "--steps", "5", "--length", "256", "--lengths", "256", "512", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("loss.png", "cost.png"):
        assert (tmp_path / "demo" / name).read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert [row["n"] for row in numbers["cost"]] == [256, 512]
    accuracy = numbers["training"]["held_out"]["accuracy"]
    assert f"{accuracy:6.1%}" in done.stdout
    assert f"{numbers['filled']['right']} of {numbers['filled']['masks']} right" in done.stdout
    assert load_masked_lm(tmp_path / "demo" / "model").encoder_config.kind == "nystrom"


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pretrain", "--data", "nowhere"), "nowhere: no such file or folder"),
        (("pretrain", "--data", "binary.bin"), "binary.bin: not a text file: NUL byte at offset 1"),
        (("pretrain", "--data", "empty.txt"), "empty.txt: empty file"),
        (("pretrain", "--data", "fine.txt", "--conv-kernel-size", "4"), "conv_kernel_size must be odd"),
        (("pretrain", "--data", "fine.txt", "--embed-dim", "30"), "embed_dim must be a positive multiple of num_heads"),
        (("pretrain", "--data", "fine.txt", "--num-landmarks", "0"), "num_landmarks must be an integer of at least 1"),
        (("pretrain", "--data", "fine.txt", "--dropout", "1"), "dropout_p must be in [0, 1): got 1.0"),
        (("pretrain", "--data", "fine.txt", "--steps", "0"), "steps must be at least 1: got 0"),
        (("pretrain", "--data", "fine.txt", "--lr", "-1"), "lr must be positive: got -1.0"),
        (("pretrain", "--data", "fine.txt", "--mask-probability", "0"), "mask_probability must be above 0"),
        (("pretrain", "--data", "fine.txt", "--eval-data", "fine.txt"), "must share no file: both hold"),
        (("pretrain", "--data", "fine.txt", "--eval-data", "one.txt"), "too short to mask a token"),
        (("pretrain", "--data", "fine.txt", "--resume"), "run: no checkpoint to resume from"),
        (("pretrain", "--data", "fine.txt", "--lenght", "64"), "--lenght"),
        (("pretrain", "--data", "fine.txt", "--leng", "64"), "--leng"),
        (("bench", "speed", "--forms", "nystorm"), "--forms"),
        (("bench", "speed", "--lengths", "0"), "lengths must be at least 1: got (0,)"),
        (("bench", "memory", "--threads", "0"), "threads must be at least 1: got 0"),
        (("bench", "synthetic", "--smoothness", "2"), "smoothness must be in [0, 1): got 2.0"),
        (("bench", "table", "--lines", "empty.txt"), "empty.txt: holds no measurement"),
        (("demo", "--length", "64"), "length must be at least 256"),
        (("demo", "--out", "mine"), "mine/model: exists, and not from a demo"),
        (("fill-mask", "--model", "nowhere", "--text", "[MASK]"), "nowhere/config.json: no such file"),
    ],
)
def test_refusals_name_the_cause_and_write_nothing(tmp_path, arguments, message):
    (tmp_path / "binary.bin").write_bytes(b"\x7f\0ELF")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "fine.txt").write_text("words " * 500)
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "mine" / "model").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    done = nystrom(*arguments, *(("--out", "run") if arguments[0] == "pretrain" else ()), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.unhooked
def test_an_earlier_run_is_never_written_over(trained, corpus):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    done = nystrom("pretrain", "--data", corpus, "--out", trained, *TINY.split())
    assert done.returncode == 2
    assert "exists and is not an empty folder; pass another --out, or --resume" in " ".join(done.stderr.split())
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


@pytest.mark.unhooked
def test_resuming_keeps_the_settings(trained, corpus):
    done = nystrom("pretrain", "--data", corpus, "--out", trained, "--resume", *TINY.split(), "--lr", "0.5")
    assert done.returncode == 2
    assert "a resumed run keeps its settings: lr was 0.001, is 0.5; pass the first ones" in " ".join(
        done.stderr.split()
    )


@pytest.mark.unhooked
def test_a_damaged_model_is_named(trained, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: does not fit"):
        load_masked_lm(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "MaskedLM", "vocab": 3}')
    with pytest.raises(ValueError, match=r"config\.json: not the config of a nystrom MaskedLM: .*vocab"):
        load_masked_lm(tmp_path)
    with pytest.raises(ValueError, match=r"at least one \[MASK\]: got 'plain'"):
        fill_mask.fill(*fill_mask.load(trained), "plain")
    with pytest.raises(ValueError, match="top_k must be between 1 and the vocabulary of 262: got 263"):
        fill_mask.fill(*fill_mask.load(trained), "[MASK]", top_k=263)


def test_bench_table_prints_kept_lines_and_names_a_bad_one(tmp_path):
    out = tmp_path / "lines.jsonl"
    arguments = ("--lengths", "64", "--landmarks", "4", "--pinv-iters", "6", "--heads", "2", "--no-kinds")
    assert nystrom("bench", "synthetic", *arguments, "--out", out).returncode == 0
    (line,) = map(json.loads, out.read_text().splitlines())
    done = nystrom("bench", "table", "--lines", out)
    assert done.returncode == 0, done.stderr
    assert f"| 4 | {line['relative_error']:.3f} |" in done.stdout
    with out.open("a") as file:
        file.write('{"bench": "other"}\n')
    done = nystrom("bench", "table", "--lines", out)
    assert done.returncode == 2 and f"{out}, line 2: not a line of nystrom bench" in done.stderr
