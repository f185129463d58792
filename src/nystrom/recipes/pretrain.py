"""Masked-language-model pretraining on any text.

    nystrom pretrain --data books/ --length 2048 --out runs/books

Without --data it reads the documentation and source of the running Python. The --out folder is a model that
`nystrom fill-mask --model runs/books` loads; beside the weights it holds pretrain.json (the resolved config, versions
and commit), metrics.json (held-out loss and masked accuracy, the training curve), checkpoints to resume from, and
TensorBoard logs.
"""

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from nystrom.attention import Kind
from nystrom.checkpoint import save_config
from nystrom.data.text import blocks, check_text, from_random_place, make_encode, python_files, split, text_files
from nystrom.encoder import EncoderConfig, MaskedLM
from nystrom.environment import describe

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer

    from nystrom.data.text import Span


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pretrain a masked language model with Nyström attention on any text."""

    data: tuple[Path, ...] = ()
    """Text files and folders of them (UTF-8). Default: the standard library of the running Python."""
    eval_data: tuple[Path, ...] = ()
    """Held-out files and folders. Default: one twentieth of the files of --data, or the end of a lone file."""
    out: Path = Path("runs/pretrain")
    """Folder for the model, checkpoints, logs and metrics; must be new or empty, unless --resume."""
    resume: bool = False
    """Go on from the last checkpoint in --out."""
    tokenizer: str = "bytes"
    """"bytes" (built in), or the folder or hub name of a Hugging Face tokenizer that has a mask token."""

    length: int = 2048
    """Tokens in a block: the length that the model reads."""
    attention: Kind = "nystrom"
    """Attention: "nystrom", "shift", "residual" (linear cost) or "softmax" (exact), with the same weights."""
    num_landmarks: int = 64
    """Landmarks per head (count)."""
    conv_kernel_size: int | None = 33
    """Tokens spanned by the convolution skip; odd, or None for no skip."""
    embed_dim: int = 256
    """Model width."""
    num_layers: int = 4
    """Blocks (count)."""
    num_heads: int = 4
    """Attention heads per block (count)."""
    ffn_dim: int = 1024
    """Width inside the feed-forward part."""
    dropout: float = 0.1
    """Probability of dropping a hidden unit or an attention weight while training."""

    steps: int = 10_000
    """Optimiser steps (count)."""
    batch_size: int = 8
    """Blocks per step and process (count)."""
    lr: float = 1e-3
    """Peak learning rate of AdamW, after warm-up; then a cosine to zero."""
    warmup: float = 0.05
    """Part of the steps spent warming up."""
    weight_decay: float = 0.01
    """Of AdamW."""
    mask_probability: float = 0.15
    """Part of the tokens to predict: 80 % of them masked, 10 % replaced at random, 10 % left."""
    eval_blocks: int = 64
    """Held-out blocks scored, with fixed masks, spread over the files (count)."""
    eval_steps: int = 1000
    """Steps between evaluations and between checkpoints (count)."""
    seed: int = 0
    """Of the weights, the order of the data and the masks."""


def run(config: Pretrain) -> None:
    """Train and print how well held-out text is predicted."""
    from accelerate import PartialState

    held_out = train(config)["held_out"]
    PartialState().print(
        f"{config.out}: held-out loss {held_out['loss_nats']:.3f} nats, masked accuracy {held_out['accuracy']:.1%} "
        f"(always the commonest token: {held_out['baseline']['accuracy']:.1%})"
    )


def train(config: Pretrain) -> dict[str, Any]:
    """Run the experiment and return what metrics.json holds.

    Raises:
        FileExistsError: out is not empty and resume is off.
        FileNotFoundError, ValueError: data that cannot be read as text; a config that makes no model. Both before
            anything is written.
    """
    from accelerate import PartialState
    from transformers import set_seed

    check_settings(config)
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.is_main_process:  # alone: the others may already see what it writes next
        check_out(config)
    tokenizer = load_tokenizer(config)
    train_spans, eval_spans = corpus(config)
    set_seed(config.seed)
    model = MaskedLM(encoder_config(config, len(tokenizer)))
    train_set = train_stream(config, tokenizer, train_spans)
    eval_set, eval_files = fixed_eval_set(config, tokenizer, eval_spans)
    baseline = guess_commonest(train_set, eval_set)

    trainer = build_trainer(config, model, train_set, eval_set)
    if state.is_main_process:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(config.out / "pretrain.json", {"config": asdict(config), "environment": describe()})
        save_config(model.encoder_config, config.out)
        tokenizer.save_pretrained(str(config.out))
    trainer.train(resume_from_checkpoint=config.resume)
    trainer.save_model()
    held_out = trainer.evaluate()
    metrics = {
        "held_out": {
            "accuracy": held_out["eval_accuracy"],
            "loss_nats": held_out["eval_loss_nats"],
            "blocks": len(eval_set),
            "files": eval_files,
            "baseline": baseline,
        },
        "train": {
            "files": len(train_spans),
            "bytes": sum(span.stop - span.start for span in train_spans),
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "curve": [entry for entry in trainer.state.log_history if "loss" in entry or "eval_accuracy" in entry],
    }
    if state.is_main_process:
        write_json(config.out / "metrics.json", metrics)
    return metrics


def check_settings(config: Pretrain) -> None:
    """Raise ValueError for a setting out of range; the model checks its own sizes."""
    least = {"length": 2, "steps": 1, "batch_size": 1, "eval_blocks": 1, "eval_steps": 1, "seed": 0}
    for name, lowest in least.items():
        if getattr(config, name) < lowest:
            raise ValueError(f"{name} must be at least {lowest}: got {getattr(config, name)}")
    if not config.lr > 0:
        raise ValueError(f"lr must be positive: got {config.lr}")
    if not config.weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative: got {config.weight_decay}")
    if not 0 <= config.warmup <= 1:
        raise ValueError(f"warmup must be in [0, 1]: got {config.warmup}")
    if not 0 < config.mask_probability <= 1:
        raise ValueError(f"mask_probability must be above 0 and at most 1: got {config.mask_probability}")


def check_out(config: Pretrain) -> None:
    """Never write over an earlier run, nor go on with one under other settings."""
    if not config.resume:
        if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
            raise FileExistsError(f"{config.out}: exists and is not an empty folder; pass another --out, or --resume")
        return
    if not list(config.out.glob("checkpoint-*")):
        raise FileNotFoundError(f"{config.out}: no checkpoint to resume from; leave out --resume to start")
    before = json.loads((config.out / "pretrain.json").read_text())["config"]
    now = json.loads(json.dumps(asdict(config), default=str))
    changed = [f"{name} was {before.get(name)}, is {now[name]}" for name in now if now[name] != before.get(name)]
    changed = [change for change in changed if not change.startswith("resume ")]
    if changed:
        raise ValueError(f"{config.out}: a resumed run keeps its settings: {'; '.join(changed)}; pass the first ones")


def load_tokenizer(config: Pretrain) -> "PreTrainedTokenizerBase":
    """The byte tokenizer (256 bytes after 6 special ids), or any Hugging Face one."""
    from transformers import AutoTokenizer, PerceiverTokenizer

    if config.tokenizer == "bytes":
        return PerceiverTokenizer(model_max_length=config.length)
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    for token in ("mask", "sep", "pad"):
        if getattr(tokenizer, f"{token}_token_id") is None:
            raise ValueError(f"{config.tokenizer}: this tokenizer has no {token} token; masked modelling needs one")
    return tokenizer


def corpus(config: Pretrain) -> "tuple[list[Span], list[Span]]":
    """Checked training and held-out spans: every file is read once here, so that a bad one stops the run now."""
    files = text_files(config.data) if config.data else python_files()
    held_out = text_files(config.eval_data)
    if shared := set(files) & set(held_out):
        raise ValueError(f"--data and --eval-data must share no file: both hold {min(shared)} ({len(shared)} in all)")
    spans = [check_text(path) for path in files]
    return (spans, [check_text(path) for path in held_out]) if held_out else split(spans, fraction=0.05)


def encoder_config(config: Pretrain, vocab_size: int) -> EncoderConfig:
    """The model's sizes."""
    return EncoderConfig(
        vocab_size=vocab_size,
        max_length=config.length,
        embed_dim=config.embed_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        ffn_dim=config.ffn_dim,
        dropout=config.dropout,
        kind=config.attention,
        num_landmarks=config.num_landmarks,
        conv_kernel_size=config.conv_kernel_size,
    )


