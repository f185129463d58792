"""Pretraining on any text: masked tokens, and where asked for the order of sentences.

    nystrom pretrain --data books/ --length 2048 --out runs/books

Without --data it reads the documentation and source of the running Python. The --out folder is a model that
`nystrom fill-mask`, `nystrom finetune --model` and transformers' Auto classes open; beside the weights it holds
run.json (settings, versions, commit), metrics.json (scores, curve), curve.png, checkpoints, and TensorBoard logs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from nystrom import runs
from nystrom.data import rows, sources, streams
from nystrom.data.packing import Packing, load_tokenizer
from nystrom.data.text import Encoding, python_files
from nystrom.presets import FORM, FROM_A_MODEL, OPEN, PRESETS, READ_BY, SIZES, Attention

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from nystrom.data.masking import Block
    from nystrom.data.sources import Source
    from nystrom.hf import NystromformerForPreTraining

HELD_OUT = 0.05  # part of the documents, where no others are named
SCORES = ("accuracy", "loss_nats", "perplexity", "sentence_order_accuracy")


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pretrain a model with Nyström attention on any text: masked tokens, and the order of sentences."""

    data: tuple[Path, ...] = ()
    """Files: text, .jsonl (both also .gz), .parquet; and folders of them. Default: this Python's standard library."""
    eval_data: tuple[Path, ...] = ()
    """The same, held out. Default: one twentieth of the text files of --data (the end of a lone one) and of rows."""
    text_field: str = "text"
    """Field or column of the rows that is the text."""
    encoding: Encoding = "utf-8"
    """Of the text files; rows are always UTF-8."""
    dataset: str | None = None
    """Stream this data set instead, a name on the Hugging Face Hub or a folder; bad rows are found on the way."""
    dataset_config: str | None = None
    """Its configuration."""
    dataset_split: str = "train"
    """Its split to train on."""
    dataset_eval_split: str | None = None
    """Its held-out split. Default: one twentieth of the rows of the other."""

    out: Path = Path("runs/pretrain")
    """Folder for the model, checkpoints, logs and metrics; must be new or empty, unless --resume."""
    resume: bool = False
    """Go on from the last whole checkpoint in --out, with the same settings, to the same end."""
    dry_run: bool = False
    """Print the model's size and what time and memory the run will take, from three real steps; write nothing."""

    preset: Literal["tiny", "small", "base"] = "tiny"
    """Sizes and schedule, where not given: "tiny" trains on two cores, "small" and "base" are the paper's."""
    init: Path | None = None
    """Start from the model in this folder, with its sizes and tokenizer: a run, any Nyströmformer, BERT or RoBERTa."""
    positions: Literal["tile", "interpolate"] = "tile"
    """How the positions of --init reach a longer --length: repeated, or stretched."""
    tokenizer: str | None = None
    """"bytes", or the folder or hub name of one with a mask token. Default: that of --init, or bytes."""

    sentence_order: bool = False
    """Also learn whether two stretches of a document have been swapped; a block is then [CLS] A [SEP] B [SEP]."""
    packing: Packing | None = None
    """"stream" (default): a block may hold the end of a document and the next ones; "documents": parts of one alone."""
    mask_probability: float = 0.15
    """Part of the tokens to predict: 80 % of them masked, 10 % replaced at random, 10 % left."""
    whole_words: bool = False
    """Mask whole words; of bytes, what stands between white space."""

    length: int | None = None
    """Tokens in a block. Default: tiny 1024, small and base 512; with --init, what it reads."""
    attention: Attention | None = None
    """"nystrom" (default), "nystrom_shift", "nystrom_residual" (linear cost) or "softmax" (exact): same weights."""
    num_landmarks: int | None = None
    """Landmarks per head (count). Default: 64, or those of --init."""
    conv_kernel_size: int | Literal["preset"] | None = "preset"
    """Tokens spanned by the convolution skip; odd, or None for no skip. A BERT gets one that is zero at first."""
    embed_dim: int | None = None
    """Model width."""
    num_layers: int | None = None
    """Blocks (count)."""
    num_heads: int | None = None
    """Attention heads per block (count)."""
    ffn_dim: int | None = None
    """Width inside the feed-forward part."""
    dropout: float | None = None
    """Probability of dropping a hidden unit or weight. Default: tiny 0, small and base 0.1, with --init its own."""

    steps: int | None = None
    """Optimiser steps (count)."""
    batch_size: int | None = None
    """Blocks per batch and process (count)."""
    gradient_accumulation: int | None = None
    """Batches per optimiser step (count)."""
    lr: float | None = None
    """Peak learning rate of AdamW, after warm-up. Default: tiny 0.002, small and base, and with --init, 0.0001."""
    warmup: float | None = None
    """Part of the steps spent warming up."""
    schedule: Literal["cosine", "linear"] | None = None
    """How the learning rate then falls to zero."""
    weight_decay: float = 0.01
    """Of AdamW."""
    precision: runs.Precision = "auto"
    """auto: bfloat16 where the hardware multiplies in it, else float32."""
    eval_blocks: int = 64
    """Held-out blocks scored, with fixed masks, spread over the files (count)."""
    eval_steps: int = 1000
    """Steps between evaluations and between checkpoints (count)."""
    seed: int = 0
    """Of the weights, the order of the data and the masks."""
    sequence_processes: int = 1
    """Processes that share each block, a stretch of its tokens each, and count as one (count)."""


