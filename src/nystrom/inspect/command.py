"""Can this model's attention be exchanged, and with what settings? One HTML file that opens anywhere, and its numbers.

nystrom inspect MODEL reviews/ --target-error 0.1 --lengths 1024 4096 16384 --out report.html
"""

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated

import torch
from tyro.conf import Positional, arg

from nystrom.bench.methods import check_sizes
from nystrom.bench.timing import torch_threads
from nystrom.environment import describe
from nystrom.inspect import cost
from nystrom.inspect.advice import RECOMMENDED, answer, reason, recommend
from nystrom.inspect.measure import Numbers, fidelity, layer_numbers, short
from nystrom.inspect.pictures import default_heads, picture
from nystrom.inspect.report import html
from nystrom.inspect.settings import EXACT, METHODS, Setting, settings
from nystrom.inspect.texts import pieces
from nystrom.models import Layer, capture, load, num_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH = 512
"""Tokens per text where the model reads as many."""
COUNTS = (16, 32, 64, 128)
"""Landmarks, and exact keys, that are tried where the text is longer."""
MOST_HEADS = 10
"""Heads whose maps keep the page below 3 MB (count)."""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Can this model's attention be exchanged, and with what settings? One HTML report, and its numbers as JSON."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Folder, or name on the Hugging Face Hub, of an encoder."""
    text: Annotated[Positional[Path], arg(metavar="TEXT")]
    """File, or folder of files, that the model reads."""
    out: Path = Path("report.html")
    """HTML file to write; opens offline in any browser."""
    json: Path | None = None
    """File for the numbers; default: as out, ending in .json."""
    force: bool = False
    """Replace these files where they exist."""
    target_error: float = 0.1
    """Largest relative error of a layer's attention output that you accept."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 16384)
    """Lengths at which the speed-up is predicted (tokens)."""
    heads: tuple[str, ...] = ()
    """Heads whose maps are drawn, as layer:head from 0; default: those of the largest, median and smallest error."""
    length: int | None = None
    """Tokens per text; default: as many as the model's positions reach, up to 512."""
    texts: int = 4
    """Texts to measure on (count)."""
    landmarks: tuple[int, ...] | None = None
    """Landmark counts to try; default: 16 32 64 128, those below the length."""
    top_k: tuple[int, ...] | None = None
    """Exact keys per block to try, for the residual method (count); default: 16 32 64 128, those below the length."""
    threads: int = torch.get_num_threads()
    """Threads that torch computes with."""


