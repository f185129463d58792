"""Fine-tuning a pretrained encoder on GLUE, on IMDB or on a user's own tables, with any attention.

    nystrom finetune glue --task mrpc --data glue/ --model MODEL --attention nystrom --out runs/mrpc
    nystrom finetune imdb --data aclImdb/ --model MODEL --length 512 --out runs/imdb
    nystrom finetune csv --train train.csv --eval dev.csv --text-column text --label-column label --model MODEL

MODEL is a Hugging Face folder or name, or the --out of `nystrom pretrain` or `nystrom convert`. Runs that differ in
--attention alone differ in nothing else: same weights, same order, same seeds. OUT holds the model, run.json (resolved
config, versions, commit), metrics.json, curve.png, the predictions and TensorBoard logs; with several --seeds one such
folder each, and summary.json with mean and standard deviation. `nystrom report` puts runs side by side.
"""

import math
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from nystrom import memory, runs
from nystrom.data import jobs
from nystrom.data.jobs import Encoded, Job
from nystrom.presets import READ_BY, Attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

SETTINGS = ("num_landmarks", "top_k", "window", "block", "exact_below")


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """What all fine-tuning shares."""

    model: str
    """Folder of a pretrained encoder, or its name on the Hugging Face Hub. A head of as many classes is kept."""
    out: Path
    """Folder for the model, metrics, predictions and logs; must be new or empty, unless --resume."""
    resume: bool = False
    """Go on with the run in --out, seed by seed from the last checkpoint."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; default: the model's."""
    dry_run: bool = False
    """Print the model's size and what time and memory the run takes, from a few real steps; write nothing."""

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
    """Shorter inputs keep exact attention, faster there (tokens); 0: none. Default: 1024, shift 2048, residual 4096."""

    length: int = 128
    """Tokens of an input that are read; the rest is cut off."""
    epochs: float = 3.0
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
    """Part of the training examples to set aside, and to score after every epoch, for choosing settings."""
    early_stopping: int | None = None
    """Stop after so many epochs without a better score on the --hold-out part; the best epoch's model is kept."""
    checkpoint_steps: int = 200
    """Steps between checkpoints, which a finished run removes (count)."""


@dataclass(frozen=True, kw_only=True)
class Glue(Finetune):
    """Fine-tune on a GLUE task, and score its dev set by its official metrics."""

    task: Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
    """The task."""
    data: Path | None = None
    """Folder of the original TSV files (MRPC/ and so on), or of the hub's parquet files; default: download."""
    predict: bool = False
    """Also write the unlabelled test set's predictions, in the format that the benchmark takes."""


@dataclass(frozen=True, kw_only=True)
class Imdb(Finetune):
    """Fine-tune on the IMDB reviews (positive or negative), and score the test reviews."""

    data: Path | None = None
    """The aclImdb folder, its .tar.gz or .tar.xz, or a folder of the hub's parquet files; default: download."""
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
    task: str | None = None
    """What reports call it; default: the name of the --train file."""


def run(config: Finetune) -> None:
    """Train, and print the scores."""
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())
    if config.dry_run:
        state.print("\n".join(plan(config)))
        return
    found = train(config)
    for name, value in found["scores"].items():
        spread = f" ± {value['sd']:.4f} over {len(value['each'])} seeds" if isinstance(value, dict) else ""
        state.print(f"{name:>20} {value['mean'] if spread else value:.4f}{spread}")
    state.print(f"Wrote {config.out}")


