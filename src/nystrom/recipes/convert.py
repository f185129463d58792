"""Give a pretrained encoder attention of linear cost, and positions for longer texts.

nystrom convert MODEL OUT --attention nystrom_residual --num-landmarks 64 --length 4096

OUT is a folder that transformers' Auto classes open once nystrom.hf is imported, with a model card (README.md) that
says what was measured on a text, and measured.json with the same numbers. Nothing is trained.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from tyro.conf import Positional, arg

from nystrom.environment import describe
from nystrom.inspect.texts import LETTERS, special_tokens
from nystrom.models import num_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LENGTH = 512
"""Tokens of the sample that are measured first, where the model reads as many."""
READ_BY = {
    "nystrom": {"num_pinv_iters"},
    "nystrom_shift": {"num_pinv_iters"},
    "nystrom_residual": {"top_k", "window", "block"},
}
"""Settings that not all attentions have."""


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Give a pretrained encoder attention of linear cost and positions for longer texts; a new folder, untrained."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Folder, or name on the Hugging Face Hub, of an encoder such as BERT, RoBERTa or MiniLM."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """Folder to write; must not exist."""
    attention: Literal["nystrom", "nystrom_shift", "nystrom_residual"] = "nystrom_residual"
    """What takes the place of softmax attention."""
    length: int | None = None
    """Tokens that the model is to read; default: as many as it does."""
    positions: Literal["tile", "interpolate"] | None = None
    """How a longer --length gets its learnt positions: "tile" (default) repeats them, which changes nothing for texts
    that could be read before; "interpolate" stretches them."""
    num_landmarks: int = 64
    """Landmarks per head (count)."""
    num_pinv_iters: int | None = None
    """Steps of the inverse, for nystrom and nystrom_shift (count); default 6."""
    top_k: int | None = None
    """Keys that a block of queries reads exactly, for nystrom_residual (count); default 64."""
    window: int | None = None
    """Tokens around a block that it reads exactly, for nystrom_residual (count); default: the block."""
    block: int | None = None
    """Queries that share their exact keys, for nystrom_residual (count); default 32."""
    exact_below: int | None = None
    """Inputs of fewer tokens get exact attention; 0: none do; default: where exact attention is faster."""
    conv_kernel_size: int | None = None
    """Add a convolution skip that spans so many tokens, odd, its weights zero; for BERT and RoBERTa, which become a
    Nyströmformer of nystrom.hf, without exact_below. Default: no convolution."""
    text: Path | None = None
    """Text file to measure on; default: a short text that comes with nystrom."""
    allow_pickle: bool = False
    """Read pickled weights where there are no others: tensors only, whatever else a pickle holds is refused."""


def run(config: Convert) -> None:
    """Convert, measure, write the folder, and print what was measured."""
    check(config)
    with new_folder(config.out) as folder:
        report = convert(config, folder)
    print("\n".join(summary(report)))
    print(f"\nWrote {config.out}")


def check(config: Convert) -> None:
    """Raise ValueError for settings that do not go together, OSError where nothing could be written or read."""
    refuse_existing(config.out)
    given = {name for name in set().union(*READ_BY.values()) if getattr(config, name) is not None}
    for name in sorted(given - READ_BY[config.attention]):
        raise ValueError(f"{name} is no setting of {config.attention}: got {getattr(config, name)}; leave it out")
    if config.positions is not None and config.length is None:
        raise ValueError(f"positions says how a length is reached: got {config.positions}, and no --length")
    if config.length is not None and config.length < 1:
        raise ValueError(f"length must be at least 1: got {config.length}")
    if config.text is not None and not config.text.is_file():
        raise FileNotFoundError(f"{config.text}: no such file")
    if config.conv_kernel_size is not None:
        for name in ("top_k", "window", "block", "exact_below"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name} is no setting of the model with the convolution: got {getattr(config, name)}; leave it "
                    "or --conv-kernel-size out"
                )


def convert(config: Convert, folder: Path) -> dict[str, Any]:
    """Fill the folder, and return what measured.json holds."""
    from transformers import AutoTokenizer

    from nystrom.hf.card import card, metadata
    from nystrom.hf.convert import longer, read, with_convolution
    from nystrom.hf.files import check_folder, copy_files, find
    from nystrom.hf.settings import configure

    settings: dict[str, Any] = given_settings(config)
    source = find(config.model, config.allow_pickle)
    checkpoint = read(source, check_folder(source, config.allow_pickle))
    model, reach = checkpoint.model, num_positions(checkpoint.model)
    if config.length is not None:
        model = longer(model, config.length, config.positions or "tile")
    configure(model, config.attention, **settings)
    converted, left_out = model, checkpoint.left_out
    if config.conv_kernel_size is not None:
        own = {name: value for name, value in settings.items() if name in ("num_landmarks", "num_pinv_iters")}
        converted = with_convolution(model, config.attention, config.conv_kernel_size, **own)
        left_out += [name for name in model.state_dict() if "pooler." in name]
    converted.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    copy_files(source, folder, config.length, type(tokenizer).__name__, config.allow_pickle)
    base = config.model if source != Path(config.model) else "/".join(source.resolve().parts[-2:])
    report = {
        "format": 1,
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": describe(),
        "base_model": base,
        "attention": config.attention,
        "settings": all_settings(config),
        "model": about(config, converted, reach, source),
        "left_out": left_out,
        **measurements(config, model, converted, AutoTokenizer.from_pretrained(folder), reach),
    }
    (folder / "measured.json").write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    (folder / "README.md").write_text(card(metadata(source, base), report, config.out.name), encoding="utf-8")
    return report


def given_settings(config: Convert) -> dict[str, int]:
    """Those of the attention that are not left at their default.

    Raises:
        ValueError: one is out of range.
    """
    from nystrom.hf.settings import checked

    names = ("num_landmarks", *sorted(READ_BY[config.attention]), "exact_below")
    settings = {name: value for name in names if (value := getattr(config, name)) is not None}
    checked(settings)
    return settings


def all_settings(config: Convert) -> dict[str, Any]:
    """Defaults included, as the card lists them."""
    from nystrom.hf.settings import EXACT_BELOW, checked

    found = checked(given_settings(config))
    names = ("num_landmarks", *sorted(READ_BY[config.attention]))
    settings: dict[str, Any] = {name: getattr(found, name) for name in names}
    if config.conv_kernel_size is not None:
        return settings | {"conv_kernel_size": config.conv_kernel_size}
    return settings | {"exact_below": EXACT_BELOW[config.attention] if found.exact_below is None else found.exact_below}


def about(config: Convert, model: "PreTrainedModel", reach: int | None, source: Path) -> dict[str, Any]:
    """What the new model is, and how its positions were made."""
    longer = config.length is not None and config.length != reach
    how = {"tile": "repeated", "interpolate": "interpolated"}[config.positions or "tile"]
    return {
        "architecture": type(model).__name__,
        "positions": config.length or reach,
        "positions_words": f"{config.length:,}, the first model's {reach:,} {how}" if longer else None,
        "sentence_transformers": (source / "modules.json").is_file(),
    }


def measurements(
    config: Convert,
    model: "PreTrainedModel",
    converted: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    reach: int | None,
) -> dict[str, Any]:
    """What the model does with the sample; `converted` is the one with the convolution, where there is any."""
    from nystrom.hf.measure import difference, measure

    before, after = special_tokens(tokenizer)
    text = sample(config.text, max(LENGTH, config.length or 0))
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    most = len(before) + len(tokens) + len(after)
    if len(tokens) < 2:
        raise ValueError(f"{config.text}: needs a text of at least 2 tokens to measure on: got {len(tokens)}")
    lengths = [min(LENGTH, most, *([] if reach is None else [reach]))]
    asked = config.length if config.length is not None and config.length > lengths[0] else None
    if asked is not None and asked <= most:
        lengths.append(asked)
    runs = []
    model.float()
    for n in lengths:
        say(f"{type(model).__name__} reads {n:,} tokens of the sample")
        ids = torch.tensor([before + tokens[: n - len(before) - len(after)] + after])
        runs.append(measure(model, ids, config.attention))
        if config.conv_kernel_size is not None:
            runs[-1]["convolution_difference"] = difference(converted.float(), model, ids)
    source = None if config.text is None else config.text.name
    found = {"sample": {"source": source, "tokens": most}, "measured": runs}
    return found | {"not_measured": asked if asked is not None and asked > most else None}


def say(what: str) -> None:
    """Progress, on a line of its own."""
    print(f"... {what}", flush=True)


def sample(path: Path | None, length: int) -> str:
    """Enough letters of the text for so many tokens.

    Raises:
        ValueError: it is not UTF-8 text.
        OSError: it cannot be read.
    """
    import nystrom.hf

    path = path or Path(nystrom.hf.__file__).with_name("sample.txt")
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(LETTERS * length)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at offset {error.start}; convert it first") from None


def summary(report: dict[str, Any]) -> list[str]:
    """What a user should know before using it."""
    model, settings = report["model"], report["settings"]
    lines = [f"{report['base_model']} is now a {model['architecture']} with {report['attention']}, untrained."]
    if model["positions"] is not None:
        lines.append(f"It reads up to {model['positions']:,} tokens.")
    if report["left_out"]:
        lines.append(f"Left out, as {model['architecture']} has no such weights: {', '.join(report['left_out'])}.")
    for run in report["measured"]:
        lines.append(
            f"At {run['tokens']:,} tokens of the sample the approximation's embedding has a cosine of "
            f"{min(run['cosine'], 1):.4f} with that of exact attention; errors of layers are "
            f"{min(run['layer_errors']):.3f} to {max(run['layer_errors']):.3f}."
        )
    if report["not_measured"]:
        has = f"the sample has {report['sample']['tokens']:,} tokens"
        lines.append(f"Not measured at {report['not_measured']:,} tokens: {has}; --text takes a longer one.")
    start, most = settings.get("exact_below", 0), model["positions"]
    if start:
        lines.append(f"Inputs of fewer than {start:,} tokens get exact attention, which is faster there.")
    if most is not None and start > most:
        lines.append("That is every input it can read; --exact-below 0 uses the approximation for all.")
    return lines


def refuse_existing(out: Path) -> None:
    """Raise FileExistsError where something is, NotADirectoryError where nothing can be."""
    if os.path.lexists(out):
        raise FileExistsError(f"{out}: exists; name a folder that does not")
    above = nearest(out)
    if not above.is_dir():
        raise NotADirectoryError(f"{out}: cannot be written, {above} is not a folder")


def nearest(out: Path) -> Path:
    """The first folder above that there is."""
    return next(parent for parent in out.absolute().parents if parent.exists())


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` where all goes well and is gone where not."""
    filling = nearest(out) / f".{out.name}.{uuid.uuid4().hex[:8]}"
    filling.mkdir()
    try:
        yield filling
        refuse_existing(out)  # again, for it took minutes
        out.parent.mkdir(parents=True, exist_ok=True)
        filling.rename(out)
    finally:
        shutil.rmtree(filling, ignore_errors=True)