def run(config: Inspect) -> None:
    """Measure, write both files, and print the answer."""
    check(config)
    files = targets(config)
    refuse_existing(files, config.force)
    with torch_threads(config.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        report = measure(config)
    refuse_existing(files, config.force)  # again, for it took minutes
    write_together(dict(zip(files, (html(report), json.dumps(report, indent=1, allow_nan=False)), strict=True)))
    print("\n" + "\n".join([report["answer"]["headline"], *report["answer"]["sentences"]]))
    print(f"\nWrote {files[0]} and {files[1]}")


def check(config: Inspect) -> None:
    """Raise ValueError unless everything asked for can be measured, as far as the settings say."""
    optional = {"length": config.length, "landmarks": config.landmarks, "top_k": config.top_k}
    given = {name: value for name, value in optional.items() if value is not None}
    check_sizes(texts=config.texts, lengths=config.lengths, threads=config.threads, **given)
    if not 0 < config.target_error < 1:
        raise ValueError(f"target_error must be between 0 and 1, an error of 10 % being 0.1: got {config.target_error}")
    if len(config.heads) > MOST_HEADS:
        raise ValueError(f"heads must be at most {MOST_HEADS}, to keep the page small: got {len(config.heads)}")
    for head in config.heads:
        parse(head)


def parse(head: str) -> tuple[int, int]:
    """Layer and head, as written layer:head."""
    match head.split(":"):
        case [layer, number] if layer.isdecimal() and number.isdecimal():
            return int(layer), int(number)
    raise ValueError(f"heads must be written layer:head, each from 0, such as 0:3: got {head!r}")


def targets(config: Inspect) -> tuple[Path, Path]:
    """The HTML and the JSON file."""
    for file in (config.out, config.json):
        if file is not None and file.is_dir():
            raise IsADirectoryError(f"{file}: is a folder; name a file")
    numbers = config.out.with_suffix(".json") if config.json is None else config.json
    if numbers.resolve() == config.out.resolve():
        raise ValueError(f"out and json must be two files: got {config.out} and {numbers}")
    return config.out, numbers


def refuse_existing(files: tuple[Path, Path], force: bool) -> None:
    """Raise FileExistsError where something would be lost, NotADirectoryError where nothing can be written."""
    for file in files:
        if file.exists() and not force:
            raise FileExistsError(f"{file}: exists; pass another name, or --force to replace it")
        above = next(parent for parent in file.absolute().parents if parent.exists())
        if not above.is_dir():
            raise NotADirectoryError(f"{file}: cannot be written, {above} is not a folder")


def measure(config: Inspect) -> Numbers:
    """The whole report, as JSON takes it."""
    model, tokenizer = load(config.model)
    length = text_length(config, num_positions(model))
    known = settings(counts("landmarks", config.landmarks, length), counts("top_k", config.top_k, length))
    ids = pieces(tokenizer, config.text, length, config.texts)
    say(f"{type(model).__name__} reads {config.texts} texts of {length} tokens")
    seen = [capture(model, each[None]) for each in ids]
    heads = asked_heads(config, seen[0])
    say("timing attention at your lengths")
    speed = cost.times(seen[0][0], known, config.lengths, config.threads)
    speed["rest_ms_per_token"] = cost.rest_ms(model, ids, config.threads)
    layers = []
    for texts in zip(*seen, strict=True):
        say(f"measuring layer {len(layers) + 1} of {len(seen[0])}")
        layer = layer_numbers(list(texts), known)
        layers.append(layer | advice(layer, speed, config.target_error))
    say("running the whole model with each setting")
    options = {RECOMMENDED: [layer["recommended"] for layer in layers]}
    options |= {name: [name] * len(layers) for name in known}
    ends = fidelity(model, ids, options, known)
    report = {
        "format": 1,
        **about(config, model, seen, known),
        "tokens": [str(tokenizer.decode([token])) for token in ids[0].tolist()],
        "layers": layers,
        "options": {x: ends[x] | layer_errors(y, layers) | cost.speed_up(y, speed) for x, y in options.items()},
        "speed": speed,
        "heads": drawn(heads or default_heads(layers), layers, seen[0], known),
    }
    return report | {"answer": answer(report, known)}


def say(what: str) -> None:
    """Progress, on a line of its own."""
    print(f"... {what}", flush=True)


def text_length(config: Inspect, reach: int | None) -> int:
    """Tokens per text.

    Raises:
        ValueError: the model cannot read as many.
    """
    if config.length is None:
        return LENGTH if reach is None else min(LENGTH, reach)
    if reach is not None and config.length > reach:
        raise ValueError(f"{config.model} reads at most {reach} tokens: got length {config.length}")
    return config.length


def counts(name: str, given: tuple[int, ...] | None, length: int) -> tuple[int, ...]:
    """Counts to try: those given, or of COUNTS those below the length.

    Raises:
        ValueError: one is not below the length, where exact attention costs no more.
    """
    found = tuple(count for count in COUNTS if count < length) if given is None else given
    if not found or max(found) >= length:
        raise ValueError(f"{name} must be below the length, {length} tokens: got {' '.join(map(str, found or COUNTS))}")
    return found


def asked_heads(config: Inspect, layers: list[Layer]) -> dict[tuple[int, int], str]:
    """The heads that the user names.

    Raises:
        ValueError: the model has no such head.
    """
    heads = [parse(head) for head in config.heads]
    for layer, head in heads:
        if layer >= len(layers) or head >= layers[layer].query.shape[1]:
            raise ValueError(
                f"heads: got {layer}:{head}, but {config.model} has {len(layers)} layers of "
                f"{layers[0].query.shape[1]} heads, each counted from 0"
            )
    return dict.fromkeys(heads, "asked for")


def advice(layer: Numbers, speed: Numbers, target: float) -> Numbers:
    """What the layer should run, why, which setting is the closest, and which of them the maps and charts show."""
    at_longest = {choice: ms[-1] for choice, ms in speed["ms"].items()}
    choice = recommend(layer["error"], at_longest, target)
    closest = min(layer["error"], key=layer["error"].__getitem__)
    shown = closest if choice == EXACT else choice
    why = reason(choice, layer, target, speed["lengths"][-1])
    return {"recommended": choice, "reason": why, "closest": closest, "shown": shown}


def layer_errors(choices: list[str], layers: list[Numbers]) -> Numbers:
    """Mean and largest error of the layers, each with the attention of its id."""
    errors = [0.0 if choice == EXACT else x["error"][choice] for choice, x in zip(choices, layers, strict=True)]
    return {"error_mean": short(mean(errors)), "error_most": max(errors)}


def about(config: Inspect, model: "PreTrainedModel", seen: list[list[Layer]], known: dict[str, Setting]) -> Numbers:
    """What was measured, on what; of a path the last two parts, which say enough and not whose machine it was."""
    _, h, n, d = seen[0][0].query.shape
    name = "/".join(Path(config.model).parts[-2:])
    sizes = {"layers": len(seen[0]), "heads": h, "head_dim": d, "positions": num_positions(model)}
    return {
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": describe() | {"threads": config.threads},
        "model": {"name": name, "architecture": type(model).__name__, **sizes},
        "texts": {"path": "/".join(config.text.parts[-2:]), "count": len(seen), "length": n},
        "target_error": config.target_error,
        "methods": {method.name: {"title": method.title, "swept": method.swept} for method in METHODS},
        "settings": {
            name: {"method": x.method.name, "label": x.label, "options": x.options, "code": x.code}
            for name, x in known.items()
        },
    }


def drawn(
    heads: dict[tuple[int, int], str], layers: list[Numbers], seen: list[Layer], known: dict[str, Setting]
) -> list[Numbers]:
    """Each head's maps: what its layer is shown with, then the closest setting of each method."""
    found = []
    for (at, head), why in heads.items():
        error = layers[at]["error"]
        best = [min((x for x in known if known[x].method is y), key=error.__getitem__) for y in METHODS]
        choices = list(dict.fromkeys([layers[at]["shown"], *best]))
        found.append({"why": why, **picture(seen[at], head, choices, known)})
    return found


def write_together(texts: dict[Path, str]) -> None:
    """Write files, all of them or none, and none by half."""
    waiting: dict[Path, Path] = {}
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            waiting[path] = path.with_name(f".{path.name}.{os.getpid()}")
            waiting[path].write_text(text, encoding="utf-8")
        for path, written in waiting.items():
            os.replace(written, path)
    finally:
        for written in waiting.values():
            written.unlink(missing_ok=True)