def run(config: Pretrain) -> None:
    """Train and print how well held-out text is predicted."""
    from accelerate import PartialState

    if config.dry_run:
        return print("\n".join(plan(config)))
    held_out = train(config)["held_out"]
    order = f", sentence order {held_out['sentence_order_accuracy']:.1%}" if config.sentence_order else ""
    PartialState().print(
        f"{config.out}: held-out loss {held_out['loss_nats']:.3f} nats, masked accuracy {held_out['accuracy']:.1%} "
        f"(always the commonest token: {held_out['baseline']['accuracy']:.1%}){order}"
    )


def train(config: Pretrain) -> dict[str, Any]:
    """Run the experiment and return what metrics.json holds.

    Raises:
        FileExistsError: out is not empty and resume is off.
        FileNotFoundError, ValueError: before anything is written: data that is no text; a config of no model.
    """
    from accelerate import PartialState

    from nystrom.training import read_by_rows, share_sequences, train_from

    state = PartialState(cpu=not torch.accelerator.is_available())
    config, tokenizer, model = prepare(config)
    mesh = share_sequences(model, config.sequence_processes)
    if state.is_main_process:  # alone: the others may already see what it writes next
        runs.check_out(config.out, config, config.resume, runs.CHECKPOINTS * model.num_parameters())
    train_sources, eval_sources = corpus(config)
    maker = block_maker(config, tokenizer)
    train_set = streams.train_stream(maker, train_sources)
    eval_set, eval_files = streams.held_out_blocks(maker, eval_sources, config.eval_blocks)
    if len(eval_set) < config.eval_blocks:
        state.print(f"held-out text is short: {len(eval_set)} blocks are scored, not {config.eval_blocks}")
    baseline = streams.commonest_token(train_set, eval_set)
    trainer = build_trainer(config, model, tokenizer, train_set, eval_set)
    read_by_rows(trainer, mesh)
    state.wait_for_everyone()
    if state.is_main_process:
        runs.start(config.out, "pretrain", config)
    with runs.full_disk_told(config.out):
        train_from(trainer, runs.resume_point(config.out))
        trainer.save_model()
        found = trainer.evaluate()
    scores = {name: found[f"eval_{name}"] for name in SCORES if f"eval_{name}" in found}
    metrics = summary(config, trainer, scores)
    metrics["examples"] = {"train": None, "eval": len(eval_set)}  # the stream has no end
    metrics["held_out"] = {**scores, "blocks": len(eval_set), "files": eval_files, "baseline": baseline}
    files, size = len({source.path for source in train_sources}), sum(source.size or 0 for source in train_sources)
    metrics["train"] = {"files": files, "bytes": size, "parameters": metrics["parameters"]}
    if state.is_main_process:
        runs.plot_curve(metrics["curve"], config.out / "curve.png")
        runs.write_json(config.out / "metrics.json", metrics)
    return metrics


def plan(config: Pretrain) -> list[str]:
    """What the run will take, from a few real steps; nothing is kept."""
    from nystrom.hf.estimate import estimate

    config, tokenizer, model = prepare(config)
    stream = iter(streams.train_stream(block_maker(config, tokenizer), corpus(config)[0]))
    collate, size = streams.make_collate(cast(int, tokenizer.pad_token_id)), cast(int, config.batch_size)
    batches = (collate(list(islice(stream, size))) for _ in count())
    bfloat16 = runs.mixed_precision(config.precision)["bf16"]
    found = estimate(model, batches, cast(int, config.gradient_accumulation), bfloat16)
    seconds = cast(int, config.steps) * found["seconds"]
    weights, activations = (found[name] / 2**20 for name in ("weights", "activations"))
    return [
        f"{model.num_parameters():,} parameters, attention {config.attention}",
        f"about {weights + activations:,.0f} MiB of memory: {weights:,.0f} for weights, gradients and the moments of "
        f"AdamW, {activations:,.0f} for what a batch of {size} blocks of {config.length} tokens keeps (an estimate)",
        f"about {seconds / 60:,.1f} minutes for {config.steps:,} steps of {found['seconds']:.2f} s, without scoring",
    ]


