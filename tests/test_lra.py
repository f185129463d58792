"""Long Range Arena end to end: the model, what each kind computes in it, schedules, runs, resuming, the table."""

import json
import os
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

from nystrom import cli
from nystrom.data.lra import listops, listops_files
from nystrom.data.lra.listops import Limits
from nystrom.lra import kinds, protocol, table
from nystrom.lra.kinds import DEFAULTS, Kind, Settings, make_attend, resolve
from nystrom.lra.model import LraClassifier, Sizes
from nystrom.lra.tasks import PUBLISHED, TASKS
from nystrom.presets import READ_BY
from nystrom.recipes import lra
from nystrom.recipes.lra import ListOps, Retrieval, Text
from nystrom.training import LengthGrouped
from ranks import kill_rank, torchrun

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

PARAMETERS = {
    "listops": (209_802, 209_942),
    "text": (370_562, 370_702),
    "retrieval": (395_138, 395_278),
    "image": (174_986, 175_126),
    "pathfinder32": (173_954, 174_094),
}
"""Of the authors' models, without and with the convolution: counted in their code."""
SMALL = Sizes(vocab_size=20, max_length=64, num_classes=3, embed_dim=8, ffn_dim=16)


def model(kind: str, sizes: Sizes = SMALL, **settings: int) -> LraClassifier:
    torch.manual_seed(0)
    found = resolve(kind, Settings(**{"conv_kernel_size": 0, **settings}))
    shared = kind == "reformer"
    return LraClassifier(sizes, make_attend(kind, sizes, found), found["conv_kernel_size"] or None, shared).eval()


# The model


@pytest.mark.parametrize("name", TASKS)
def test_the_model_has_the_authors_parameters(name):
    task = TASKS[name]
    sizes = Sizes(**{field: getattr(task, field) for field in ("vocab_size", "max_length", "num_classes", "pairs")})
    for kernel, count in zip((None, 35), PARAMETERS[name], strict=True):
        made = LraClassifier(sizes, lambda _: kinds.softmax_attention, kernel)
        assert sum(parameter.numel() for parameter in made.parameters()) == count
    dropouts = [module.p for module in made.modules() if isinstance(module, nn.Dropout)]
    assert dropouts == [0.1] * (1 + 2 * sizes.num_layers)  # embeddings; each block has one, used twice, and the inner


@pytest.mark.parametrize("kind", get_args(Kind))
def test_padding_and_batch_mates_change_no_score(kind):
    made = model(kind, conv_kernel_size=3, **({"num_landmarks": 4} if "num_landmarks" in DEFAULTS[kind] else {}))
    ids = torch.randint(1, 20, (2, 40))
    lengths = torch.tensor([[40], [23]])
    mask = torch.arange(40) < lengths
    want = [made(ids[:1]).logits, made(ids[1:, :23]).logits]
    other = torch.where(mask, ids, torch.randint(1, 20, (2, 40)))
    for batch in (ids, other):
        got = made(batch, mask).logits
        torch.testing.assert_close(got, torch.cat(want), atol=2e-5, rtol=2e-5)


def test_the_mean_is_taken_over_valid_tokens_or_as_published_over_all():
    ids, mask = torch.randint(1, 20, (2, 40)), torch.arange(40) < torch.tensor([[40], [23]])
    valid, published = (model("softmax", replace(SMALL, mean_over_all=over)) for over in (False, True))
    ratio = published.pool(ids, mask) / valid.pool(ids, mask)
    torch.testing.assert_close(ratio, torch.tensor([[40 / 64], [23 / 64]]).expand(2, 8))
    torch.testing.assert_close(valid.pool(ids, mask)[1], valid.encoder(ids[1:, :23]).mean(1)[0], atol=1e-5, rtol=1e-5)


def test_pairs_are_compared_by_what_the_authors_compare():
    made = model("softmax", replace(SMALL, pairs=True))
    one, two = torch.randint(1, 20, (2, 2, 30)).unbind()
    a, b = made.pool(one, None), made.pool(two, None)
    want = made.head(torch.cat([a, b, a * b, a - b], 1))
    torch.testing.assert_close(made(one, None, two).logits, want)
    with pytest.raises(ValueError, match="pair_ids must be given where inputs are pairs, and only there: pairs=True"):
        made(one)
    with pytest.raises(ValueError, match="only there: pairs=False"):
        model("softmax")(one, None, two)
    labels = torch.tensor([0, 2])
    found = made(one, pair_ids=two, labels=labels)
    torch.testing.assert_close(found.loss, nn.functional.cross_entropy(found.logits, labels))


