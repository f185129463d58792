"""`nystrom report`: run folders to one table, its numbers, its picture; what it will not leave out in silence."""

import copy
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nystrom import cli
from nystrom.report.command import Report, run

CONFIG = {"model": "minilm", "attention": None, "length": 128, "epochs": 3.0, "lr": 1e-4, "early_stopping": None}
CONFIG |= {"num_landmarks": 32, "top_k": None, "window": None, "block": None, "exact_below": 0, "seed": 0, "seeds": []}
CONFIG |= {"resume": False, "dry_run": False, "checkpoint_steps": 200, "data": "glue", "task": "mrpc"}
MACHINE = {"commit": "0123456789", "packages": {"torch": "2.13.0"}, "processor": "CPU", "cores": 2, "accelerator": None}
SCORES = {
    "softmax": (0.80, 0.82, 0.84),
    "nystrom": (0.79, 0.80, 0.84),
    "nystrom_residual": (0.81, 0.82, 0.83),
}


def lay(folder: Path, kind: str, value: float, metrics: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A run's folder with this score."""
    recipe = settings.pop("recipe", "finetune")
    config = {**CONFIG, "attention": kind, **settings, "out": str(folder)}
    found = {
        "task": config["task"],
        "attention": kind,
        "seed": config["seed"],
        "score": {"name": "accuracy and f1", "value": value},
        "scores": {"accuracy": value - 0.02, "f1": value + 0.02, "loss": 1 - value},
        "examples": {"train": 3668, "dev": 408},
        "longest_input": 103,
        "exact_below": 0,
        "steps": 345,
        "seconds": 500.0,
        "tokens_per_second": 1000.0,
        "parameters": 22_000_000,
        "curve": [{"step": 10 * i, "loss": 0.7 - i / 100} for i in range(1, 35)],
    }
    folder.mkdir(parents=True)
    write(folder / "run.json", {"recipe": recipe, "config": config, "environment": MACHINE})
    write(folder / "metrics.json", found | (metrics or {}))
    return folder


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def lay_seeds(folder: Path, kind: str, values: tuple[float, ...], **settings: Any) -> None:
    """What `--seeds 0 1 2` leaves behind."""
    seeds = list(range(len(values)))
    for seed, value in enumerate(values):
        lay(folder / f"seed-{seed}", kind, value, seed=seed, **settings)
    config = {**CONFIG, "attention": kind, **settings, "seeds": seeds, "out": str(folder)}
    write(folder / "run.json", {"recipe": "finetune", "config": config, "environment": MACHINE})
    each = [json.loads((folder / f"seed-{seed}" / "metrics.json").read_text()) for seed in seeds]
    scores = {name: {"each": [one["scores"][name] for one in each]} for name in each[0]["scores"]}
    score = {"name": each[0]["score"]["name"], "each": list(values)}
    write(
        folder / "summary.json",
        {"task": each[0]["task"], "attention": kind, "seeds": seeds, "scores": scores, "score": score},
    )


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two tasks, three attentions, three seeds."""
    for task, shift in (("mrpc", 0.0), ("cola", -0.3)):
        for kind, values in SCORES.items():
            lay_seeds(tmp_path / "runs" / f"{task}-{kind}", kind, tuple(v + shift for v in values), task=task)
    return tmp_path / "runs"


def report(*dirs: Path, out: Path | None = None, capsys) -> str:
    run(Report(dirs=dirs, out=out))
    return capsys.readouterr().out


def line(page: str, start: str) -> list[str]:
    """The cells of the first line of a table that begins so."""
    (found, *_) = (line for line in page.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_one_table_of_all_runs(runs, tmp_path, capsys):
    page = report(runs, out=tmp_path / "out", capsys=capsys)
    assert line(page, "task") == ["task", "softmax", "nystrom", "nystrom_residual"]
    sd = [100 * statistics.stdev(values) for values in SCORES.values()]
    assert line(page, "mrpc") == [
        "mrpc (accuracy and f1)",
        f"82.00 ± {sd[0]:.2f} (3)",
        f"81.00 ± {sd[1]:.2f} (3), -1.00",
        f"82.00 ± {sd[2]:.2f} (3), +0.00",
    ]
    assert line(page, "mean") == ["mean", "67.00", "66.00, -1.00", "67.00, +0.00"]
    assert "[1]" not in page and "Unfinished" not in page and "Commit: 0123456789" in page
    (*_, details) = page.split("### mrpc\n")
    header = ["attention", "seeds", "accuracy", "f1", "loss", "examples", "steps", "seconds", "tokens/s"]
    assert line(details, "attention") == header
    assert line(details, "nystrom ") == [
        "nystrom",
        "0, 1, 2",
        f"79.00 ± {sd[1]:.2f} (-1.00)",
        f"83.00 ± {sd[1]:.2f} (-1.00)",
        f"0.1900 ± {sd[1] / 100:.4f} (+5.6 %)",  # a loss in per cent of the twin's 0.18
        "train 3,668, dev 408",
        "345",
        "500",
        "1,000",
    ]
    assert (tmp_path / "out" / "report.md").read_text() == page


def test_the_numbers_behind_it(runs, tmp_path, capsys):
    report(runs, out=tmp_path / "out", capsys=capsys)
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(found["cells"]) == 6 and found["unfinished"] == []
    (cell,) = (c for c in found["cells"] if (c["task"], c["attention"]) == ("mrpc", "nystrom"))
    assert cell["seeds"] == [0, 1, 2] and cell["score"]["each"] == list(SCORES["nystrom"])
    assert cell["score"]["sd"] == pytest.approx(np.std(SCORES["nystrom"], ddof=1))
    more = np.subtract(SCORES["nystrom"], SCORES["softmax"])
    difference = cell["difference_to_softmax"]
    assert difference["score"]["each"] == pytest.approx(more)
    assert difference["score"]["mean"] == pytest.approx(more.mean())
    assert difference["score"]["sd"] == pytest.approx(more.std(ddof=1))  # seed by seed
    assert difference["loss"]["mean"] == pytest.approx(0.01)
    assert [one["environment"] for one in cell["runs"]] == [MACHINE] * 3
    assert cell["runs"][1]["folder"].endswith("mrpc-nystrom/seed-1") and cell["runs"][1]["steps"] == 345
    assert cell["settings"]["num_landmarks"] == 32 and not {"seed", "out", "attention"} & cell["settings"].keys()


def test_the_picture(runs, tmp_path, capsys):
    import matplotlib.image

    lay_pretraining(tmp_path / "runs")
    report(runs, out=tmp_path / "out", capsys=capsys)
    picture = matplotlib.image.imread(tmp_path / "out" / "report.png")[..., :3]
    assert picture.shape[0] > 800 and picture.shape[1] == 1500
    upper, lower = np.split(picture, [picture.shape[0] // 2])
    for colour, places in (("0072b2", [True, True]), ("e69f00", [True, False])):  # the residual form is not pretrained
        channels = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        assert [np.isclose(half, channels, atol=0.02).all(-1).any() for half in (upper, lower)] == places, colour


def lay_pretraining(folder: Path) -> None:
    own = {"recipe": "pretrain", "task": "pretrain", "length": 1024, "steps": 100}
    for name, kind, kernel, pace in (("a", "softmax", 33, 2.0), ("b", "nystrom", 33, 1.0), ("c", "nystrom", None, 0.5)):
        curve: list[dict[str, float]] = [{"step": i, "loss": 5 / i**0.2, "seconds": pace * i} for i in range(1, 101)]
        curve += [{"step": i, "eval_loss_nats": 5 / i**0.2, "eval_accuracy": i / 200} for i in (25, 50, 75, 100)]
        scores = {"accuracy": 0.4, "loss_nats": 2.0 * pace, "perplexity": 7.0}
        metrics = {"score": {"name": "masked accuracy", "value": 0.4}, "scores": scores, "curve": curve, "steps": 100}
        lay(folder / name, kind, 0.4, metrics, conv_kernel_size=kernel, **own)


def test_pretraining_has_a_table_of_its_own(tmp_path, capsys):
    lay_pretraining(tmp_path)
    page = report(tmp_path, capsys=capsys)
    columns = ["task", "softmax", "nystrom, conv_kernel_size 33", "nystrom, conv_kernel_size none"]
    assert line(page, "task") == columns
    (*_, details) = page.split("### pretrain\n")
    assert line(details, "nystrom, conv_kernel_size 33")[3] == "2.0000 (-50.0 %)"
    assert line(details, "nystrom, conv_kernel_size none")[3] == "1.0000 (-75.0 %)"  # the one exact run is its twin too


def test_the_twin_has_the_same_convolution(tmp_path, capsys):
    lay_pretraining(tmp_path)
    own = {"recipe": "pretrain", "task": "pretrain", "length": 1024, "steps": 100}
    lay(tmp_path / "d", "softmax", 0.3, {"steps": 100}, conv_kernel_size=None, **own)
    found = line(report(tmp_path, capsys=capsys), "pretrain")
    assert found[1:] == ["40.00 (1)", "30.00 (1)", "40.00 (1), +0.00", "40.00 (1), +10.00"]


# Rows, columns, notes


def test_settings_that_vary_name_rows_and_columns(tmp_path, capsys):
    for place, (landmarks, lr) in enumerate(((32, 1e-4), (64, 1e-4), (32, 1e-3))):
        lay(tmp_path / str(place), "nystrom", 0.5 + place / 10, num_landmarks=landmarks, lr=lr)
    for seed, landmarks in enumerate((7, 32)):  # which exact attention does not read
        lay(tmp_path / f"exact-{seed}", "softmax", 0.8, num_landmarks=landmarks, exact_below=None, seed=seed)
    page = report(tmp_path, capsys=capsys)
    assert line(page, "task") == ["task", "softmax", "nystrom, num_landmarks 32", "nystrom, num_landmarks 64"]
    assert line(page, "mrpc, lr 0.0001") == [
        "mrpc, lr 0.0001 (accuracy and f1)",
        "80.00 ± 0.00 (2)",
        "50.00 (1), -30.00",
        "60.00 (1), -20.00",
    ]
    assert line(page, "mrpc, lr 0.001 ") == ["mrpc, lr 0.001 (accuracy and f1)", "–", "70.00 (1)", "–"]
    assert line(page, "mean") == ["mean", "–", "60.00", "–"]


def test_other_budgets_and_sizes_are_marked(tmp_path, capsys):
    lay(tmp_path / "exact", "softmax", 0.8)
    lay(tmp_path / "more", "nystrom", 0.9, {"steps": 690}, epochs=6.0)
    other = {"examples": {"train": 3668, "dev": 100}, "longest_input": 80, "exact_below": 1024}
    lay(tmp_path / "fewer", "nystrom_residual", 0.85, other, exact_below=None)
    page = report(tmp_path, capsys=capsys)
    assert line(page, "mrpc")[1:] == ["80.00 (1)", "90.00 (1) [1]", "85.00 (1), +5.00 [2]"]  # epochs: no twin
    assert "[1] mrpc, nystrom: epochs 6, not 3; steps 690, not 345\n" in page
    assert (
        "[2] mrpc, nystrom_residual: examples train 3668, dev 100, not train 3668, dev 408; attention stayed exact: "
        "inputs of at most 80 tokens, exact_below 1024\n"
    ) in page


def test_seeds_of_unlike_data_are_marked(tmp_path, capsys):
    lay(tmp_path / "one", "softmax", 0.8)
    lay(tmp_path / "two", "softmax", 0.9, {"examples": {"train": 3668, "dev": 40}}, seed=1)
    assert "[1] mrpc, softmax: examples train 3668, dev 40 or train 3668, dev 408" in report(tmp_path, capsys=capsys)


def test_unlike_seeds_are_not_compared_seed_by_seed(tmp_path, capsys):
    lay_seeds(tmp_path / "exact", "softmax", (0.8, 0.9))
    lay(tmp_path / "more", "nystrom", 0.95)
    page = report(tmp_path, out=tmp_path / "out", capsys=capsys)
    assert line(page, "mrpc")[2] == "95.00 (1), +10.00"
    found = json.loads((tmp_path / "out" / "report.json").read_text())["cells"][1]["difference_to_softmax"]["score"]
    assert found["each"] is None and found["mean"] == pytest.approx(0.1)


# What is not there, or not whole


def test_unfinished_runs_are_named(runs, tmp_path, capsys):
    whole = report(runs, capsys=capsys)
    killed = lay(tmp_path / "runs" / "rte", "softmax", 0.7, task="rte")
    (killed / "metrics.json").unlink()
    for step, mark in ((200, True), (400, True), (600, False)):
        (killed / f"checkpoint-{step}").mkdir()
        if mark:
            (killed / f"checkpoint-{step}" / "complete").touch()
    shutil.rmtree(runs / "cola-nystrom" / "seed-2")
    page = report(runs, capsys=capsys)
    assert f"- {killed} (step 400)" in page and f"- {runs / 'cola-nystrom' / 'seed-2'} (not begun)" in page
    assert "rte" not in line(page, "task") and line(page, "cola")[2].startswith("49.50 ± 0.71 (2)")
    assert line(page, "mrpc") == line(whole, "mrpc")
    assert (killed / "checkpoint-600").is_dir()  # nothing is cleaned up
    shutil.rmtree(killed / "checkpoint-200"), shutil.rmtree(killed / "checkpoint-400")
    with pytest.raises(FileNotFoundError, match=r"rte: no finished run in there; unfinished: .*rte \(no checkpoint\)"):
        run(Report(dirs=(killed,)))


def test_a_summary_stands_for_seeds_that_are_gone(runs, tmp_path, capsys):
    whole = report(runs, capsys=capsys)
    for folder in list(runs.glob("*/seed-*")):
        shutil.rmtree(folder)
    page = report(runs, capsys=capsys)
    for row in ("task", "mrpc", "cola", "mean"):
        assert line(page, row) == line(whole, row)


def test_a_folder_named_twice_counts_once(runs, capsys):
    assert report(runs, runs, runs / "mrpc-softmax", capsys=capsys) == report(runs, capsys=capsys)


def test_a_run_copied_is_refused(runs, tmp_path):
    shutil.copytree(runs / "mrpc-softmax" / "seed-1", tmp_path / "copy")
    with pytest.raises(
        ValueError, match=r"mrpc-softmax/seed-1 and .*/copy are the same run, seed and all; leave out one"
    ):
        run(Report(dirs=(runs, tmp_path / "copy")))


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("run.json", "{", r"run.json: damaged: not JSON: Expecting property name"),
        ("run.json", "[]", r"run.json: damaged: got \[\], not a JSON object"),
        ("run.json", '{"name": "x"}', r"run.json: not of a run of nystrom"),
        ("metrics.json", '{"task": "mrpc", "seed"', r"metrics.json: damaged: not JSON"),
        ("metrics.json", '{"held_out": 1}', r"metrics.json: not the numbers of a run"),
        ("metrics.json", b"\xff\xfe", r"metrics.json: damaged: not JSON"),
    ],
)
def test_a_damaged_file_is_named(file, content, said, runs):
    path = runs / "mrpc-softmax" / "seed-1" / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"mrpc-softmax/seed-1/{said}"):
        run(Report(dirs=(runs,)))


def test_a_score_that_is_no_number_is_refused(tmp_path):
    metrics = json.loads((lay(tmp_path / "run", "softmax", 0.5) / "metrics.json").read_text())
    for score, said in (
        (float("nan"), "a score that is not finite"),
        ("0.5", "not the numbers"),
        (None, "not the numbers"),
    ):
        spoilt = copy.deepcopy(metrics)
        spoilt["scores"]["loss"] = score
        write(tmp_path / "run" / "metrics.json", spoilt)
        with pytest.raises(ValueError, match=f"run/metrics.json: {said}"):
            run(Report(dirs=(tmp_path,)))


def test_a_damaged_summary_is_named(runs):
    for folder in list(runs.glob("mrpc-softmax/seed-*")):
        shutil.rmtree(folder)
    write(runs / "mrpc-softmax" / "summary.json", {"task": "mrpc", "attention": "softmax", "seeds": [0]})
    with pytest.raises(ValueError, match=r"mrpc-softmax/summary.json: damaged: KeyError: 'score'"):
        run(Report(dirs=(runs,)))


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder"):
        run(Report(dirs=(tmp_path / "nowhere",)))
    with pytest.raises(FileNotFoundError, match=r"no finished run in there$"):
        run(Report(dirs=(tmp_path,)))
    with pytest.raises(ValueError, match=r"name a folder of runs"):
        cli.run(["report"])
    assert not list(tmp_path.iterdir())


def test_the_command(runs, tmp_path):
    program = [sys.executable, "-c", "from nystrom.cli import main; main()", "report"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, runs, "--out", "out"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "" and re.match(r"## finetune\n\n\| task \| softmax \|", done.stdout)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "report.md", "report.png"]
