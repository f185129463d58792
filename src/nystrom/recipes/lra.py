"""Long Range Arena: one task, one kind of attention, one command.

    nystrom lra listops --attention nystrom --preset paper --out runs/listops-nystrom
    nystrom lra text --data aclImdb/ --attention softmax --budget 20 --out runs/text-softmax
    nystrom lra table runs/

"paper" is the protocol of Nyströmformer's authors: their model, parameter for parameter, AdamW with one cycle of the
learning rate (and of beta1), the best checkpoint on the dev set scored once on the test set, black pixels taken for
padding, the mean taken over all places, text's dev set its test set, the test set's last short batch left out. "clean"
mends the last four and beta1, clips gradients, and puts examples of about one length into a batch. OUT holds run.json,
metrics.json, curve.png, checkpoints to resume from, the best model.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch

from nystrom import memory, runs
from nystrom.data.lra import splits
from nystrom.data.lra.sequences import make_collate
from nystrom.data.lra.splits import Splits
from nystrom.lra.kinds import Kind, Settings, make_attend, resolve
from nystrom.lra.model import LraClassifier, Sizes
from nystrom.lra.tasks import TASKS, Task

if TYPE_CHECKING:
    from transformers import Trainer

Preset = Literal["paper", "clean"]


@dataclass(frozen=True, kw_only=True)
class Lra:
    """What all tasks share."""

    attention: Kind = "nystrom"
    """What is compared; the rest of the model is the same."""
    preset: Preset = "paper"
    """"paper": the authors' protocol; "clean": the same without its flaws."""
    out: Path
    """Folder for the model, metrics and logs; must be new or empty, unless --resume."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint."""
    cache: Path = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nystrom" / "lra"
    """Folder for examples that were made or read once."""

    num_landmarks: int | None = None
    """nystrom, nystrom_shift, nystrom_residual (64), skyformer (128) (count)."""
    num_pinv_iters: int | None = None
    """Steps of the inverse: nystrom, nystrom_shift (6) (count)."""
    num_features: int | None = None
    """linformer, performer, performer_relu (256) (count)."""
    num_hashes: int | None = None
    """reformer (2) (count)."""
    window: int | None = None
    """longformer (128 tokens)."""
    block: int | None = None
    """bigbird (64 tokens)."""
    conv_kernel_size: int | None = None
    """Tokens spanned by the convolution skip, 0 for none. Default: 35 for our kinds and for none, else 0."""

    steps: int | None = None
    """Optimiser steps (count). Default: the authors'."""
    budget: float | None = None
    """Stop after so many minutes of training, if not sooner; the learning rate then follows the clock, beta1 stays."""
    batch_size: int | None = None
    """Examples per batch and process (count). Default: the authors'."""
    gradient_accumulation: int = 1
    """Batches per optimiser step (count)."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    max_grad_norm: float | None = None
    """Gradients of a larger norm are scaled down to it; 0: none are. Default: 1 with clean; the authors clip none."""
    group_lengths: bool | None = None
    """Batches of examples of about one length: less padding, which no attention here reads, and so less time. Default:
    with clean alone; the authors' batches are drawn from all lengths."""
    eval_steps: int | None = None
    """Steps between looks at the dev set. Default: the authors'; with --budget, eight looks."""
    dev_examples: int | None = None
    """Look at so many, drawn at random, the same for all runs (count). Default: all."""
    test_examples: int | None = None
    """Score so many, drawn at random, the same for all runs (count). Default: all."""
    precision: runs.Precision = "auto"
    """auto: bfloat16 where the hardware multiplies in it, else float32."""
    seed: int = 0
    """Of the weights, dropout and the order of the examples."""


@dataclass(frozen=True, kw_only=True)
class ListOps(Lra):
    """Nested MIN, MAX, MED and SM of digits, 500 to 2000 tokens, 10 classes."""

    data: Path | None = None
    """Folder of Long Range Arena's basic_{train,val,test}.tsv; default: examples of the same law, made here."""


@dataclass(frozen=True, kw_only=True)
class Text(Lra):
    """Film reviews byte by byte, up to 4,000, positive or negative."""

    data: Path | None = None
    """The aclImdb folder, an archive of it, or the hub's parquet files; default: download."""


@dataclass(frozen=True, kw_only=True)
class Retrieval(Lra):
    """Two papers byte by byte, 4,000 each: does the first cite the second?"""

    data: Path
    """Folder of Long Range Arena's new_aan_pairs.*.tsv, or of papers and acl.txt, from which a task is made."""


@dataclass(frozen=True, kw_only=True)
class Image(Lra):
    """CIFAR-10 in grey, pixel by pixel."""

    data: Path | None = None
    """Folder or archive of the official batches, PNG sheets or the hub's parquet files; default: download."""


