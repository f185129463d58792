"""`nystrom bench scale`, `growth` and `ranks`: what they measure, and what they write."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from nystrom.bench import ranks, scale
from nystrom.bench.growth import Growth
from nystrom.bench.growth import run as grow


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from nystrom.cli import main; main()", "bench", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "140", "NO_COLOR": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


SIZES = "--heads", 2, "--head-dim", 8, "--num-landmarks", 4, "--rounds", 1, "--threads", 1


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("scale") / "scale.jsonl"
    done = bench(
        "scale", "--lengths", 129, "--exact-up-to", 129, "--chunk", 64, *SIZES, "--no-keep-freed", "--out", out
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_every_part_method_direction_and_length_has_its_line(measured):
    lines = [json.loads(line) for line in measured[0].read_text().splitlines()]
    found = {(line["part"], line["method"], line["backward"], line["n"]) for line in lines}
    assert len(found) == len(lines) == 8 and {n for *_, n in found} == {129}
    for line in lines:
        assert line["ms"] > 0 and line["calls"] == 1 and line["peak_mib"] >= 0 and line["chunk"] == 64
        assert line["keep_freed"] is False  # as it was asked for
    table = bench("table", "--lines", measured[0]).stdout
    assert table.startswith("**one layer, 2 heads x 8, m = 4, float32, 1 threads**") and table.count("**") == 2
    assert "attention, nystrom, forward + backward" in table and "block, exact, forward" in measured[1]


def test_the_picture_is_drawn_and_always_the_same(measured, tmp_path):
    for name in ("a.png", "b.png"):
        assert bench("growth", "--lines", measured[0], "--out", tmp_path / name).returncode == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    (tmp_path / "other.jsonl").write_text('{"bench": "lra", "method": "x", "n": 1, "utc": "", "environment": {}}\n')
    with pytest.raises(ValueError, match=r"other.jsonl: holds no line of scale; make some with: nystrom bench scale"):
        grow(Growth(lines=tmp_path / "other.jsonl", out=tmp_path / "c.png"))


@pytest.mark.skipif(os.name != "posix" or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="of glibc alone")
def test_memory_is_kept_unless_something_else_is_asked_for():
    config = scale.Scale(lengths=(2**18,), what=("attention",), exact_up_to=0, heads=1, rounds=1, threads=1)
    kept, not_kept = (list(scale.measure(replace(config, keep_freed=keep))) for keep in (True, False))
    assert [line["keep_freed"] for line in (*kept, *not_kept)] == [True, True, False, False]
    assert kept[0]["peak_mib"] >= 0.9 * not_kept[0]["peak_mib"] > 50  # the result is 64 MiB


@pytest.mark.parametrize("part", ["attention", "block"])
@pytest.mark.parametrize("method", ["nystrom", "exact"])
def test_what_is_measured_is_what_it_is_called(part, method, monkeypatch):
    called = []
    exact = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        scale.F, "scaled_dot_product_attention", lambda *a, **k: called.append("sdpa") or exact(*a, **k)
    )
    line = {
        "part": part,
        "method": method,
        "backward": True,
        "heads": 2,
        "head_dim": 8,
        "num_landmarks": 4,
        "chunk": 64,
    }
    call, make = scale.step(line)
    *inputs, grad = make(200)
    assert all(x.requires_grad for x in inputs) and not grad.requires_grad
    assert grad.shape == ((1, 2, 200, 8) if part == "attention" else (1, 200, 16))
    call(*inputs, grad)
    times = {("attention", "nystrom"): 2, ("attention", "exact"): 1, ("block", "nystrom"): 4 * 2, ("block", "exact"): 1}
    assert len(called) == times[part, method]  # streamed: four chunks read the landmarks, and once more backward


def test_slopes_are_those_of_a_power_law():
    lines = [{"n": 2**k, "ms": 3.0 * 2 ** (1.5 * k)} for k in range(16, 20)]
    short = [{"n": 2**10, "ms": 1e9}]
    assert scale.slope(short + lines, "ms") == pytest.approx(1.5)
    assert scale.slope(lines[:1], "ms") is None and scale.slope(short, "ms") is None


def test_processes_send_what_is_predicted(tmp_path):
    out = tmp_path / "ranks.jsonl"
    sizes = "--heads", 2, "--head-dim", 8, "--num-landmarks", 4, "--rounds", 1, "--calls", 1
    done = bench("ranks", "--length", 201, "--ranks", 1, 2, "--kind", "shift", *sizes, "--out", out)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["method"], line["ranks"]) for line in lines] == [("shift", 1), ("shift", 2)]
    for line in lines:
        assert line["bytes_sent"] == line["bytes_predicted"] and (line["bytes_sent"] > 0) == (line["ranks"] > 1)
    assert lines[0]["times_one"] == 1 and math.isfinite(lines[1]["times_one"])
    assert bench("table", "--lines", out).stdout.count("201 tokens, 2 heads x 8, m = 4") == 1


@pytest.mark.parametrize(
    ("module", "config", "said"),
    [
        (ranks, ranks.Ranks(ranks=(2,)), r"ranks must begin with 1 and be at most the length 65536: got \(2,\)"),
        (ranks, ranks.Ranks(ranks=(1, 9), length=8), r"at most the length 8: got \(1, 9\)"),
        (scale, scale.Scale(lengths=(0,)), r"lengths must be at least 1: got \(0,\)"),
        (scale, scale.Scale(chunk=0), "chunk must be at least 1: got 0"),
        (scale, scale.Scale(what=()), "what must name at least one: attention, block"),
    ],
)
def test_what_cannot_be_measured_is_refused(module, config, said):
    with pytest.raises(ValueError, match=said):
        module.run(config)


@pytest.mark.unhooked
def test_a_process_that_fails_is_told():
    line = {"part": "attention", "method": "nystrom", "backward": False, "heads": 2, "head_dim": 8, "n": 8}
    with pytest.raises(RuntimeError, match=r"attention, nystrom, 8 tokens: failed:\n[\s\S]*KeyError"):
        scale.elsewhere(line)
    with pytest.raises(RuntimeError, match=r"measuring 2 processes failed:\n[\s\S]*KeyError: 'none'"):
        ranks.launch(ranks.Ranks(kind="none"), 2)  # pyright: ignore[reportArgumentType]
