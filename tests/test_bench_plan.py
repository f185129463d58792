"""`nystrom plan`: its arithmetic on costs that are known, and its predictions against steps that are made."""

from dataclasses import replace
from pathlib import Path

import pytest

from nystrom import cli
from nystrom.bench import plan, table
from nystrom.bench.blocks import Cost, Step
from nystrom.bench.plan import Plan

SMALL = dict(embed_dim=64, heads=2, threads=1, num_landmarks=16)
GRADIENTS = 4 * plan.parameters(plan.of(Plan(length=1, **SMALL)))


def law(step: Step) -> Cost:
    """What a step costs here, by a law that the plan does not know; a chunk's own share is that of one chunk."""
    chunk = step.chunk or 0
    seconds = step.layers * 3e-4 * step.n
    memory = 800 * step.n + step.layers * 300 * step.n + 5000 * chunk + step.layers * GRADIENTS
    return Cost(seconds, memory, 0)


@pytest.mark.parametrize("changed", [{}, {"chunk": 4096}, {"chunk": 256}, {"layers": 1}, {"length": 3000, "layers": 5}])
def test_lines_are_continued_to_any_size(monkeypatch, changed):
    made: list[Step] = []

    def launch(step: Step, copies: int, part: float) -> list[Cost]:
        assert part == min(1, step.chunk / config.chunk if step.chunk else step.n / config.length)
        made.append(step)
        return [law(step)] * copies

    monkeypatch.setattr(plan, "launch", launch)
    config = Plan(**{"length": 1e6, "layers": 12, **SMALL, **changed})
    line = plan.plan(config)
    truth = law(plan.of(config))
    assert line["seconds"] == pytest.approx(truth.seconds) and line["memory"] == pytest.approx(truth.memory)
    weights = config.layers * GRADIENTS // 4
    assert line["memory_in_all"] == line["memory"] + 12 * weights + 4 * config.length * config.embed_dim
    assert all(step.n <= 2 * config.length and step.ranks == 1 and step.layers <= 2 for step in made)
    assert max(law(step).seconds for step in made) < 30  # nothing large was made


def test_ranks_hold_a_stretch_and_their_gradients_twice(monkeypatch):
    monkeypatch.setattr(plan, "launch", lambda step, copies, part: [law(step), law(step)._replace(seconds=0)])
    config = Plan(length=1e6 + 1, layers=3, ranks=8, ranks_per_host=2, bandwidth=1.0, **SMALL)
    line, step = plan.plan(config), plan.of(config)
    truth = law(replace(step, n=125_001))
    assert line["stretch"] == 125_001 and line["bytes_sent"] == plan.bytes_sent(step) > 3 * GRADIENTS
    assert line["seconds"] == pytest.approx(truth.seconds + 8e-9 * line["bytes_sent"])
    assert line["memory"] == pytest.approx(truth.memory + 3 * GRADIENTS)


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "--length",
            "8193",
            "--layers",
            "3",
            "--ranks",
            "2",
            "--kind",
            "shift",
            "--batch",
            "2",
            "--ranks-per-host",
            "2",
        ],
        ["--length", "32768", "--layers", "3", "--chunk", "1024", "--conv-kernel-size", "0"],
        ["--length", "16384", "--layers", "2", "--no-train"],
    ],
    ids=["ranks", "streamed", "forward"],
)
def test_the_prediction_is_what_a_step_then_needs(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.setenv(
        "MALLOC_MMAP_THRESHOLD_", "65536"
    )  # or tensors as small as these leave holes, now more, now fewer
    sizes = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    cli.run(["plan", *arguments, *sizes, "--measure", "--out", str(tmp_path / "plan.jsonl")])
    (line,) = table.read(tmp_path / "plan.jsonl")
    assert line["bytes_sent"] == line["measured"]["bytes_sent"]
    assert (line["bytes_sent"] > 0) == (line["ranks"] > 1)
    assert line["memory"] == pytest.approx(line["measured"]["memory"], rel=0.25)
    assert line["seconds"] > 0 < line["measured"]["seconds"]
    said = capsys.readouterr().out
    assert f"(is {line['measured']['memory'] / 2**30:.3g}:" in said
    assert table.markdown([line]).count("\n") >= 3


def test_a_machine_too_small_is_said(monkeypatch, capsys):
    monkeypatch.setattr(plan, "launch", lambda step, copies, part: [law(step)])
    for given, advised in (({}, "try --chunk 16384, or more ranks"), ({"chunk": 4096}, "try more ranks")):
        plan.run(Plan(length=1e12, **SMALL, **given))
        assert advised in capsys.readouterr().out
    plan.run(Plan(length=1e4, **SMALL))
    assert "try" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(length=1.5), "length must be a whole number of tokens, at least 1: got 1.5"),
        (dict(length=0), "length must be a whole number of tokens, at least 1: got 0"),
        (dict(length=4, ranks=5), "ranks must be at most the length 4: got 5"),
        (dict(length=64, ranks=2, ranks_per_host=3), "ranks_per_host must be at most ranks 2: got 3"),
        (dict(length=64, ranks=2, chunk=32), "streamed on one rank alone: got chunk 32 and ranks 2"),
        (dict(length=64, chunk=8), "chunk must be at least the convolution's width: got 8 and 33"),
        (dict(length=64, chunk=64, kind="shift"), "only kind 'nystrom' .* can be streamed"),
        (dict(length=64, bandwidth=0.0), "bandwidth must be positive: got 0"),
        (dict(length=64, ffn_dim=0), "ffn_dim must be at least 1: got 0"),
        (dict(length=64, layers=0), "layers must be at least 1: got 0"),
        (dict(length=64, heads=3), "3"),
        (dict(length=64, conv_kernel_size=4), "odd"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_anything_is_measured(tmp_path: Path, monkeypatch, given, message):
    monkeypatch.setattr(plan, "launch", lambda step, copies, part: pytest.fail("it measured"))
    out = tmp_path / "plan.jsonl"
    with pytest.raises(ValueError, match=message):
        plan.run(Plan(**{**SMALL, **given, "out": out}))
    assert not out.exists()


def test_a_failed_process_is_told(tmp_path):
    step = replace(plan.of(Plan(length=64, layers=1, **SMALL)), heads=7)  # which a plan would have refused
    with pytest.raises(RuntimeError, match="1 blocks of 64 tokens on 1 ranks: a process failed"):
        plan.launch(step)


def test_a_line_has_all_that_it_stands_on(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "launch", lambda step, copies, part: [law(step)])
    plan.run(Plan(length=1e6, out=tmp_path / "plan.jsonl", **SMALL))
    plan.run(Plan(length=2e6, layers=2, out=tmp_path / "plan.jsonl", **SMALL))
    lines = table.read(tmp_path / "plan.jsonl")
    lines[1]["utc"] = "later"
    assert table.markdown(lines).count("**") == 2  # one table, whenever they were made
    line = lines[0]
    small = line["small"]
    assert [one["layers"] for one in small] == [1, 1, 2] and small[1]["n"] == small[2]["n"] == 2 * small[0]["n"]
    assert line["bench"] == "plan" and line["threads"] == 1 and "environment" in line and "measured" not in line
