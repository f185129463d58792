"""Fine-tuning a pretrained encoder on GLUE, on IMDB or on a user's own tables, with any attention.

    nystrom finetune glue --task mrpc --data glue/ --model MODEL --attention nystrom --out runs/mrpc
    nystrom finetune imdb --data aclImdb/ --model MODEL --length 512 --out runs/imdb
    nystrom finetune csv --train train.csv --eval dev.csv --text-column text --label-column label --model MODEL

MODEL is a Hugging Face folder or name, or the --out of `nystrom pretrain` or `nystrom convert`. Runs that differ in
--attention alone differ in nothing else: same weights, same order, same seeds. OUT holds the model, run.json (resolved
config, versions, commit), metrics.json, curve.png, the predictions and TensorBoard logs; with several --seeds one such
folder each, and summary.json with mean and standard deviation. `nystrom report` puts runs side by side.
"""

import json
import random
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from nystrom import runs
from nystrom.data import glue, jobs
from nystrom.data.examples import Example
from nystrom.data.jobs import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

Attention = Literal["softmax", "nystrom", "nystrom_shift", "nystrom_residual"]
SETTINGS = ("num_landmarks", "top_k", "window", "block", "exact_below")
CHECKPOINTS = 3 * (4 + 2 * 4)  # bytes a parameter: up to three at a time, with the moments of AdamW


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """What all fine-tuning shares."""

    model: str
    """Folder of a pretrained encoder, or its name on the Hugging Face Hub."""
    out: Path
    """Folder for the model, metrics, predictions and logs; must be new or empty, unless --resume."""
    resume: bool = False
    """Go on with the run in --out, seed by seed from the last checkpoint."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; default: the model's."""
    dry_run: bool = False
    """Print the model's size and what time and memory the run will take, from a few real steps; write nothing."""

    attention: Attention | None = None
    """Default: what the model's folder says."""
    num_landmarks: int | None = None
    """Landmarks per head (count); default 64, or what the model's folder says."""
    top_k: int | None = None
    """Keys that a block of queries reads exactly beside its window, for nystrom_residual (count)."""
    window: int | None = None
    """Tokens around a block that it reads exactly, for nystrom_residual (count)."""
    block: int | None = None
    """Queries that share their exact keys, for nystrom_residual (count)."""
    exact_below: int | None = None
    """Inputs of fewer tokens keep exact attention, which is faster there; 0: none do. Default: 1024 for nystrom, 2048
    for nystrom_shift, 4096 for nystrom_residual."""

    length: int = 128
    """Tokens of an input that are read; the rest is cut off."""
    epochs: float = 3
    """Passes over the training examples."""
    batch_size: int = 32
    """Examples per step and process (count)."""
    gradient_accumulation: int = 1
    """Batches per optimiser step (count)."""
    lr: float = 1e-4
    """Peak learning rate of AdamW, after warm-up; then linear to zero."""
    warmup: float = 0.1
    """Part of the steps spent warming up."""
    weight_decay: float = 0.01
    """Of AdamW."""
    precision: runs.Precision = "auto"
    """auto: bfloat16 where the hardware multiplies in it, else float32."""
    seed: int = 0
    """Of the new head's weights, dropout and the order of the examples."""
    seeds: tuple[int, ...] = ()
    """Several runs instead, each in OUT/seed-N, and mean and standard deviation in OUT/summary.json."""
    train_examples: int | None = None
    """Train on so many examples, drawn at random, the same for all seeds; default: all."""
    eval_examples: int | None = None
    """Score so many examples, drawn at random, the same for all seeds; default: all."""
    hold_out: float = 0.0
    """Part of the training examples to set aside for choosing settings, early stopping or the curve."""
    early_stopping: int | None = None
    """Stop after so many epochs without a better score on the --hold-out part, and keep the best epoch's model."""
    checkpoint_steps: int = 200
    """Steps between checkpoints, which a finished run removes (count)."""


