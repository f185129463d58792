"""Run folders: what a training run leaves behind, and what it may go on from.

OUT/run.json       recipe, resolved config, versions, commit
OUT/metrics.json   the numbers, written at the end: its presence says that the run is finished
OUT/curve.png      the loss and the scores over the steps
OUT/checkpoint-*/  to resume from; one without the file `complete` was cut off while it was written
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from nystrom.environment import describe

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Precision = Literal["auto", "float32", "bfloat16", "float16"]
COMPLETE = "complete"
"""File in a checkpoint, written after all others."""
FULL_DISK = ("No space left on device", "Disk quota exceeded")
CHECKPOINTS = 3 * (4 + 2 * 4)
"""Bytes a parameter of checkpoints: up to three at a time, with the moments of AdamW."""
BLOCK = 2**16
"""Less room than this (bytes) is none: torch's errors of a full disk do not say so."""


def check_least(config: "DataclassInstance", least: Mapping[str, int]) -> None:
    """Raise ValueError where a setting is below its least value; None is left alone."""
    for name, lowest in least.items():
        value = getattr(config, name)
        if value is not None and value < lowest:
            raise ValueError(f"{name} must be at least {lowest}: got {value}")


def check_rules(config: "DataclassInstance", rules: Mapping[str, tuple[bool, str]]) -> None:
    """Raise ValueError for a setting that does not keep its rule, which is given in words."""
    for name, (kept, rule) in rules.items():
        if not kept:
            raise ValueError(f"{name} must be {rule}: got {getattr(config, name)}")


def check_read(config: "DataclassInstance", needed: Mapping[str, str]) -> None:
    """Raise ValueError where a setting was given that is only read beside another, and that one was not."""
    defaults = {field.name: field.default for field in fields(config)}
    for name, other in needed.items():
        value = getattr(config, name)
        if getattr(config, other) is None and value != defaults[name]:
            raise ValueError(f"{name} is read beside {other} alone: got {value} without it; leave it out")


def check_out(out: Path, config: "DataclassInstance", resume: bool, needed: int = 0) -> None:
    """Never write over an earlier run, nor go on with one under other settings, nor start one that cannot be kept.

    Where `torchrun --max-restarts` has started the processes again after one of them failed, the run that they began is
    gone on with.

    Args:
        out: the run's folder.
        config: its settings; a resumed run keeps them.
        resume: whether to go on with the run in `out`.
        needed: bytes that the run will write, about.

    Raises:
        FileExistsError: out is not an empty folder, and resume is off.
        FileNotFoundError: there is no run to resume.
        ValueError: it had other settings; its run.json is damaged.
        OSError: out cannot be written, or the disk has no room.
    """
    resume = resume or (restarted() and (out / "run.json").is_file())
    if resume:
        check_same(out, config)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists and is not an empty folder; pass another --out, or --resume")
    folder = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{out}: {folder} is not a folder; pass another --out")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{out}: cannot be written: {error.strerror or error}; pass another --out") from None
    held = sum(path.stat().st_size for path in out.rglob("*")) if resume else 0
    free = shutil.disk_usage(folder).free
    if free < needed - held:
        raise OSError(
            f"{out}: the run needs about {(needed - held) / 2**20:.0f} MiB and the disk has {free / 2**20:.0f} MiB "
            "left; make room or pass another --out"
        )


def restarted() -> bool:
    """Whether torchrun has started these processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def check_same(out: Path, config: "DataclassInstance") -> None:
    """Raise unless `out` holds a run with these settings."""
    if not (out / "run.json").is_file():
        raise FileNotFoundError(f"{out}: no run to resume (run.json is missing); leave out --resume to start one")
    before = read_json(out / "run.json").get("config", {})
    now = json.loads(json.dumps(asdict(config), default=str))
    free = ("out", "resume", "dry_run")  # the folder may have been moved
    names = [name for name in {**before, **now} if name not in free and before.get(name) != now.get(name)]
    changed = [f"{name} was {before.get(name)}, is {now.get(name)}" for name in names]
    if changed:
        raise ValueError(f"{out}: a resumed run keeps its settings: {'; '.join(changed)}; pass the first ones")


def start(out: Path, recipe: str, config: "DataclassInstance") -> None:
    """Make the folder and write run.json; a resumed run keeps the first one, and notes what it goes on with."""
    out.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"recipe": recipe, "config": asdict(config), "environment": describe()}
    if (out / "run.json").is_file():
        about = read_json(out / "run.json")
        about.setdefault("resumed", []).append(describe())
    write_json(out / "run.json", about)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a whole file or none."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """What a file of a run holds.

    Raises:
        ValueError: it is not a JSON object; the message names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what is not UTF-8
        raise ValueError(f"{path}: damaged: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged: got {content!s:.60}, not a JSON object")
    return content