def test_both_softmaxes_are_one_function():
    q, k, v = torch.randn(3, 2, 2, 9, 4, dtype=torch.float64).unbind()
    mask = torch.rand(2, 9) < 0.6
    mask[:, 0] = True
    for given in (None, mask):
        fused, plain = (f(q, k, v, given) for f in (kinds.softmax_attention, kinds.softmax_matrix_attention))
        torch.testing.assert_close(fused, plain)


def test_kinds_settings_and_reports_agree():
    assert set(DEFAULTS) == set(get_args(Kind)) == set(READ_BY)
    for kind, defaults in DEFAULTS.items():
        assert set(defaults) <= READ_BY[kind]
        assert resolve(kind, Settings()) == defaults
    assert set(PUBLISHED) <= set(DEFAULTS)
    assert all(set(found) == set(TASKS) for found in PUBLISHED.values())
    assert resolve("nystrom", Settings(num_landmarks=128, conv_kernel_size=0)) == {
        "num_landmarks": 128,
        "num_pinv_iters": 6,
        "conv_kernel_size": 0,
    }
    with pytest.raises(ValueError, match="attention linear does not read num_landmarks, but conv_kernel_size: got 3"):
        resolve("linear", Settings(num_landmarks=3))


# Schedules


def rates(schedule: Any, optimizer: torch.optim.Optimizer, steps: int) -> np.ndarray:
    found = []
    for _ in range(steps):
        found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
        optimizer.step()
        if len(found) < steps:
            schedule.step()
    return np.array(found)


def test_one_cycle_moves_the_rate_up_and_down_and_beta_the_other_way():
    optimizer = protocol.make_optimizer(nn.Linear(1, 1), 1e-4)
    assert optimizer.defaults["eps"] == 1e-6 and optimizer.defaults["weight_decay"] == 0
    found = rates(protocol.one_cycle(optimizer, 1e-4, 100, 20), optimizer, 100)
    step = np.arange(100)
    up, down = step / 19, (step - 19) / 80
    rate = np.where(step <= 19, 4e-6 + up * (1e-4 - 4e-6), 1e-4 + down * (4e-10 - 1e-4))
    beta = np.where(step <= 19, 0.95 - 0.1 * up, 0.85 + 0.1 * down)
    np.testing.assert_allclose(found[:, 0], rate, atol=1e-12)
    np.testing.assert_allclose(found[:, 1], beta, atol=1e-9)
    protocol.one_cycle(optimizer, 1e-4, 4, 0)  # the shortest run


def test_the_rate_follows_what_is_done():
    optimizer = protocol.make_optimizer(nn.Linear(1, 1), 1.0)
    done = iter([0.0, 0.1, 0.2, 0.6, 1.0, 1.3])
    found = rates(protocol.up_and_down(optimizer, 0.2, lambda: next(done)), optimizer, 6)
    np.testing.assert_allclose(found[:, 0], [0.04, 0.52, 1.0, 0.5, 0.0, 0.0], atol=1e-12)
    assert (found[:, 1] == 0.9).all()


# Runs

