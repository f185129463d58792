"""The comparison with peers: that each form computes what ours does, and the command that measures and draws it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nystrom.bench.encoders import VOCAB, encoders
from nystrom.bench.lines import tables
from nystrom.bench.methods import Projected, methods, random_inputs
from nystrom.bench.timing import matmul_peaks, nystrom_matmul_flops, take_turns
from nystrom.functional import iterative_pinv

TINY = "--lengths 128 192 --heads 2 --head-dim 16 --num-landmarks 16 --rounds 3 --seconds 0.001 --threads 1"
TINY += " --encoder-length 128 --encoder-layers 1"
FORMS = ["nystrom", "exact", "three_factor", "hf", "lucidrains"]


def nystrom(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from nystrom.cli import main; main()", "bench", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def peers(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("peers") / "peers.jsonl"
    done = nystrom("speed", "--peers", *TINY.split(), "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("h", [1, 3])
@pytest.mark.parametrize("form", ["three_factor", "hf", "lucidrains"])
def test_every_form_computes_nystrom_attention(form, h):
    """With query, key and value all different, as are the heads; of one head the gradients too.

    The peers scale the start of their inverse by a maximum over heads, we per head. So every head here holds the tokens
    of the first in another order of segments: its core is permuted, its scale the same (but not the scale's gradient).
    """
    n, d, m = 64, 8, 8
    inputs = torch.randn(3, n, d, dtype=torch.float64)
    heads = [[x.roll(shift * i * n // m, 0) for i in range(h)] for x, shift in zip(inputs, (1, 3, 2), strict=True)]
    available = methods(h, n, d, m)
    outcomes = []
    for attend in (available["nystrom"], available[form]):
        leaves = [torch.stack(x)[None].requires_grad_() for x in heads]
        out = attend(*leaves)
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        outcomes.append([out, *(x.grad for x in leaves if h == 1)])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(outcomes[0][0], available["exact"](*leaves), rtol=0.01)


@pytest.mark.parametrize(("n", "missing"), [(64, set()), (65, {"hf", "lucidrains"}), (8, {"hf"})])
def test_peers_are_left_out_where_they_would_compute_something_else(n, missing):
    plain = {"three_factor"} if n % 8 else set()
    assert set(FORMS) - set(methods(2, n, 4, 8)) == missing | plain
    assert {"nystrom", "exact", "hf", "lucidrains"} - set(encoders(n, 1, 2, 4, 8)) == missing


def test_peers_get_their_inputs_without_a_copy():
    inputs = random_inputs(2, 3, 16, 4, "tokens_first")
    parts = Projected(*inputs).parts
    assert [x.data_ptr() for x in parts] == [x.data_ptr() for x in inputs]
    assert all(x.shape == (2, 16, 12) for x in parts)


@pytest.mark.parametrize("name", ["nystrom", "hf", "lucidrains"])
def test_encoders_are_of_one_size_and_take_the_nystrom_branch(name):
    """No array of theirs is as large as one head's n x n; transformers' default setting would make them."""
    n, h, d = 1024, 2, 8
    model = encoders(n, 2, h, d, 16)[name]
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    ids = torch.randint(2, VOCAB, (1, n))
    with Largest(), torch.no_grad():
        states = model(ids)
    assert states.shape == (1, n, h * d) and states.isfinite().all()
    assert n * 4 * h * d <= largest < n * n
    blocks = {k: p.numel() for k, p in model.named_parameters() if "embeddings" not in k}
    want = {k: p.numel() for k, p in encoders(n, 2, h, d, 16)["nystrom"].named_parameters() if "embeddings" not in k}
    biases = 2 * 3 * h * d if name == "lucidrains" else 0  # its query, key and value have none
    assert sum(blocks.values()) == sum(want.values()) - biases
    assert sum("conv" in k for k in blocks) == 2 and not model.training


def test_exact_encoder_is_exact():
    """And pays for no convolution."""
    model = encoders(64, 1, 2, 8, 16)["exact"]
    assert not any("conv" in k for k, _ in model.named_parameters())
    assert {block.attention.kind for block in model.get_submodule("blocks").children()} == {"softmax"}


def test_matmul_flops_are_those_that_torch_counts():
    b, h, n, d, m = 2, 3, 40, 5, 7
    query, key, value = torch.randn(3, b, h, n, d).unbind()
    landmarks = torch.randn(b, h, m, d)
    with FlopCounterMode(display=False) as counter:
        left, core, right = query @ landmarks.mT, landmarks @ landmarks.mT, landmarks @ key.mT
        _ = left @ (iterative_pinv(core, 6) @ (right @ value))
    assert nystrom_matmul_flops(b, h, n, d, m, 6) == counter.get_total_flops()


def test_matmul_peak_is_the_fastest_product_of_each_round():
    times = {"mm 1024": [10.0, 2.0], "mm 2048": [2.0, 80.0], "bmm 12 x 512": [100.0, 100.0], "nystrom": [1.0, 1.0]}
    assert matmul_peaks(times) == pytest.approx([2 * 2048**3 / 2e-3 / 1e9, 2 * 1024**3 / 2e-3 / 1e9])


def test_forms_take_turns_and_threads_are_put_back():
    before, seen = torch.get_num_threads(), []
    steps = {name: lambda name=name: seen.append((name, torch.get_num_threads())) for name in "ab"}
    times = take_turns(steps, rounds=2, seconds=0.0, threads=before + 1)
    assert seen == [(name, before + 1) for name in "abab"]
    assert torch.get_num_threads() == before
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in times.values())


def test_peers_measures_everything_in_one_run(peers):
    lines = read(peers)
    found = {(line["what"], line["backward"], line["n"], line["method"]) for line in lines}
    attention = {("attention", back, n, form) for back in (False, True) for n in (128, 192) for form in FORMS}
    encoder = {("encoder", back, 128, form) for back in (False, True) for form in FORMS if form != "three_factor"}
    assert found == attention | encoder and len(lines) == len(found)
    assert len({line["utc"] for line in lines}) == 1
    assert all(line.get("layout") == ("tokens_first" if line["what"] == "attention" else None) for line in lines)
    ours = {(x["what"], x["backward"], x["n"]): x for x in lines if x["method"] == "nystrom"}
    for line in lines:
        base = ours[line["what"], line["backward"], line["n"]]
        ratios = [t / o for t, o in zip(line["ms_rounds"], base["ms_rounds"], strict=True)]
        assert len(ratios) == 3
        assert line["times_nystrom"] == pytest.approx(median(ratios), rel=0.02)
        assert line["ms"] == pytest.approx(median(line["ms_rounds"]), abs=1e-3)


def test_matmul_share_is_measured_for_our_forward_alone(peers):
    lines = read(peers)
    with_share = [line for line in lines if "matmul_share" in line]
    assert [(x["method"], x["what"], x["backward"], x["n"]) for x in with_share] == [
        ("nystrom", "attention", False, n) for n in (128, 192)
    ]
    for line in with_share:
        flops = nystrom_matmul_flops(1, 2, line["n"], 16, 16, 6)
        assert line["matmul_gflop"] == flops / 1e9
        assert 0 < line["matmul_share"] < 1 < line["peak_gflop_per_s"]
        rates = [flops / 1e9 / (1e-3 * ms) for ms in line["ms_rounds"]]
        assert min(rates) / 3 < line["matmul_share"] * line["peak_gflop_per_s"] < max(rates) * 3


def test_table_makes_three_of_one_run(peers):
    done = nystrom("table", "--lines", peers)
    assert done.returncode == 0, done.stderr
    forward, backward, encoder = done.stdout.split("\n\n**")
    assert "ms per forward (times nystrom), 1 x 2 heads x 16, m = 16, float32, tokens_first, 1 threads" in forward
    heading = "| n | nystrom | exact (SDPA) | three factors | Hugging Face | lucidrains |"
    assert f"{heading} nystrom's share of matmul peak |\n" in forward and "% |\n" in forward
    assert backward.startswith("ms per forward + backward (times nystrom), 1 x 2 heads") and f"{heading}\n" in backward
    assert encoder.startswith("ms per pass through an encoder (times nystrom), 1 x 128 tokens, 1 layers x 32, 2 heads")
    assert "| encoder | forward | forward + backward |" in encoder
    rows = [line.split(" | ") for line in encoder.splitlines() if "x)" in line]
    assert [row[0] for row in rows] == ["| nystrom", "| exact (SDPA)", "| Hugging Face", "| lucidrains"]
    lines = {(x["method"], x["backward"]): x for x in read(peers) if x["what"] == "encoder"}
    for row, method in zip(rows, ("nystrom", "exact", "hf", "lucidrains"), strict=True):
        for cell, back in zip(row[1:], (False, True), strict=True):
            assert cell.startswith(f"{lines[method, back]['ms']:.1f} ({lines[method, back]['times_nystrom']:.1f}x)")


def test_runs_of_one_command_each_stay_apart():
    """Two plain runs, as kept before there were peers: no "what", told apart by layout."""
    old = {"bench": "speed", "utc": "now", "backward": False, "method": "nystrom"}
    lines = [old | {"layout": layout, "n": n} for layout in ("heads_first", "tokens_first") for n in (1, 2)]
    assert tables(lines) == [lines[:2], lines[2:]]
    for bench in ("synthetic", "error"):
        errors = [{"bench": bench, "utc": "now", "n": n} for n in (1, 1, 2)]
        assert tables(errors) == [errors[:2], errors[2:]]


def test_plot_draws_the_last_run_and_always_the_same(peers, tmp_path):
    both = tmp_path / "both.jsonl"
    slower = [{**line, "utc": "earlier", "ms": 50 * line["ms"]} for line in read(peers)]
    both.write_text("".join(json.dumps(line) + "\n" for line in slower) + peers.read_text())
    pictures = []
    for name, lines in (("a.png", peers), ("b.png", peers), ("c.png", both)):
        done = nystrom("plot", "--lines", lines, "--out", tmp_path / "new" / name)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"Wrote {tmp_path / 'new' / name}\n"
        pictures.append((tmp_path / "new" / name).read_bytes())
    assert pictures[0].startswith(b"\x89PNG") and pictures[0] == pictures[1] == pictures[2]
    width, height = (int.from_bytes(pictures[0][at : at + 4]) for at in (16, 20))
    assert width > 2 * height  # two panels


def test_plot_of_one_direction_has_one_panel(peers, tmp_path):
    forward = tmp_path / "forward.jsonl"
    forward.write_text("".join(json.dumps(line) + "\n" for line in read(peers) if not line["backward"]))
    assert nystrom("plot", "--lines", forward, "--out", tmp_path / "a.png").returncode == 0
    picture = (tmp_path / "a.png").read_bytes()
    width, height = (int.from_bytes(picture[at : at + 4]) for at in (16, 20))
    assert width < 2 * height


def test_memory_measures_lucidrains(tmp_path):
    """It keeps n x m arrays: 8 heads x 8192 x 64 floats are 16 MiB each."""
    out = tmp_path / "lines.jsonl"
    sizes = ("--lengths", "8192", "--heads", "8", "--head-dim", "16", "--forms", "lucidrains", "--threads", "1")
    done = nystrom("memory", *sizes, "--out", out)
    assert done.returncode == 0, done.stderr
    (line,) = read(out)
    assert line["method"] == "lucidrains" and line["extra_mib"] > 32


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("speed", "--peers", "--backward", *TINY.split()),
            "peers times forward and forward + backward: got backward = True",
        ),
        (("speed", *TINY.split(), "--rounds", "0"), "rounds must be at least 1: got 0"),
        (("speed", *TINY.split(), "--peers", "--encoder-layers", "0"), "encoder_layers must be at least 1: got 0"),
        (
            ("speed", *TINY.split(), "--forms"),
            "forms must name at least one: nystrom, shift, residual, exact, three_factor, hf, lucidrains",
        ),
        (("plot", "--lines", "{error}", "--out", "x.png"), "holds no time of attention; make some with: nystrom bench"),
        (("plot", "--lines", "nowhere.jsonl", "--out", "x.png"), "nowhere.jsonl"),
    ],
)
def test_refusals_say_what_to_do(tmp_path, arguments, message):
    error = tmp_path / "error.jsonl"
    error.write_text('{"bench": "error", "method": "nystrom", "n": 1, "utc": "now", "environment": {}}\n')
    done = nystrom(*(str(error) if argument == "{error}" else argument for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert message in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr and not Path("x.png").exists()