def resume_point(out: Path) -> Path | None:
    """The last whole checkpoint, None where there is none; removes those that were cut off while they were written."""
    from accelerate import PartialState

    with PartialState().main_process_first():  # of several processes one removes, and no other looks before
        whole = []
        for folder in out.glob("checkpoint-*"):
            if (folder / COMPLETE).is_file():
                whole.append(folder)
            else:
                shutil.rmtree(folder)
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def remove_checkpoints(out: Path) -> None:
    """A finished run needs none."""
    for folder in out.glob("checkpoint-*"):
        shutil.rmtree(folder)


@contextmanager
def full_disk_told(out: Path) -> Iterator[None]:
    """Raise OSError, with what to do, for any error of a full disk: those of torch and safetensors are no OSErrors."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(out).free
        full = free < BLOCK or any(words in str(error) for words in FULL_DISK)
        if isinstance(error, ValueError) or not full:
            raise
        raise OSError(
            f"{out}: the disk is full ({free / 2**20:.1f} MiB left); make room, then go on from the last checkpoint "
            "with --resume"
        ) from error


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (0 of a single value), and the values."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": sd, "each": list(values)}


def summarise(out: Path, seeds: Sequence[int], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write summary.json: mean and standard deviation over the seeds of what each metrics.json holds."""
    from accelerate import PartialState

    first = runs[0]
    summary = {
        "task": first["task"],
        "attention": first["attention"],
        "seeds": list(seeds),
        "score": {"name": first["score"]["name"], **spread([run["score"]["value"] for run in runs])},
        "scores": {name: spread([run["scores"][name] for run in runs]) for name in first["scores"]},
    }
    if PartialState().is_main_process:
        write_json(out / "summary.json", summary)
    return summary


def plot_curve(curve: list[dict[str, Any]], path: Path) -> None:
    """The training loss over the steps, and beside it the score on held-out data, where it was taken."""
    import matplotlib

    matplotlib.use("agg")  # files only; a window needs a screen
    import matplotlib.pyplot as plt

    losses = [(entry["step"], entry["loss"]) for entry in curve if "loss" in entry]
    scores = [(entry["step"], entry["eval_score"]) for entry in curve if "eval_score" in entry]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for place, points, title in ((axes[0], losses, "Training loss"), (axes[1], scores, "Score on held-out data")):
        place.set(title=title, xlabel="step")
        if points:
            place.plot(*zip(*points, strict=True), marker="o" if len(points) < 30 else None)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)
    partial.replace(path)


def mixed_precision(precision: Precision) -> dict[str, bool]:
    """The arguments of TrainingArguments for a precision; "auto" takes bfloat16 where the hardware has it.

    Raises:
        ValueError: the hardware does not have it.
    """
    cuda = torch.cuda.is_available()
    bfloat16 = torch.cuda.is_bf16_supported() if cuda else _cpu_has_bfloat16()
    if precision == "bfloat16" and not bfloat16:
        raise ValueError("precision bfloat16 is not in this machine's hardware; pass float32, or auto")
    if precision == "float16" and not cuda:
        raise ValueError("precision float16 needs a GPU, and there is none; pass float32, bfloat16 or auto")
    return {"bf16": precision == "bfloat16" or (precision == "auto" and bfloat16), "fp16": precision == "float16"}


def _cpu_has_bfloat16() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()


def leave_together() -> None:
    """Where several processes share a run, end this one with the others, and at once: now and then one aborts while its
    interpreter is taken down with threads of gloo still at work, and torchrun would call the run failed.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
