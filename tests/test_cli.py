"""The real command line, in a subprocess: every subcommand in a small form, and what it refuses."""

import ast
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nystrom.bench.error import Error
from nystrom.bench.front import Front
from nystrom.bench.memory import Memory
from nystrom.bench.plot import Plot
from nystrom.bench.speed import Speed
from nystrom.bench.synthetic import Synthetic
from nystrom.bench.table import Table
from nystrom.demo import Demo
from nystrom.recipes import fill_mask
from nystrom.recipes.fill_mask import FillMask
from nystrom.recipes.pretrain import Pretrain


def nystrom(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from nystrom.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


HELP = {
    (): ("Linear-cost attention", "pretrain", "fill-mask", "bench", "demo"),
    ("pretrain",): ("--length", "Tokens in a block. Default: tiny 1024", "--resume", "--preset {tiny,small,base}"),
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
    model, _ = fill_mask.load(tmp_path / "demo" / "model")
    assert model.config.attention == "nystrom" and not model.training


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pretrain", "--data", "nowhere"), "nowhere: no such file or folder"),
        (("pretrain", "--data", "binary.bin"), "binary.bin: not a text file: NUL byte at offset 1"),
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