@dataclass(frozen=True, kw_only=True)
class Glue(Finetune):
    """Fine-tune on a GLUE task, and score its dev set by its official metrics."""

    task: Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
    """Which."""
    data: Path | None = None
    """Folder of the original TSV files (MRPC/ and so on), or of parquet files laid out as on the hub; default: download
    from the hub."""
    predict: bool = False
    """Also write the unlabelled test set's predictions, in the format that the benchmark takes."""


@dataclass(frozen=True, kw_only=True)
class Imdb(Finetune):
    """Fine-tune on the IMDB reviews (positive or negative), and score the test reviews."""

    data: Path | None = None
    """The aclImdb folder, its .tar.gz or .tar.xz, or parquet files laid out as on the hub; default: download."""
    length: int = 512
    """Tokens of a review that are read; the rest is cut off."""


@dataclass(frozen=True, kw_only=True)
class Csv(Finetune):
    """Fine-tune on tables of your own: .csv, .tsv, .jsonl or .parquet."""

    train: Path
    """Table to train on."""
    eval: Path
    """Table to score."""
    text_column: str
    """Column of the text."""
    label_column: str
    """Column of the label: a name for each class, or with --regression a number."""
    pair_column: str | None = None
    """Column of a second text, for pairs."""
    regression: bool = False
    """Labels are numbers, to be predicted as such."""


def run(config: Finetune) -> None:
    """Train, and print the scores."""
    if config.dry_run:
        print("\n".join(plan(config)))
        return
    for name, value in train(config)["scores"].items():
        spread = f" ± {value['sd']:.4f} over {len(value['each'])} seeds" if isinstance(value, dict) else ""
        print(f"{name:>20} {value['mean'] if spread else value:.4f}{spread}")
    print(f"Wrote {config.out}")


def train(config: Finetune) -> dict[str, Any]:
    """Run the experiment, and return what metrics.json holds, or with several seeds summary.json.

    Raises:
        FileExistsError: out is not empty, and resume is off.
        ValueError, OSError: data, model or settings that cannot be used. All before anything is written.
    """
    job, tokenizer, model = prepare(config)
    size = sum(p.numel() for p in model.parameters())
    runs.check_out(config.out, config, config.resume, size * (CHECKPOINTS + 4 * max(1, len(config.seeds))))
    runs.start(config.out, "finetune", config)
    if not config.seeds:
        return train_once(config, job, tokenizer, config.seed, config.out)
    folders = [config.out / f"seed-{seed}" for seed in config.seeds]
    done = [
        train_once(config, job, tokenizer, seed, folder) for seed, folder in zip(config.seeds, folders, strict=True)
    ]
    return runs.summarise(config.out, config.seeds, done)


def plan(config: Finetune) -> list[str]:
    """What the run will take, from a few real steps on the longest inputs and on usual ones; nothing is kept."""
    from nystrom.hf.classifier import attention_of
    from nystrom.training import clock

    job, tokenizer, model = prepare(config)
    train_set = encode(config, tokenizer, job.train)
    batch = config.batch_size * config.gradient_accumulation
    longest = sorted(train_set, key=lambda row: len(row["input_ids"]))[-batch:]
    usual = random.Random(0).choices(train_set, k=4 * batch)
    with tempfile.TemporaryDirectory() as folder:
        probe = replace(config, epochs=1, early_stopping=None)
        rates = []
        for rows in (longest, usual):
            trainer = build_trainer(probe, job, model, tokenizer, rows, {}, config.seed, Path(folder))
            trainer.train()
            rates.append(num_tokens(rows) / clock(trainer).seconds)
    tokens = num_tokens(train_set)
    seconds = tokens * config.epochs * max(1, len(config.seeds)) / rates[1]
    return [
        f"{sum(p.numel() for p in model.parameters()):,} parameters, attention {attention_of(model)}",
        f"{len(train_set):,} training examples of {tokens / len(train_set):.0f} tokens in the mean",
        f"about {seconds / 60:.1f} minutes of training at {rates[1]:.0f} tokens/s, scoring not counted",
        f"about {runs.peak_memory() / 2**20:.0f} MiB of memory",
    ]