@dataclass(frozen=True, kw_only=True)
class Pathfinder(Lra):
    """Are the two dots on one path? Pictures of dashed curves, pixel by pixel."""

    data: Path | None = None
    """Folder or archive in Long Range Arena's layout; default: pictures of the same law, made here."""
    side: Literal["32", "64", "128", "256"] = "32"
    """Pixels along an edge."""
    examples: int = 200_000
    """How many are made, of which a tenth is the dev set and a tenth the test set (count)."""


def run(config: Lra) -> None:
    """Train, and print the accuracy on the test set."""
    from accelerate import PartialState

    found = train(config)
    PartialState().print(
        f"{config.out}: {found['task']}, {found['attention']}: test accuracy {100 * found['scores']['accuracy']:.2f} % "
        f"after {found['steps']:,} steps, {found['examples_per_second']:.1f} examples/s"
    )


def train(config: Lra) -> dict[str, Any]:
    """Run the experiment, and return what metrics.json holds.

    Raises:
        FileExistsError: out is not empty, and resume is off.
        ValueError, OSError: data or settings that cannot be used, before anything is written; later a full disk.
    """
    from accelerate import PartialState
    from transformers import set_seed

    state = PartialState(cpu=not torch.accelerator.is_available())
    check_settings(config)
    if state.is_main_process:
        runs.check_out(config.out, config, config.resume)
    task = task_of(config)
    settings = resolve(config.attention, Settings(*(getattr(config, name) for name in Settings._fields)))
    with state.main_process_first():  # one fills the cache
        found = read(config, task)
    set_seed(config.seed)
    model = build_model(config, task, settings)
    if state.is_main_process:
        print(about(config, found, model, settings), flush=True)
        runs.start(config.out, "lra", config)
    state.wait_for_everyone()
    if (config.out / "metrics.json").is_file():
        return runs.read_json(config.out / "metrics.json")
    with runs.full_disk_told(config.out):
        return fit(config, task, found, model, settings)


def about(config: Lra, found: Splits, model: LraClassifier, settings: dict[str, int]) -> str:
    """What is to be learnt from what, by which model."""
    sizes = ", ".join(f"{len(getattr(found, name)):,} to {name}" for name in ("train", "dev", "test"))
    of_kind = ", ".join(f"{name} {value}" for name, value in settings.items())
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{found.task}: {sizes}\nattention {config.attention} ({of_kind}), {count:,} parameters"


def check_settings(config: Lra) -> None:
    """Raise ValueError for a setting out of range; the attention checks its own."""
    counts = ("batch_size", "gradient_accumulation", "eval_steps", "dev_examples", "test_examples")
    runs.check_least(config, {**dict.fromkeys(counts, 1), "steps": 4, "seed": 0})
    rules = {"lr": (0 < config.lr < math.inf, "positive and finite")}
    if config.max_grad_norm is not None:
        rules["max_grad_norm"] = (0 <= config.max_grad_norm < math.inf, "at least 0 and finite")
    if config.budget is not None:
        rules["budget"] = (0 < config.budget < math.inf, "positive and finite")
        if config.eval_steps is not None:
            raise ValueError(f"eval_steps is not read with a budget, which has eight looks: got {config.eval_steps}")
    runs.check_rules(config, rules)
    runs.mixed_precision(config.precision)


def task_of(config: Lra) -> Task:
    """Sizes and schedule of the task."""
    if isinstance(config, Pathfinder):
        side = int(config.side)
        return TASKS["pathfinder32"]._replace(length=side * side, max_length=side * side)
    return TASKS[type(config).__name__.lower()]