def prepare(config: Pretrain) -> "tuple[Pretrain, PreTrainedTokenizerBase, NystromformerForPreTraining]":
    """The settings with nothing left open, the tokenizer and the model."""
    from transformers import set_seed

    from nystrom.hf.classifier import OWN

    of_the_model = () if config.init is None else (*SIZES, "length")
    open_ones = [name for name, value in OPEN.items() if getattr(config, name) == value and name not in of_the_model]
    settings = PRESETS[config.preset] | ({} if config.init is None else FROM_A_MODEL)
    config = replace(config, **{name: settings[name] for name in open_ones})
    check_settings(config)
    runs.mixed_precision(config.precision)
    set_seed(config.seed)
    start = None if config.init is None else load_model(config)
    name, needed = str(config.tokenizer or config.init or "bytes"), ("cls",) if config.sentence_order else ()
    tokenizer = load_tokenizer(name, needed)
    model = start or build_model(config, tokenizer)
    own = model.config
    if len(tokenizer) > own.vocab_size:
        raise ValueError(f"{name} has {len(tokenizer)} tokens, and the model of {config.init} knows {own.vocab_size}")
    tokenizer.model_max_length = own.max_position_embeddings
    attention = next(name for name, kind in OWN.items() if kind == own.attention)
    if config.num_landmarks is not None and "num_landmarks" not in READ_BY[attention]:
        raise ValueError(f"attention {attention} reads no num_landmarks: got {config.num_landmarks}; leave it out")
    config = replace(
        config,
        **{name: getattr(own, field) for name, field in SIZES.items()},
        num_landmarks=own.num_landmarks,
        attention=attention,
        length=config.length or own.max_position_embeddings,
        tokenizer=name,
        packing=config.packing or (None if config.sentence_order else "stream"),
    )
    return config, tokenizer, model


def check_settings(config: Pretrain) -> None:
    """Raise ValueError for a setting out of range, or a contradiction of two; the model checks its own sizes."""
    ones = ("steps", "batch_size", "gradient_accumulation", "eval_blocks", "eval_steps", "sequence_processes")
    runs.check_least(config, {"length": 8 if config.sentence_order else 2, "seed": 0, **dict.fromkeys(ones, 1)})
    of_dataset = ("dataset_config", "dataset_split", "dataset_eval_split")
    runs.check_read(config, {"positions": "init", **dict.fromkeys(of_dataset, "dataset")})
    rules = {
        "lr": (0 < cast(float, config.lr) < math.inf, "positive and finite"),
        "weight_decay": (0 <= config.weight_decay < math.inf, "at least 0 and finite"),
        "warmup": (0 <= cast(float, config.warmup) <= 1, "in [0, 1]"),
        "mask_probability": (0 < config.mask_probability <= 1, "above 0 and at most 1"),
    }
    runs.check_rules(config, rules)
    if config.sentence_order and config.packing is not None:
        raise ValueError(f"packing is settled by sentence_order, one document a block: got {config.packing}")
    if config.dry_run and config.sequence_processes > 1:
        raise ValueError(f"dry_run is of one process: got sequence_processes {config.sequence_processes}; leave it out")
    if config.dataset is not None and (config.data or config.eval_data or config.encoding != "utf-8"):
        raise ValueError(f"dataset takes the place of data, eval_data and encoding: got {config.dataset} beside them")


def build_model(config: Pretrain, tokenizer: "PreTrainedTokenizerBase") -> "NystromformerForPreTraining":
    """A new model, untrained."""
    from nystrom.hf import NystromformerConfig, NystromformerForPreTraining
    from nystrom.hf.classifier import OWN

    sizes = NystromformerConfig(
        **{field: getattr(config, name) for name, field in SIZES.items()},
        attention=OWN[config.attention or "nystrom"],
        num_landmarks=64 if config.num_landmarks is None else config.num_landmarks,
        **FORM[config.preset],
        sentence_order=config.sentence_order,
        vocab_size=len(tokenizer),
        max_position_embeddings=cast(int, config.length),
        hidden_dropout_prob=cast(float, config.dropout),
        attention_probs_dropout_prob=cast(float, config.dropout),
        **{name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    )
    return NystromformerForPreTraining(sizes)


def load_model(config: Pretrain) -> "NystromformerForPreTraining":
    """The model of --init, with the attention and the length asked for."""
    from accelerate import PartialState

    from nystrom.hf.starting import start_from

    given = {name: getattr(config, name) for name in SIZES if getattr(config, name) != OPEN[name]}
    kernel = given.get("conv_kernel_size", PRESETS[config.preset]["conv_kernel_size"])
    asked = {"num_landmarks": config.num_landmarks, "sentence_order": config.sentence_order}
    asked |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), config.dropout)
    changes: Any = {name: value for name, value in asked.items() if value is not None}
    model, new = start_from(cast(Path, config.init), kernel, config.attention, **changes)
    for name, value in given.items():
        if value != (own := getattr(model.config, SIZES[name])):
            raise ValueError(f"{name} is {own} in {config.init}: got {value}; leave it out")
    if config.length is not None and config.length > model.config.max_position_embeddings:
        model.extend_positions(config.length, config.positions)
    elif config.positions != "tile":
        raise ValueError(f"positions is of a length above the model's own: got {config.positions}; leave it out")
    if new:
        PartialState().print(f"{config.init}: new, untrained weights: {', '.join(new)}")
    return model


