"""`nystrom bench lra`: that it steps the model of `nystrom lra`, and what it writes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from nystrom.bench import steps
from nystrom.convolution import TokenConvolution
from nystrom.lra.kinds import DEFAULTS


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from nystrom.cli import main; main()", "bench", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_the_original_form_computes_what_ours_does():
    ours, theirs = (steps.make_model(kind, 128).double().eval() for kind in ("nystrom", "nystrom_original"))
    theirs.load_state_dict(ours.state_dict())
    assert not any(isinstance(module, TokenConvolution) for module in theirs.modules())
    assert sum(isinstance(module, nn.Conv2d) for module in theirs.modules()) == 2
    ids = torch.randint(1, 256, (2, 128))
    losses = [model(ids, labels=torch.tensor([0, 1])).loss for model in (ours, theirs)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_trains(precision, monkeypatch):
    made = []
    build = steps.make_model
    monkeypatch.setattr(steps, "make_model", lambda *given: made.append(build(*given)) or made[-1])
    step = steps.make_step("linformer", 64, 2, precision)
    before = [parameter.clone() for parameter in made[0].parameters()]
    seen = []
    made[0].head[0].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    step()
    assert seen == [getattr(torch, precision)]
    changed = [not torch.equal(old, new) for old, new in zip(before, made[0].parameters(), strict=True)]
    assert sum(changed) > len(changed) // 2
    assert all(parameter.grad is None for parameter in made[0].parameters())


def test_the_command_measures_every_kind_and_the_table_is_made_from_its_lines(tmp_path):
    out = tmp_path / "lra.jsonl"
    arguments = ["--length", "64", "--batch", "2", "--rounds", "1", "--threads", "1", "--no-keep-freed"]
    done = bench("lra", *arguments, "--out", str(out))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    others = [kind for kind in DEFAULTS if kind != "nystrom"]
    assert [line["method"] for line in lines] == ["nystrom", *others, "nystrom_original"]
    for line in lines:
        assert line["examples_per_second"] == pytest.approx(2e3 / line["ms"])
        expected = {"n": 64, "batch": 2, "threads": 1, "precision": "float32", "keep_freed": False}
        assert expected.items() <= line.items()
    assert lines[0]["times_nystrom"] == 1
    page = bench("table", "--lines", str(out)).stdout
    assert page.count("\n| ") == 2 + len(lines)
    assert page.startswith("**a training step of 2 x 64 tokens, float32, 1 threads**")


def test_memory_tells_a_stored_matrix_from_none():
    """Of 2 x 2 heads a layer, 1024 x 1024 weights and logits: 32 MiB and more, where the fused kernel has none."""
    config = steps.Lra(length=1024, batch=2, threads=1)
    stored, fused = (steps.peak_elsewhere(config, kind) for kind in ("softmax_matrix", "softmax"))
    assert stored - fused > 32 * 2**20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "batch must be at least 1: got 0"),
        (["--length", "100"], "nystrom_original needs a length that its 64 landmarks divide: got 100"),
        (["--kinds"], "kinds must name at least one: softmax, softmax_matrix, nystrom"),
    ],
)
def test_refusals_say_what_to_do(arguments, message):
    done = bench("lra", *arguments)
    assert done.returncode == 2
    assert message in done.stderr.replace("\n", " ")