def read(config: Lra, task: Task) -> Splits:
    """All examples, checked."""
    paper, processes = config.preset == "paper", os.cpu_count() or 1
    match config:
        case ListOps():
            found = splits.list_ops(config.data, config.cache, processes)
        case Text():
            found = splits.reviews(config.data, task.length, dev_is_test=paper)
        case Retrieval():
            found = splits.papers(config.data, task.length)
        case Image():
            found = splits.pictures(config.data)
        case Pathfinder():
            found = splits.paths(config.data, int(config.side), config.examples, config.cache, processes)
        case _:
            raise TypeError(f"not a task: {type(config).__name__}")
    found = found.limited(config.dev_examples, config.test_examples)
    if paper:  # its loader drops the last short batch
        batch = batch_of(config, task)
        if len(found.test) < batch:
            raise ValueError(
                f"preset paper leaves out the last short batch of the test set, here all {len(found.test)} examples of "
                f"it: a batch has {batch}; pass a smaller --batch-size, or --preset clean"
            )
        found = found._replace(test=found.test.pick(range(len(found.test) // batch * batch)))
    return found


def batch_of(config: Lra, task: Task) -> int:
    """Examples that all processes take at once (count)."""
    from accelerate import PartialState

    return (config.batch_size or task.batch_size) * PartialState().num_processes


def build_model(config: Lra, task: Task, settings: dict[str, int]) -> LraClassifier:
    """A new model, untrained."""
    names = ("vocab_size", "max_length", "num_classes", "pairs")
    sizes = Sizes(**{name: getattr(task, name) for name in names}, mean_over_all=config.preset == "paper")
    make, kernel = make_attend(config.attention, sizes, settings), settings["conv_kernel_size"] or None
    model = LraClassifier(sizes, make, kernel, shared_key=config.attention == "reformer").eval()
    ids = torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # the attention checks its settings when it is called
        model(ids, pair_ids=ids if task.pairs else None)
    return model


def fit(config: Lra, task: Task, found: Splits, model: LraClassifier, settings: dict[str, int]) -> dict[str, Any]:
    """Train, score the best model on the dev set once on the test set, and write the numbers."""
    from nystrom.training import clock, curve, train_from

    trainer = build_trainer(config, task, found, model)
    before = memory.reset_peak()
    train_from(trainer, runs.resume_point(config.out))
    peak = memory.peak_above(before)
    trainer.save_model()
    answer = cast(dict[str, float], trainer.predict(cast(Any, found.test)).metrics)
    seconds, steps = clock(trainer).seconds, trainer.state.global_step
    entries = curve(trainer)
    batch = batch_of(config, task) * config.gradient_accumulation
    scores = {"accuracy": answer["test_score"], "loss": answer["test_loss"]}
    scores["dev_accuracy"] = max(entry["eval_score"] for entry in entries if "eval_score" in entry)
    metrics = {
        "task": found.task,
        "attention": config.attention,
        "settings": settings,
        "seed": config.seed,
        "score": {"name": "accuracy", "value": scores["accuracy"]},
        "scores": scores,
        "examples": {name: len(getattr(found, name)) for name in ("train", "dev", "test")},
        "steps": steps,
        "steps_of_the_authors": task.steps,
        "seconds": seconds,
        "examples_per_second": steps * batch / seconds,
        "peak_memory": peak,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "curve": entries,
    }
    if trainer.is_world_process_zero():
        runs.plot_curve(entries, config.out / "curve.png")
        runs.write_json(config.out / "metrics.json", metrics)
        runs.remove_checkpoints(config.out)
    trainer.accelerator.wait_for_everyone()
    return metrics


def build_trainer(config: Lra, task: Task, found: Splits, model: LraClassifier) -> "Trainer":
    """Hugging Face's Trainer: loop, checkpoints, logs and processes are its business; the schedule is the authors'."""
    from transformers import TrainingArguments

    from nystrom.lra import protocol
    from nystrom.training import Checkpoints, Clock, GroupedTrainer, clock, show_progress

    steps, paper = config.steps or task.steps, config.preset == "paper"
    group = not paper if config.group_lengths is None else config.group_lengths
    clip = float(not paper) if config.max_grad_norm is None else config.max_grad_norm
    looks = 10**9 if config.budget is not None else config.eval_steps or min(task.eval_steps, steps)
    arguments = TrainingArguments(
        output_dir=str(config.out),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size or task.batch_size,
        per_device_eval_batch_size=config.batch_size or task.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        logging_steps=max(1, steps // 100),
        eval_strategy="steps",
        eval_steps=looks,
        save_steps=looks,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        max_grad_norm=clip,
        restore_callback_states_from_checkpoint=True,
        report_to="tensorboard",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
        seed=config.seed,
        use_cpu=not torch.accelerator.is_available(),
        **cast(Any, runs.mixed_precision(config.precision)),
    )

    def elapsed() -> float:
        return clock(trainer).seconds

    def done() -> float:
        by_steps = trainer.state.global_step / steps
        return by_steps if config.budget is None else max(by_steps, elapsed() / (60 * config.budget))

    budget = [] if config.budget is None else [protocol.Budget(60 * config.budget, elapsed)]
    trainer = GroupedTrainer(
        lengths=found.train.lengths() if group else None,
        model=model,
        args=arguments,
        train_dataset=cast(Any, found.train),
        eval_dataset=cast(Any, found.dev),
        data_collator=make_collate(zero_is_padding=paper or not task.images),
        compute_metrics=accuracy,
        callbacks=[Clock(), *budget, Checkpoints()],
    )
    trainer.optimizer = protocol.make_optimizer(model, config.lr)
    rise = task.warmup / task.steps
    if paper and config.budget is None:
        trainer.lr_scheduler = protocol.one_cycle(trainer.optimizer, config.lr, steps, round(rise * steps))
    else:
        trainer.lr_scheduler = protocol.up_and_down(trainer.optimizer, rise, done)
    show_progress(trainer)
    return trainer


def accuracy(answer: Any) -> dict[str, float]:
    """Part of the examples whose likeliest class is theirs.

    Raises:
        ValueError: a score is not finite, which argmax would take for class 0.
    """
    if not np.isfinite(answer.predictions).all():
        bad = (~np.isfinite(answer.predictions).all(-1)).sum()
        raise ValueError(
            f"the scores of {bad} of {len(answer.predictions)} examples are not finite: training has diverged; pass a "
            "lower --lr, a --max-grad-norm, or --precision float32"
        )
    return {"score": float((answer.predictions.argmax(-1) == answer.label_ids).mean())}