FEW = dict(batch_size=8, dev_examples=16, test_examples=20, steps=12, eval_steps=4, precision="float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Short expressions in the official files."""
    folder = tmp_path_factory.mktemp("listops")
    found = listops.splits(0, {"train": 60, "dev": 24, "test": 24}, Limits(4, 5, 10, 60))
    for name, file in listops_files.FILES.items():
        listops_files.write_file(folder / file, found[name])
    return folder


@pytest.fixture
def config(data, tmp_path) -> ListOps:
    return ListOps(data=data, out=tmp_path / "run", cache=tmp_path / "cache", num_landmarks=8, **FEW)


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", [kind for kind in get_args(Kind) if "residual" not in kind])
def test_every_kind_trains(kind, config):
    found = lra.train(replace(config, attention=kind, num_landmarks=None, steps=4, out=config.out / kind))
    assert found["attention"] == kind and found["settings"] == DEFAULTS[kind] and found["steps"] == 4
    assert found["score"]["value"] == found["scores"]["accuracy"] and 0 <= found["score"]["value"] <= 1
    assert found["examples_per_second"] == pytest.approx(4 * 8 / found["seconds"])
    assert 0 <= found["peak_memory"] < 2**31 and found["steps_of_the_authors"] == 5000
    assert not list(config.out.rglob("checkpoint-*"))


def test_the_best_model_on_the_dev_set_is_scored_once(config):
    found = lra.train(replace(config, lr=0.02, steps=24))
    looks = [entry["eval_score"] for entry in found["curve"] if "eval_score" in entry]
    assert len(looks) == 6 and found["scores"]["dev_accuracy"] == max(looks)
    splits = lra.read(config, TASKS["listops"])
    assert found["examples"] == {"train": 60, "dev": 16, "test": 16}  # 20 are two batches of 8 and four left out
    made = lra.build_model(config, TASKS["listops"], found["settings"]).eval()
    from safetensors.torch import load_model

    load_model(made, config.out / "model.safetensors")
    collate = lra.make_collate(zero_is_padding=True)
    for part, want in ((splits.dev, max(looks)), (splits.test, found["scores"]["accuracy"])):
        batch = collate([part[i] for i in range(len(part))])
        right = made(batch["input_ids"], batch["attn_mask"]).logits.argmax(1) == batch["labels"]
        assert right.float().mean().item() == pytest.approx(want)
    assert len(lra.read(replace(config, preset="clean"), TASKS["listops"]).test) == 20  # all are counted


def test_a_seed_repeats_and_a_killed_run_ends_where_it_would_have(config, tmp_path):
    arguments = ["lra", "listops", "--data", str(config.data), "--num-landmarks", "8", "--seed", "3"]
    arguments += [word for name, value in FEW.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    arguments += ["--steps", "40", "--eval-steps", "10", "--group-lengths", "False"]
    program = [sys.executable, "-c", "from nystrom.cli import main; main()", *arguments, "--out", str(config.out)]
    with open(tmp_path / "log", "w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        running = subprocess.Popen(program, stdout=log, stderr=log, env=environment)
        while not (config.out / "checkpoint-20" / "complete").exists():
            assert running.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.005)
        running.kill()
        running.wait()
    assert not (config.out / "metrics.json").exists()
    cli.run([*arguments, "--out", str(config.out), "--resume"])
    cli.run([*arguments, "--out", str(tmp_path / "whole")])
    assert weights(config.out) == weights(tmp_path / "whole")
    one, two = metrics(config.out), metrics(tmp_path / "whole")
    assert one["scores"] == two["scores"] and one["steps"] == two["steps"] == 40
    kept = ("loss", "eval_score", "learning_rate", "step")
    curves = [[{k: entry[k] for k in kept if k in entry} for entry in found["curve"]] for found in (one, two)]
    assert curves[0] == curves[1]


@pytest.mark.parametrize(("preset", "restarts"), [("paper", 0), ("clean", 0), ("clean", 1)])
def test_two_processes_learn_what_one_does(config, tmp_path, monkeypatch, preset, restarts):
    """With as many examples a step, launched by torchrun; also where one of them dies on the way."""
    still = "import torch; torch.nn.Dropout.forward = lambda self, x: x; "
    arguments = ["lra", "listops", "--data", str(config.data), "--num-landmarks", "8", "--preset", preset]
    arguments += [word for name, value in FEW.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    arguments += ["--lr", "0.01", "--steps", "7", "--out", str(config.out)]  # to the end of an epoch, which is short
    program = [sys.executable, "-c", still + "from nystrom.cli import main; main()", *arguments, "--batch-size", "4"]
    process = torchrun(program, "--max-restarts", str(restarts))
    if restarts:
        kill_rank(process, (config.out / "checkpoint-4" / "complete").is_file, "1")
    said, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert said.count("test accuracy") == 1
    assert len(json.loads((config.out / "run.json").read_text()).get("resumed", [])) == restarts
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)
    one = lra.train(replace(config, preset=preset, lr=0.01, steps=7, out=tmp_path / "one"))
    two = metrics(config.out)
    assert one["examples"] == two["examples"] and one["steps"] == two["steps"] == 7
    assert two["examples_per_second"] == pytest.approx(7 * 8 / two["seconds"])
    for name in ("loss", "eval_loss"):
        curves = [[entry[name] for entry in found["curve"] if name in entry] for found in (one, two)]
        assert curves[1] == pytest.approx(curves[0], rel=1e-3)


def test_a_budget_ends_the_run_and_has_its_looks(config):
    found = lra.train(replace(config, budget=0.05, eval_steps=None, steps=None))
    assert 3 <= found["seconds"] < 6 and found["steps"] < 5000
    looks = [entry for entry in found["curve"] if "eval_score" in entry]
    assert 6 <= len(looks) <= 8 and looks[-1]["step"] == found["steps"]  # two may fall on one step
    short = lra.train(replace(config, budget=5.0, eval_steps=None, out=config.out / "short"))
    assert short["steps"] == 12 and sum("eval_score" in entry for entry in short["curve"]) >= 1  # steps came first
    spent = lra.train(replace(config, budget=1e-6, eval_steps=None, out=config.out / "spent"))
    assert spent["steps"] == 1 and sum("eval_score" in entry for entry in spent["curve"]) == 1


def test_processes_go_by_one_clock(config):
    """One of them is slower in all that is timed; at a budget's end both must stop, and before learn at one rate."""
    slow = (
        "import atexit, os; atexit.register(os.abort); "  # as gloo's threads do now and then, when both have ended
        "from nystrom import training; begin = training.Clock.on_step_begin; "
        "training.Clock.on_step_begin = lambda self, *a, **k: "
        "(begin(self, *a, **k), setattr(self, '_begin', self._begin - int(os.environ['RANK']))) and None; "
    )
    arguments = ["lra", "listops", "--data", str(config.data), "--attention", "linear", "--out", str(config.out)]
    few = {name: value for name, value in FEW.items() if name not in ("steps", "eval_steps")}
    arguments += [word for name, value in few.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    process = torchrun(
        [sys.executable, "-c", slow + "from nystrom.cli import main; main()", *arguments, "--budget", "0.05"]
    )
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    found = metrics(config.out)
    assert 3 <= found["seconds"] < 6 and found["steps"] > 4  # the slower one's would be over after three steps


def test_the_presets_differ_as_they_say(config, tmp_path, monkeypatch):
    task = TASKS["image"]
    for preset, padding, over in (("paper", True, True), ("clean", False, False)):
        chosen = replace(config, preset=preset, attention="softmax", num_landmarks=None)
        made = lra.build_model(chosen, task, DEFAULTS["softmax"])
        assert made.sizes.mean_over_all == over
        trainer = lra.build_trainer(chosen, task, lra.read(chosen, TASKS["listops"]), made)
        assert trainer.args.max_grad_norm == (0.0 if preset == "paper" else 1.0)
        batch = trainer.data_collator([{"input_ids": np.array([0, 5]), "labels": 0}])
        assert ("attn_mask" in batch) == padding  # a black pixel, or none to be masked
        assert isinstance(trainer.lr_scheduler, torch.optim.lr_scheduler.OneCycleLR) == (preset == "paper")
        assert isinstance(trainer._get_train_sampler(), LengthGrouped) == (preset == "clean")
        # said, they go before the preset
        chosen = replace(chosen, group_lengths=preset == "paper", max_grad_norm=0.5)
        trainer = lra.build_trainer(chosen, task, lra.read(chosen, TASKS["listops"]), made)
        assert isinstance(trainer._get_train_sampler(), LengthGrouped) == (preset == "paper")
        assert trainer.args.max_grad_norm == 0.5


def test_a_run_that_diverged_says_so_and_leaves_no_numbers(config):
    """argmax takes a row of NaN for class 0, and the loss that transformers logs is never NaN."""
    with pytest.raises(ValueError, match="the scores of 16 of 16 examples are not finite: training has diverged; pass"):
        lra.train(replace(config, attention="linear", num_landmarks=None, lr=1e30, eval_steps=12))
    assert not (config.out / "metrics.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=3), "steps must be at least 4: got 3"),
        (dict(lr=0.0), "lr must be positive and finite: got 0.0"),
        (dict(budget=-1.0, eval_steps=None), "budget must be positive and finite: got -1.0"),
        (dict(budget=1.0), "eval_steps is not read with a budget, which has eight looks: got 4"),
        (dict(attention="linear"), "attention linear does not read num_landmarks, but conv_kernel_size: got 8"),
        (dict(conv_kernel_size=4), "conv_kernel_size must be odd"),
        (dict(dev_examples=25), "the dev set has 24 examples: asked for 25"),
        (dict(precision="float16"), "precision float16 needs a GPU"),
        (dict(resume=True), "run: no run to resume"),
        (dict(max_grad_norm=-1.0), "max_grad_norm must be at least 0 and finite: got -1.0"),
        (
            dict(test_examples=7),
            "the last short batch of the test set, here all 7 examples of it: a batch has 8; pass a",
        ),
        (dict(num_landmarks=0), "num_landmarks must be an integer of at least 1: got 0"),
        (dict(num_pinv_iters=-1), "num_pinv_iters must be an integer of at least 1: got -1"),
        (dict(attention="longformer", num_landmarks=None, window=7), "window must be even and at least 2"),
        (dict(data=Path("nowhere")), "nowhere"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(changes, message, config, tmp_path):
    if changes.get("precision") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises((ValueError, OSError), match=message):
        lra.train(replace(config, **changes))
    assert not config.out.exists()


def test_text_and_retrieval_train(config, tmp_path):
    words = {"neg": "bad ", "pos": "good "}
    for split in ("train", "test"):
        for label, word in words.items():
            (tmp_path / "aclImdb" / split / label).mkdir(parents=True)
            for i in range(16):
                (tmp_path / "aclImdb" / split / label / f"{i}_5.txt").write_text(word * (i + 1))
    few = {**FEW, "steps": 4, "cache": tmp_path / "cache", "attention": "none"}
    found = lra.train(Text(data=tmp_path / "aclImdb", out=tmp_path / "text", **few))
    assert found["task"] == "text" and found["parameters"] == PARAMETERS["text"][1]
    for part in ("train", "eval", "test"):
        rows = "".join(f"{i % 2}\ta\tb\t{'x ' * (i + 1)}\t{'y ' * 9}\n" for i in range(24))
        (tmp_path / f"new_aan_pairs.{part}.tsv").write_text(rows)
    found = lra.train(Retrieval(data=tmp_path, out=tmp_path / "pairs", **few))
    assert found["task"] == "retrieval" and found["parameters"] == PARAMETERS["retrieval"][1]


# The table


def test_the_table_has_ours_beside_the_published(config, tmp_path, capsys):
    for seed in (0, 1):
        lra.train(replace(config, seed=seed, out=tmp_path / "runs" / f"a{seed}", steps=4))
    lra.train(replace(config, attention="linear", num_landmarks=None, steps=4, out=tmp_path / "runs" / "b"))
    capsys.readouterr()
    cli.run(["lra", "table", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert (tmp_path / "out" / "lra.md").read_text() == said
    scores = [metrics(tmp_path / "runs" / f"a{seed}")["score"]["value"] for seed in (0, 1)]
    mean, sd = 100 * np.mean(scores), 100 * np.std(scores, ddof=1)
    assert f"| nystrom, num_landmarks 8 | {mean:.2f} ± {sd:.2f} at 0.02 % of the examples |" in said
    score = 100 * metrics(tmp_path / "runs" / "b")["score"]["value"]
    assert f"| linear | {score:.2f} at 0.02 % of the examples |" in said  # 4 of 5000 steps, 8 of 32 examples
    assert "\n- ListOps: train 60, dev 16, test 16, steps 4, batch_size 8, precision float32\n" in said
    lines = [json.loads(line) for line in (tmp_path / "out" / "lra.jsonl").read_text().splitlines()]
    assert [line["attention"] for line in lines] == ["nystrom", "linear"] and lines[0]["seeds"] == [0, 1]
    assert lines[0]["published"] is None and lines[0]["accuracy"]["each"] == scores
    assert (tmp_path / "out" / "lra.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileNotFoundError, match="no finished run of Long Range Arena in there"):
        (tmp_path / "none").mkdir()
        cli.run(["lra", "table", str(tmp_path / "none")])
    cli.run(["report", str(tmp_path / "runs")])  # it knows these runs too
    assert "| listops (accuracy) |" in capsys.readouterr().out


def made(folder, kind="nystrom", task="listops", score=0.25, **changed):
    """A run folder as `lra` leaves it, to see how the table sets several side by side."""
    folder.mkdir(parents=True)
    own = {"steps": None, "budget": None, "lr": 1e-4, "preset": "paper", "num_landmarks": None, "seed": 0, **changed}
    about = {"recipe": "lra", "config": {"attention": kind, **own}, "environment": {}}
    count = own["steps"] or 320
    settings = resolve(kind, Settings(**{name: own[name] for name in Settings._fields if name in own}))
    found = {"task": task, "attention": kind, "seed": own["seed"], "score": {"name": "accuracy", "value": score}}
    found |= {"settings": settings, "seconds": 32 * count / 40.0}
    found |= {"scores": {"accuracy": score}, "examples": {"train": 8}, "steps": count, "steps_of_the_authors": 5000}
    found |= {"examples_per_second": 40.0, "peak_memory": 2**21}
    for name, content in (("run.json", about), ("metrics.json", found)):
        (folder / name).write_text(json.dumps(content))


def test_runs_of_other_settings_do_not_hide_each_other_in_the_table(tmp_path, capsys):
    made(tmp_path / "a", "softmax", budget=20.0)
    made(tmp_path / "b", budget=20.0)
    made(tmp_path / "c", steps=5000)
    made(tmp_path / "d", budget=20.0, num_landmarks=128)
    made(tmp_path / "e", budget=20.0, preset="clean")
    cli.run(["lra", "table", str(tmp_path)])
    said = capsys.readouterr().out
    assert "| attention | ListOps, budget 20 | ListOps, budget default |" in said
    assert "| nystrom | 320, 40, 2 | 5,000, 40, 2 |" in said
    assert "| nystrom, num_landmarks 128 | 320, 40, 2 | – |" in said
    assert "| nystrom | 25.00 at 6.4 % of the examples (37.15) | 25.00 (37.15) |" in said
    assert "| nystrom, num_landmarks 128 | 25.00 at 6.4 % of the examples | – |" in said
    assert "preset clean" in said and "Not made alike" not in said


def test_what_was_said_and_what_was_left_out_are_one_attention(tmp_path, capsys):
    made(tmp_path / "a")
    made(tmp_path / "b", num_landmarks=64, steps=5000, batch_size=32, group_lengths=False, seed=1, score=0.27)
    made(tmp_path / "c", conv_kernel_size=0)
    cli.run(["lra", "table", str(tmp_path)])
    said = capsys.readouterr().out
    assert "| nystrom | 26.00 ± 1.41 at 53 % of the examples (37.15) |" in said  # of 320 and of 5000 steps
    assert "| nystrom, conv_kernel_size 0 | 25.00 at 6.4 % of the examples |" in said


def test_the_table_counts_examples_and_names_what_is_not_the_presets(tmp_path, capsys):
    assert table.USUAL == {field.name: field.default for field in fields(lra.Lra) if field.name in table.USUAL}
    made(tmp_path / "a", task="image", steps=35_000, batch_size=32, lr=1e-3)  # of 256
    made(tmp_path / "b", task="aan-subset", steps=30_000, batch_size=32)
    cli.run(["lra", "table", str(tmp_path)])
    said = capsys.readouterr().out
    assert "| nystrom | 25.00 | 25.00 at 12 % of the examples (41.58) |" in said
    assert "\n- AAN subset: train 8\n- Image: train 8, batch_size 32, lr 0.001\n" in said


def test_the_mean_over_tasks_is_of_kinds_that_made_all_of_them(tmp_path, capsys):
    for kind, scores in {"nystrom": (0.30, 0.61), "linformer": (None, 0.40), "linear": (0.20, 0.50)}.items():
        for task, score in zip(("listops", "text"), scores, strict=True):
            if score is not None:
                made(tmp_path / f"{task}-{kind}", kind, task, score)
    cli.run(["lra", "table", str(tmp_path)])
    said = capsys.readouterr().out
    assert "| attention | ListOps | Text | mean |" in said
    ends = {(line.split(" | ")[0], line.rsplit(" | ", 1)[1]) for line in said.splitlines() if line.startswith("| ")}
    published = (37.15 + 65.52) / 2
    assert {("| nystrom", f"45.50 ({published:.2f}) |"), ("| linformer", "– |"), ("| linear", "35.00 |")} <= ends
    cli.run(["lra", "table", str(tmp_path / "listops-nystrom"), str(tmp_path / "listops-linear")])
    assert "mean" not in capsys.readouterr().out


def test_runs_that_cannot_be_compared_are_named_under_the_table(tmp_path, capsys):
    made(tmp_path / "a", "softmax", steps=5000, cache="here")
    made(tmp_path / "b", steps=5000, lr=1e-3, cache="elsewhere")  # no setting
    cli.run(["lra", "table", str(tmp_path)])
    assert "Not made alike:\n\n- nystrom, ListOps: lr 0.001, not 0.0001" in capsys.readouterr().out