def train_stream(config: Pretrain, tokenizer: "PreTrainedTokenizerBase", spans: "list[Span]") -> "IterableDataset":
    """Masked blocks of the files without end, in shuffled order; shards are what workers and ranks divide.

    One endless pass rather than epochs: then a resumed run finds its place by counting blocks from the start.
    """
    from datasets import IterableDataset

    files = random.Random(config.seed).sample(spans, len(spans))
    num_shards = min(64, len(files))
    arguments = {
        "shards": [files[i::num_shards] for i in range(num_shards)],
        "encode": make_encode(tokenizer),
        "separator": tokenizer.sep_token_id,
        "length": config.length,
    }
    dataset = IterableDataset.from_generator(blocks, gen_kwargs=arguments).repeat(None)
    return dataset.shuffle(seed=config.seed, buffer_size=256).map(make_mask(config, tokenizer), with_indices=True)


def fixed_eval_set(
    config: Pretrain, tokenizer: "PreTrainedTokenizerBase", spans: "list[Span]"
) -> tuple[list[dict[str, Any]], int]:
    """Masked blocks of held-out files, as evenly from each as they allow, from a random place on; and the files' count.

    Raises:
        ValueError: so little text that no token is masked.
    """
    generator = random.Random(config.seed)
    files = generator.sample(spans, min(len(spans), config.eval_blocks))
    per_file = -(-config.eval_blocks // len(files))
    encode, mask = make_encode(tokenizer), make_mask(config, tokenizer)
    chosen: list[tuple[dict[str, Any], str]] = []
    for span in files:
        stretch = from_random_place(span, per_file * config.length, generator)
        found = blocks([[stretch]], encode, cast(int, tokenizer.sep_token_id), config.length)
        chosen += [(block, span.path) for block in islice(found, per_file)]
    chosen = chosen[: config.eval_blocks]
    masked = [mask(block, place) for place, (block, _) in enumerate(chosen)]
    if not any((block["labels"] != -100).any() for block in masked):
        raise ValueError(f"held-out text of {len(chosen)} blocks is too short to mask a token; pass more --eval-data")
    return masked, len({path for _, path in chosen})


def make_mask(
    config: Pretrain, tokenizer: "PreTrainedTokenizerBase"
) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    """Block -> block with labels: of the chosen tokens 80 % masked, 10 % replaced at random, 10 % left.

    The draw depends on the seed, the block and its place in the stream, on nothing before it: so every pass has new
    masks, and a resumed run those of an uninterrupted one.
    """
    from transformers import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=config.mask_probability, mask_replace_prob=0.8, random_replace_prob=0.1
    )

    def mask(block: dict[str, Any], place: int) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            key = np.asarray([config.seed, place, *block["input_ids"]], np.int64)
            torch.manual_seed(zlib.crc32(key.tobytes()))  # the CPU generator takes 32 bits
            batch = collator([block])
        return {"input_ids": batch["input_ids"][0], "labels": batch["labels"][0]}

    return mask


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Masked blocks -> the model's arguments, padded on the right; attn_mask only where there is padding."""
    ids, labels = ([torch.as_tensor(example[name]) for example in examples] for name in ("input_ids", "labels"))
    lengths = torch.tensor([len(x) for x in ids])
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    if lengths.min() < lengths.max():
        batch["attn_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
    return batch


def build_trainer(
    config: Pretrain, model: MaskedLM, train_set: "IterableDataset", eval_set: list[dict[str, Any]]
) -> "Trainer":
    """Hugging Face's Trainer: loop, schedule, checkpoints, logs and processes are its business."""
    from transformers import ProgressCallback, Trainer, TrainingArguments

    class Progress(ProgressCallback):
        """The loss beside the bar, instead of a line of figures at every log."""

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if self.training_bar is not None and logs and "loss" in logs:
                self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")

    arguments = TrainingArguments(
        output_dir=str(config.out),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup * config.steps),
        weight_decay=config.weight_decay,
        logging_steps=max(1, config.steps // 50),
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_steps=config.eval_steps,
        save_total_limit=2,
        report_to="tensorboard",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
        seed=config.seed,
        use_cpu=not torch.accelerator.is_available(),  # or torchrun would start processes that know nothing of another
        accelerator_config={"dispatch_batches": False},  # each process pads its own batches
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=cast(Any, train_set),
        eval_dataset=cast(Any, eval_set),  # a list of examples is a map-style dataset
        data_collator=collate,
        preprocess_logits_for_metrics=cast(Any, place_predictions),
        compute_metrics=masked_metrics,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress())
    return trainer


def place_predictions(logits: "torch.Tensor", labels: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """Predicted id and loss at each labelled token, elsewhere -100 and 0: small, and the same shape in every batch."""
    labelled = labels != -100
    predictions, losses = labels.new_full(labels.shape, -100), logits.new_zeros(labels.shape, dtype=torch.float32)
    predictions[labelled] = logits.argmax(-1)
    losses[labelled] = torch.nn.functional.cross_entropy(logits.float(), labels[labelled], reduction="none")
    return predictions, losses


def masked_metrics(evaluated: "EvalPrediction") -> dict[str, float]:
    """Part of the labelled tokens predicted right, and their mean loss: per token, however they fell into batches."""
    predictions, losses = cast(tuple[np.ndarray, np.ndarray], evaluated.predictions)
    labelled = np.asarray(evaluated.label_ids) != -100
    right = (predictions == np.asarray(evaluated.label_ids))[labelled]
    return {"accuracy": float(right.mean()), "loss_nats": float(losses[labelled].mean())}


def guess_commonest(train_set: "IterableDataset", eval_set: list[dict[str, Any]]) -> dict[str, Any]:
    """What always answering the commonest token of the training text (its first 256 blocks) would score."""
    answers = torch.cat([torch.as_tensor(block["labels"]) for block in train_set.take(256)])
    commonest = int(answers[answers != -100].bincount().argmax())
    labels = torch.cat([torch.as_tensor(example["labels"]) for example in eval_set])
    return {"token": commonest, "accuracy": (labels[labels != -100] == commonest).float().mean().item()}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a whole file or none."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n")
    partial.replace(path)