def corpus(config: Pretrain) -> "tuple[Sequence[Source], Sequence[Source]]":
    """Training and held-out sources. Every file is read once here, so that a bad one stops the run now."""
    if config.dataset is not None:
        splits = (config.dataset_split, config.dataset_eval_split)
        return rows.corpus(config.dataset, config.dataset_config, *splits, config.text_field, HELD_OUT)
    files = config.data or python_files()
    return sources.corpus(files, config.eval_data, config.text_field, config.encoding, HELD_OUT)


def block_maker(config: Pretrain, tokenizer: "PreTrainedTokenizerBase") -> streams.BlockMaker:
    """How this run's blocks are made."""
    names = ("sentence_order", "mask_probability", "whole_words", "seed")
    return streams.BlockMaker(
        tokenizer=tokenizer,
        length=cast(int, config.length),
        packing=config.packing or "documents",
        **{name: getattr(config, name) for name in names},
    )


def build_trainer(
    config: Pretrain,
    model: "NystromformerForPreTraining",
    tokenizer: "PreTrainedTokenizerBase",
    train_set: "IterableDataset",
    eval_set: "list[Block]",
) -> "Trainer":
    """Hugging Face's Trainer: loop, schedule, checkpoints, logs and processes are its business."""
    from transformers import Trainer, TrainingArguments

    from nystrom.hf.scores import place_predictions, score
    from nystrom.training import Checkpoints, Clock, show_progress

    steps = cast(int, config.steps)
    arguments = TrainingArguments(
        output_dir=str(config.out),
        max_steps=steps,
        per_device_train_batch_size=cast(int, config.batch_size),
        per_device_eval_batch_size=cast(int, config.batch_size),
        gradient_accumulation_steps=cast(int, config.gradient_accumulation),
        learning_rate=cast(float, config.lr),
        lr_scheduler_type=cast(str, config.schedule),
        warmup_steps=round(cast(float, config.warmup) * steps),
        weight_decay=config.weight_decay,
        logging_steps=max(1, steps // 50),
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_steps=config.eval_steps,
        save_total_limit=2,
        report_to="tensorboard",
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels", "sentence_order_label"] if config.sentence_order else ["labels"],
        seed=config.seed,
        use_cpu=not torch.accelerator.is_available(),  # or torchrun would start processes that know nothing of another
        accelerator_config={"dispatch_batches": False},  # each process pads its own batches
        **cast(Any, runs.mixed_precision(config.precision)),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=cast(Any, train_set),
        eval_dataset=cast(Any, eval_set),  # a list of examples is a map-style dataset
        processing_class=tokenizer,
        data_collator=streams.make_collate(cast(int, tokenizer.pad_token_id)),
        preprocess_logits_for_metrics=cast(Any, place_predictions),
        compute_metrics=score,
        callbacks=[Checkpoints(), Clock()],
    )
    show_progress(trainer)
    return trainer


def summary(config: Pretrain, trainer: "Trainer", scores: dict[str, float]) -> dict[str, Any]:
    """What metrics.json holds of any run."""
    from nystrom.training import clock, curve

    seconds, tokens = clock(trainer).seconds, trainer.state.num_input_tokens_seen
    kept = ("step", "seconds", "num_input_tokens_seen", "loss", "eval_score", *(f"eval_{name}" for name in SCORES))
    return {
        "task": "pretrain",
        "attention": config.attention,
        "seed": config.seed,
        "score": {"name": "masked accuracy", "value": scores["accuracy"]},
        "scores": scores,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "parameters": cast("PreTrainedModel", trainer.model).num_parameters(),
        "curve": [{name: entry[name] for name in kept if name in entry} for entry in curve(trainer)],
    }