def prepare(config: Finetune) -> "tuple[Job, PreTrainedTokenizerBase, PreTrainedModel]":
    """Data, tokenizer and model, all of them checked."""
    check_settings(config)
    runs.mixed_precision(config.precision)
    job, tokenizer = read(config), load_tokenizer(config)
    model = load_model(config, job)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, and {config.model} knows {model.config.vocab_size}; "
            "pass the model's own"
        )
    return job, tokenizer, model


def check_settings(config: Finetune) -> None:
    """Raise ValueError for a setting out of range."""
    least = {"length": 3, "batch_size": 1, "gradient_accumulation": 1, "seed": 0, "checkpoint_steps": 1}
    least |= {"train_examples": 1, "eval_examples": 1, "early_stopping": 1}
    for name, lowest in least.items():
        value = getattr(config, name)
        if value is not None and value < lowest:
            raise ValueError(f"{name} must be at least {lowest}: got {value}")
    for name in ("lr", "epochs"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive: got {getattr(config, name)}")
    if not config.weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative: got {config.weight_decay}")
    for name in ("warmup", "hold_out"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 0 and below 1: got {getattr(config, name)}")
    if len(set(config.seeds)) < len(config.seeds) or any(seed < 0 for seed in config.seeds):
        raise ValueError(f"seeds must differ and be at least 0: got {config.seeds}")
    if config.early_stopping is not None and config.hold_out == 0:
        raise ValueError(
            "early_stopping chooses an epoch, which the scored set must not do: got hold_out = 0; pass --hold-out 0.1"
        )


def read(config: Finetune) -> Job:
    """All examples, checked."""
    match config:
        case Glue():
            job = jobs.from_glue(config.task, config.data, config.predict)
        case Imdb():
            job = jobs.from_reviews(config.data)
        case Csv():
            columns = (config.text_column, config.label_column, config.pair_column)
            job = jobs.from_tables(config.train, config.eval, *columns, config.regression)
        case _:
            raise TypeError(f"not a task: {type(config).__name__}")
    job = jobs.limited(job, config.train_examples, config.eval_examples)
    return jobs.with_hold_out(job, config.hold_out) if config.hold_out else job


def load_tokenizer(config: Finetune) -> "PreTrainedTokenizerBase":
    """The tokenizer named, or the model's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(config.tokenizer or config.model)


def load_model(config: Finetune, job: Job) -> "PreTrainedModel":
    """The pretrained encoder with a new head, and the attention asked for."""
    from nystrom.hf.classifier import load_classifier

    given = {name: getattr(config, name) for name in SETTINGS if getattr(config, name) is not None}
    return load_classifier(config.model, job.labels, config.length, config.attention, given)


def encode(config: Finetune, tokenizer: "PreTrainedTokenizerBase", examples: list[Example]) -> list[dict[str, Any]]:
    """Token ids of each example, cut to the length."""
    texts = [example.text for example in examples]
    pairs = None if examples[0].pair is None else [cast(str, example.pair) for example in examples]
    encoded = tokenizer(texts, pairs, truncation=True, max_length=config.length, return_attention_mask=False)
    fields = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    return [
        row if example.label is None else row | {"labels": example.label}
        for row, example in zip(fields, examples, strict=True)
    ]


def num_tokens(rows: list[dict[str, Any]]) -> int:
    return sum(len(row["input_ids"]) for row in rows)


def train_once(
    config: Finetune, job: Job, tokenizer: "PreTrainedTokenizerBase", seed: int, out: Path
) -> dict[str, Any]:
    """One run, to its end; a finished one is not repeated."""
    from transformers import set_seed

    if (out / "metrics.json").is_file():
        return json.loads((out / "metrics.json").read_text())
    if config.seeds:
        runs.start(out, "finetune", replace(config, out=out, seed=seed, seeds=()))
    set_seed(seed)
    model = load_model(config, job)
    train_set = encode(config, tokenizer, job.train)
    eval_sets = {name: encode(config, tokenizer, examples) for name, examples in job.evals.items()}
    trainer = build_trainer(config, job, model, tokenizer, train_set, eval_sets, seed, out)
    point = runs.resume_point(out)
    trainer.train(resume_from_checkpoint=None if point is None else str(point))
    trainer.save_model()
    scores: dict[str, float] = {}
    for name, eval_set in eval_sets.items():
        answer = trainer.predict(cast(Any, eval_set), metric_key_prefix=name)
        prefix = f"{name}_" if scores else ""  # the first set is the one that is reported
        found = cast(dict[str, float], answer.metrics)
        scores |= {prefix + metric: found[f"{name}_{metric}"] for metric in ("score", *job.metrics, "loss")}
        jobs.write_predictions(
            job, job.evals[name], jobs.decide(job, answer.predictions), out / f"predictions-{name}.tsv"
        )
    for file, examples in job.predict.items():
        answer = trainer.predict(cast(Any, encode(config, tokenizer, examples)))
        indices = [example.index for example in examples]
        glue.write_predictions(glue.TASKS[job.task], out / file, indices, jobs.decide(job, answer.predictions))
    return finish(job, trainer, scores, num_tokens(train_set), seed, out)


def build_trainer(
    config: Finetune,
    job: Job,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    train_set: list[dict[str, Any]],
    eval_sets: dict[str, list[dict[str, Any]]],
    seed: int,
    out: Path,
) -> "Trainer":
    """Hugging Face's Trainer: loop, schedule, checkpoints, logs and processes are its business."""
    from transformers import DataCollatorWithPadding, EarlyStoppingCallback, TrainingArguments

    from nystrom.training import Clock, GroupedTrainer, MarkComplete, show_progress

    patience = config.early_stopping
    stops = patience is not None
    arguments = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.lr,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup,  # below 1: a part of all steps
        weight_decay=config.weight_decay,
        logging_steps=10,
        eval_strategy="epoch" if eval_sets else "no",
        save_strategy=("epoch" if stops else "steps") if eval_sets else "no",
        save_steps=config.checkpoint_steps,
        save_total_limit=2,
        load_best_model_at_end=stops,
        metric_for_best_model="score" if stops else None,
        restore_callback_states_from_checkpoint=True,
        report_to="tensorboard" if eval_sets else "none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
        seed=seed,
        use_cpu=not torch.accelerator.is_available(),
        **cast(Any, runs.mixed_precision(config.precision)),
    )
    trainer = GroupedTrainer(
        lengths=[len(row["input_ids"]) for row in train_set],
        model=model,
        args=arguments,
        train_dataset=cast(Any, train_set),  # a list of examples is a map-style dataset
        eval_dataset=cast(Any, eval_sets.get(jobs.HOLD_OUT, next(iter(eval_sets.values()), None))),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda answer: jobs.score(job, answer.predictions, answer.label_ids),
        callbacks=[MarkComplete(), Clock(), *([EarlyStoppingCallback(patience)] if patience else [])],
    )
    show_progress(trainer)
    return trainer


def finish(job: Job, trainer: "Trainer", scores: dict[str, float], tokens: int, seed: int, out: Path) -> dict[str, Any]:
    """Write curve.png and metrics.json; the checkpoints, which a finished run needs no more, go."""
    from nystrom.hf.classifier import attention_of
    from nystrom.training import clock

    model = cast("PreTrainedModel", trainer.model)
    seconds = clock(trainer).seconds
    curve = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_score" in entry]
    report = {
        "task": job.task,
        "attention": attention_of(model),
        "seed": seed,
        "score": {"name": " and ".join(job.metrics), "value": scores.pop("score")},
        "scores": scores,
        "examples": {"train": len(job.train), **{name: len(examples) for name, examples in job.evals.items()}},
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "tokens_per_second": tokens * cast(float, trainer.state.epoch) / seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": curve,
    }
    runs.plot_curve(curve, out / "curve.png")
    runs.write_json(out / "metrics.json", report)
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return report
