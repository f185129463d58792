"""Run folders, and what our recipes add to transformers' Trainer."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from nystrom import runs
from nystrom.training import LengthGrouped


@dataclass(frozen=True, kw_only=True)
class Settings:
    out: Path
    lr: float = 0.1
    data: Path = Path("here")
    seeds: tuple[int, ...] = (0, 1)
    resume: bool = False


def test_a_run_goes_on_under_its_settings_alone(tmp_path):
    first = Settings(out=tmp_path / "a" / "run")
    runs.check_out(first.out, first, resume=False)
    assert not (tmp_path / "a").exists()  # a check writes nothing
    runs.start(first.out, "finetune", first)
    before = runs.read_json(first.out / "run.json")
    assert before["recipe"] == "finetune" and before["config"]["data"] == "here"
    assert before["environment"]["packages"]["torch"] == torch.__version__
    with pytest.raises(
        FileExistsError, match=r"run: exists and is not an empty folder; pass another --out, or --resume"
    ):
        runs.check_out(first.out, first, resume=False)
    runs.check_out(first.out, first, resume=True)
    with pytest.raises(ValueError, match=r"keeps its settings: lr was 0.1, is 0.2; seeds was \[0, 1\], is \[0\]; pass"):
        runs.check_out(first.out, Settings(out=first.out, lr=0.2, seeds=(0,)), resume=True)
    shutil.move(first.out, tmp_path / "b")  # a folder may be moved meanwhile
    moved = Settings(out=tmp_path / "b", resume=True)
    runs.check_out(moved.out, moved, resume=True)
    runs.start(moved.out, "finetune", moved)
    after = runs.read_json(moved.out / "run.json")
    assert after.pop("resumed") == [before["environment"]] and after == before


def test_a_damaged_run_json_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"config":')
    with pytest.raises(ValueError, match=r"run.json: damaged: not JSON"):
        runs.check_out(tmp_path, Settings(out=tmp_path), resume=True)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"lr was None, is 0.1"):
        runs.check_out(tmp_path, Settings(out=tmp_path), resume=True)


def test_room_is_asked_for_but_not_twice(tmp_path):
    settings, free = Settings(out=tmp_path / "run"), shutil.disk_usage(tmp_path).free
    with pytest.raises(OSError, match=r"run: the run needs about \d+ MiB and the disk has \d+ MiB left; make room"):
        runs.check_out(settings.out, settings, resume=False, needed=2 * free)
    assert not settings.out.exists()
    runs.start(settings.out, "finetune", settings)
    with open(settings.out / "model.safetensors", "wb") as file:
        file.truncate(3 * free)  # what a resumed run has already written it needs no more; this file is sparse
    runs.check_out(settings.out, settings, resume=True, needed=2 * free)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    runs.write_json(tmp_path / "a.json", {"path": Path("x"), "n": 1})
    assert runs.read_json(tmp_path / "a.json") == {"path": "x", "n": 1}
    with pytest.raises(ValueError, match=r"Circular"):
        circle: dict[str, object] = {}
        circle["circle"] = circle
        runs.write_json(tmp_path / "a.json", circle)
    assert runs.read_json(tmp_path / "a.json")["n"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_last_whole_checkpoint(tmp_path):
    assert runs.resume_point(tmp_path) is None
    for step, whole in ((90, True), (100, True), (1000, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / runs.COMPLETE).touch()
    assert runs.resume_point(tmp_path) == tmp_path / "checkpoint-100"  # by number, not by name
    assert not (tmp_path / "checkpoint-1000").exists() and (tmp_path / "checkpoint-90").exists()
    (tmp_path / "keep").touch()
    runs.remove_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]


def test_only_a_full_disk_is_told_of_as_one(tmp_path):
    with pytest.raises(OSError, match=r"the disk is full \(.* MiB left\); make room, then .* --resume") as told:
        with runs.full_disk_told(tmp_path):
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert isinstance(told.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2$"), runs.full_disk_told(tmp_path):
        raise RuntimeError("mat1 and mat2")


def test_mean_and_deviation_over_seeds(tmp_path):
    values = {"accuracy": [0.5, 0.7, 0.9], "loss": [1.0, 1.5, 1.25]}
    done = [
        {
            "task": "mrpc",
            "attention": "nystrom",
            "score": {"name": "accuracy", "value": values["accuracy"][i]},
            "scores": {name: each[i] for name, each in values.items()},
        }
        for i in range(3)
    ]
    found = runs.summarise(tmp_path, (4, 5, 6), done)
    assert found == json.loads((tmp_path / "summary.json").read_text())
    assert found["seeds"] == [4, 5, 6] and found["score"]["name"] == "accuracy"
    for name, each in values.items():
        expected = {"mean": np.mean(each), "sd": np.std(each, ddof=1)}
        assert found["scores"][name]["each"] == each
        assert {key: found["scores"][name][key] for key in expected} == pytest.approx(expected)
    assert runs.spread([0.5]) == {"mean": 0.5, "sd": 0.0, "each": [0.5]}


def test_a_curve_is_drawn_also_of_nothing(tmp_path):
    for curve in ([], [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}, {"step": 2, "eval_score": 0.8}]):
        runs.plot_curve(curve, tmp_path / "curve.png")
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path) == ["curve.png"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_precision_is_what_the_machine_has():
    assert runs.mixed_precision("float32") == {"bf16": False, "fp16": False}
    with pytest.raises(ValueError, match=r"precision float16 needs a GPU, and there is none; pass float32"):
        runs.mixed_precision("float16")
    if runs.mixed_precision("auto")["bf16"]:
        assert runs.mixed_precision("bfloat16") == {"bf16": True, "fp16": False}
    else:
        with pytest.raises(ValueError, match=r"precision bfloat16 is not in this machine's hardware; pass float32"):
            runs.mixed_precision("bfloat16")


# The order of examples


def epoch(order: LengthGrouped, number: int) -> list[int]:
    order.set_epoch(number)
    return list(order)


@pytest.mark.parametrize(("count", "batch_size"), [(1000, 4), (1003, 4), (3, 8), (401, 8), (1, 1)])
def test_every_epoch_is_an_order_of_all_examples(count, batch_size):
    lengths = torch.randint(3, 100, (count,)).tolist()
    order = LengthGrouped(lengths, batch_size, seed=0)
    assert len(order) == count
    for number in range(3):
        assert sorted(epoch(order, number)) == list(range(count))


def test_a_batch_holds_examples_of_about_one_length():
    """Far less padding than in a random order; the one short batch, if any, comes last; batches are not in order of
    length.
    """
    lengths = torch.randint(3, 100, (1003,)).tolist()
    found = epoch(LengthGrouped(lengths, 4, seed=0), 0)

    def padding(order: list[int]) -> int:
        batches = [[lengths[i] for i in order[start : start + 4]] for start in range(0, len(order), 4)]
        return sum(max(batch) - length for batch in batches for length in batch)

    assert padding(found) < 0.1 * padding(list(range(1003)))
    longest = [max(lengths[i] for i in found[start : start + 4]) for start in range(0, 1000, 4)]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = torch.randint(3, 100, (200,)).tolist()
    first = [epoch(LengthGrouped(lengths, 4, seed=3), number) for number in range(3)]
    torch.manual_seed(99)
    order = LengthGrouped(lengths, 4, seed=3)
    assert [epoch(order, number) for number in (2, 0)] == [first[2], first[0]]  # a resumed run begins with a later one
    assert epoch(order, 1) == first[1] != first[0] != first[2]
    assert epoch(LengthGrouped(lengths, 4, seed=4), 0) != first[0]