def train(config: Finetune) -> dict[str, Any]:
    """Run the experiment, and return what metrics.json holds, or with several seeds summary.json.

    Raises:
        FileExistsError: out is not empty, and resume is off.
        ValueError, OSError: data, model or settings that cannot be used, all before anything is written; later a full
            disk, or training that diverged.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.is_main_process:  # alone: the others may already see what it writes next
        runs.check_out(config.out, config, config.resume)  # before the data are read, which takes longer
    job, tokenizer, model = prepare(config)
    size = sum(p.numel() for p in model.parameters())
    encoded = jobs.encoded(job, tokenizer, config.length)
    if state.is_main_process:
        runs.check_out(config.out, config, config.resume, size * (runs.CHECKPOINTS + 4 * max(1, len(config.seeds))))
        print("\n".join(about(job, encoded, model)), flush=True)
        runs.start(config.out, "finetune", config)
    state.wait_for_everyone()
    with runs.full_disk_told(config.out):
        if not config.seeds:
            return train_once(config, job, encoded, tokenizer, config.seed, config.out)
        done = []
        for seed in config.seeds:
            done.append(train_once(config, job, encoded, tokenizer, seed, config.out / f"seed-{seed}"))
            state.print(f"seed {seed}: {done[-1]['score']['name']} {done[-1]['score']['value']:.4f}", flush=True)
        return runs.summarise(config.out, config.seeds, done)


def about(job: Job, encoded: Encoded, model: "PreTrainedModel") -> list[str]:
    """What is to be learnt from what, by which model; and whether the attention asked for will run at all."""
    from nystrom.hf.classifier import attention_of, exact_below

    scored = ", ".join(f"{len(rows):,} of {name}" for name, rows in encoded.evals.items())
    tokens, count = jobs.num_tokens(encoded.train), len(encoded.train)
    lines = [
        f"{job.task}: {count:,} examples to train on, of {tokens / count:.0f} tokens in the mean; scored: {scored}",
        f"{type(model).__name__}, {model.num_parameters():,} parameters, attention {attention_of(model)}",
    ]
    longest, least = encoded.longest(), exact_below(model)
    if longest < least:
        lines.append(
            f"inputs have at most {longest} tokens, and exact_below is {least}: attention stays exact; pass "
            "--exact-below 0 to approximate it"
        )
    return lines


def plan(config: Finetune) -> list[str]:
    """What the run will take, from a few real steps on the longest inputs and on usual ones; nothing is kept."""
    from nystrom.training import clock

    job, tokenizer, model = prepare(config)
    encoded = jobs.encoded(job, tokenizer, config.length)
    batch, rates = config.batch_size * config.gradient_accumulation, []
    longest = sorted(encoded.train, key=lambda row: len(row["input_ids"]))[-batch:]
    usual = random.Random(0).choices(encoded.train, k=4 * batch)
    with tempfile.TemporaryDirectory() as folder:
        probe = replace(config, epochs=1.0, early_stopping=None)
        for rows in (longest, usual):
            trainer = build_trainer(probe, job, model, tokenizer, Encoded(rows, {}, {}), config.seed, Path(folder))
            trainer.train()
            rates.append(jobs.num_tokens(rows) / clock(trainer).seconds)
    seconds = jobs.num_tokens(encoded.train) * config.epochs * max(1, len(config.seeds)) / rates[1]
    return [
        *about(job, encoded, model),
        f"about {seconds / 60:.1f} minutes of training at {rates[1]:,.0f} tokens/s, scoring not counted",
        f"about {memory.peak() / 2**20:,.0f} MiB of memory",
    ]


def prepare(config: Finetune) -> "tuple[Job, PreTrainedTokenizerBase, PreTrainedModel]":
    """Data, tokenizer and model, all of them checked."""
    from transformers.utils import logging

    from nystrom.hf.classifier import load_tokenizer

    logging.disable_progress_bar()  # of reading and writing weights, which takes a moment
    check_settings(config)
    runs.mixed_precision(config.precision)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    job = read(config)
    model = load_model(config, job)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, and {config.model} knows {model.config.vocab_size}; "
            "pass the model's own"
        )
    return job, tokenizer, model


def check_settings(config: Finetune) -> None:
    """Raise ValueError for a setting out of range."""
    ones = ("batch_size", "gradient_accumulation", "checkpoint_steps", "train_examples", "eval_examples")
    runs.check_least(config, {"length": 3, **dict.fromkeys((*ones, "early_stopping"), 1)})
    rules = {name: (0 < getattr(config, name) < math.inf, "positive and finite") for name in ("lr", "epochs")}
    rules |= {name: (0 <= getattr(config, name) < 1, "at least 0 and below 1") for name in ("warmup", "hold_out")}
    runs.check_rules(config, rules | {"weight_decay": (0 <= config.weight_decay < math.inf, "at least 0 and finite")})
    for seed in (config.seed, *config.seeds):
        if not 0 <= seed < 2**32:
            raise ValueError(f"a seed must be at least 0 and below 2**32: got {seed}")
    if config.seeds and config.seed:
        raise ValueError(f"seeds take the place of seed: got {config.seed} beside {', '.join(map(str, config.seeds))}")
    if len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"seeds must differ: got {', '.join(map(str, config.seeds))}")
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
            job = jobs.from_tables(config.task, config.train, config.eval, *columns, config.regression)
        case _:
            raise TypeError(f"not a task: {type(config).__name__}")
    return jobs.drawn(job, config.train_examples, config.eval_examples, config.hold_out)


def load_model(config: Finetune, job: Job) -> "PreTrainedModel":
    """The pretrained encoder with a head, and the attention asked for."""
    from nystrom.hf.classifier import attention_of, load_classifier

    given = {name: getattr(config, name) for name in SETTINGS if getattr(config, name) is not None}
    model = load_classifier(config.model, job.labels, config.length, config.attention, given)
    kind = attention_of(model)
    if unread := [f"{name} {value}" for name, value in given.items() if name not in READ_BY[kind]]:
        raise ValueError(
            f"attention {kind} does not read {', '.join(unread)}; leave it out, or pass another --attention"
        )
    return model


def train_once(
    config: Finetune, job: Job, encoded: Encoded, tokenizer: "PreTrainedTokenizerBase", seed: int, out: Path
) -> dict[str, Any]:
    """One run, to its end; a finished one is not repeated."""
    from accelerate import PartialState
    from transformers import set_seed

    from nystrom.training import train_from

    if (out / "metrics.json").is_file():
        return runs.read_json(out / "metrics.json")
    if config.seeds and PartialState().is_main_process:
        runs.start(out, "finetune", replace(config, out=out, seed=seed, seeds=()))
    set_seed(seed)
    model = load_model(config, job)
    trainer = build_trainer(config, job, model, tokenizer, encoded, seed, out)
    train_from(trainer, runs.resume_point(out))
    trainer.save_model()
    scores = jobs.score_all(job, encoded, trainer, out)
    report = summary(job, encoded, trainer, scores, seed)
    if trainer.is_world_process_zero():
        runs.plot_curve(report["curve"], out / "curve.png")
        runs.write_json(out / "metrics.json", report)
        runs.remove_checkpoints(out)
    trainer.accelerator.wait_for_everyone()
    return report


def build_trainer(
    config: Finetune,
    job: Job,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    encoded: Encoded,
    seed: int,
    out: Path,
) -> "Trainer":
    """Hugging Face's Trainer: loop, schedule, checkpoints, logs and processes are its business."""
    from transformers import DataCollatorWithPadding, EarlyStoppingCallback, TrainingArguments

    from nystrom.training import Checkpoints, Clock, GroupedTrainer, show_progress

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
        eval_strategy="epoch" if encoded.evals else "no",
        save_strategy=("epoch" if stops else "steps") if encoded.evals else "no",
        save_steps=config.checkpoint_steps,
        save_total_limit=2,
        load_best_model_at_end=stops,
        metric_for_best_model="score" if stops else None,
        restore_callback_states_from_checkpoint=True,
        report_to="tensorboard" if encoded.evals else "none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
        seed=seed,
        use_cpu=not torch.accelerator.is_available(),
        **cast(Any, runs.mixed_precision(config.precision)),
    )
    trainer = GroupedTrainer(
        lengths=[len(row["input_ids"]) for row in encoded.train],
        model=model,
        args=arguments,
        train_dataset=cast(Any, encoded.train),  # a list of examples is a map-style dataset
        eval_dataset=cast(Any, encoded.evals.get(jobs.HOLD_OUT, next(iter(encoded.evals.values()), None))),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda answer: jobs.score(job, answer.predictions, answer.label_ids),
        callbacks=[Checkpoints(), Clock(), *([EarlyStoppingCallback(patience)] if patience else [])],
    )
    show_progress(trainer)
    return trainer


def summary(job: Job, encoded: Encoded, trainer: "Trainer", scores: dict[str, float], seed: int) -> dict[str, Any]:
    """What metrics.json holds."""
    from nystrom.hf.classifier import attention_of, exact_below
    from nystrom.training import clock, curve

    model = cast("PreTrainedModel", trainer.model)
    seconds, tokens = clock(trainer).seconds, jobs.num_tokens(encoded.train) * cast(float, trainer.state.epoch)
    return {
        "task": job.task,
        "attention": attention_of(model),
        "seed": seed,
        "score": {"name": " and ".join(job.metrics), "value": scores["score"]},
        "scores": {name: value for name, value in scores.items() if name != "score"},
        "examples": {"train": len(job.train), **{name: len(examples) for name, examples in job.evals.items()}},
        "longest_input": encoded.longest(),
        "exact_below": exact_below(model),
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "parameters": model.num_parameters(),
        "curve": curve(trainer),
    }
