"""What approximations of attention do inside a pretrained encoder that reads real text.

nystrom bench error --model MODEL --text reviews/pos reviews/neg --probe-texts 1000 --out error.jsonl
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nystrom.analysis import exact_attention, layer_error, output_error
from nystrom.bench.approximations import Approximation, Attend, approximations
from nystrom.bench.cost import multiply_adds
from nystrom.bench.embeddings import EndToEnd
from nystrom.bench.lines import Grid, Line, record, show, tables
from nystrom.bench.methods import check_sizes
from nystrom.bench.texts import Texts, draw
from nystrom.bench.timing import take_turns, times_ours, torch_threads
from nystrom.models import Layer, capture, load, num_positions, tile_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Error:
    """Error of approximate attention in a pretrained encoder on real text, with its cost and time."""

    model: str
    """Folder, or name on the Hugging Face Hub, of an encoder."""
    text: tuple[Path, ...]
    """Files or folders to read, a document per file; of several each is a class for the probe."""
    length: int = 512
    """Tokens per text: longer documents are cut, shorter ones left out."""
    texts: int = 16
    """Texts to measure on (count)."""
    num_landmarks: tuple[int, ...] = (64,)
    """Landmark counts, for the methods that have landmarks."""
    methods: tuple[str, ...] | None = None
    """What to measure, by name; default all."""
    end_to_end: bool = True
    """Run the model with each method in every layer as well."""
    probe_texts: int = 0
    """Further texts for a linear probe of the class: half fit it, half test it (count); 0 for none."""
    tile_positions: bool = False
    """Repeat learnt position embeddings to read texts longer than the model was made for."""
    join: bool = False
    """Put documents one after another until they fill the length."""
    rounds: int = 5
    """Times that every method is timed, in turn (count)."""
    seconds: float = 0.2
    """Least time per method and round."""
    threads: int = torch.get_num_threads()
    """Threads that torch computes with."""
    seed: int = 0
    """Of the order of the texts."""
    out: Path | None = None
    """File to append the JSON lines to, each as soon as it is measured."""


def run(config: Error) -> list[Line]:
    """Measure, print a table, and append the lines to config.out."""
    check(config)
    with torch_threads(config.threads):
        lines = record("error", measure_all(config), config.out)
    show(*(summary(table) for table in tables(lines)))
    return lines


def check(config: Error) -> None:
    """Raise ValueError unless everything asked for can be measured, as far as the settings say."""
    check_sizes(length=config.length, num_landmarks=config.num_landmarks, rounds=config.rounds, threads=config.threads)
    known = [method.name for method in approximations(1)]
    for name in config.methods or ():
        if name not in known:
            raise ValueError(f"methods must be among {', '.join(known)}: got {name!r}")
    if config.methods == ():
        raise ValueError(f"methods must name at least one: {', '.join(known)}")
    if config.texts < 2:
        raise ValueError(f"texts must be at least 2, to have a nearest one: got {config.texts}")
    if config.probe_texts and (config.probe_texts < 4 or len(config.text) < 2 or not config.end_to_end):
        raise ValueError(
            f"a probe needs at least 4 texts, two paths in text, and end_to_end: got probe_texts = "
            f"{config.probe_texts}, {len(config.text)} paths, end_to_end = {config.end_to_end}"
        )


class Seen(NamedTuple):
    """What a layer's attention gets for one text, and what exact attention makes of it."""

    layer: Layer
    output: Float[Tensor, "1 h n d"]
    of_signs: Float[Tensor, "1 h n d"]
    """The exact output for other values: see `signs`."""


def see(model: "PreTrainedModel", ids: Int[Tensor, "1 n"]) -> list[Seen]:
    """What every layer sees of a text."""
    seen = []
    for x in capture(model, ids):
        output, of_signs = (exact_attention(x.query, x.key, v, None, x.scale) for v in (x.value, signs(x)))
        seen.append(Seen(x, output, of_signs))
    return seen


def signs(layer: Layer) -> Float[Tensor, "1 h n d"]:
    """Values that show an n x n attention matrix without making it: random signs, and ones in the last column.

    For a matrix M and columns z of random signs, E |M z|² = ‖M‖²: the relative error of the output for these values
    estimates that of the matrix. M times ones are its row sums.
    """
    n, d = layer.value.shape[2:]
    columns = torch.randint(2, (n, d), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    columns[:, -1] = 1.0
    return columns.to(layer.value).expand(*layer.value.shape)


def measure_all(config: Error) -> Iterator[Line]:
    """One line per method and setting."""
    model, tokenizer = load(config.model)
    if config.tile_positions:
        model = tile_positions(model, config.length)
    elif (most := num_positions(model)) is not None and config.length > most:
        raise ValueError(f"{config.model} reads at most {most} tokens: got length {config.length}; or --tile-positions")
    drawn = draw(
        tokenizer,
        config.text,
        config.length,
        config.texts + config.probe_texts,
        seed=config.seed,
        join=config.join,
    )
    ids = drawn.ids[: config.texts]
    seen = [see(model, each[None]) for each in ids]
    methods = chosen(config)
    times = timed(config, methods, seen[0][len(seen[0]) // 2].layer)
    about = described(config, model, seen)
    judge = EndToEnd(model, ids, Texts(*(x[config.texts :] for x in drawn))) if config.end_to_end else None
    for method in methods:
        line = {"method": method.name, "label": method.label, "family": method.family, "settings": method.settings}
        line |= about | attention_errors(method.attend, seen)
        yield line | times[method.label] | (judge.measure(method.attend) if judge else {})


def chosen(config: Error) -> list[Approximation]:
    """The methods to measure; those without landmarks once, however many landmark counts there are."""
    every = (method for m in config.num_landmarks for method in approximations(m))
    wanted = {x.label: x for x in every if config.methods is None or x.name in config.methods}
    return list(wanted.values())


def described(config: Error, model: "PreTrainedModel", seen: list[list[Seen]]) -> Line:
    """What it was measured on; of a path the last two parts, which say enough and not whose machine it was."""
    _, h, n, d = seen[0][0].layer.query.shape
    sizes = {"n": n, "texts": len(seen), "layers": len(seen[0]), "heads": h, "head_dim": d}
    where = {"model": "/".join(Path(config.model).parts[-2:]), "text": ["/".join(x.parts[-2:]) for x in config.text]}
    how = {"tile_positions": config.tile_positions, "join": config.join, "seed": config.seed, "threads": config.threads}
    return {"architecture": type(model).__name__, **where, **sizes, **how}


def attention_errors(attend: Attend, seen: list[list[Seen]]) -> Line:
    """Relative errors of output and matrix, and mean |row sum - 1|: of each layer over its heads and all texts.

    `error`, `matrix_error` and `row_sum_error` are means over layers; `head_error` is the mean of `per_head`.
    """
    per_layer, per_head, of_matrix, of_sums = [], [], [], []
    for texts in zip(*seen, strict=True):
        approx = torch.cat([attend(x.query, x.key, x.value, None, x.scale) for x, *_ in texts])
        exact = torch.cat([output for _, output, _ in texts])
        per_layer.append(layer_error(approx, exact))
        per_head.append(output_error(approx, exact).tolist())
        approx = torch.cat([attend(x.query, x.key, signs(x), None, x.scale) for x, *_ in texts])
        exact = torch.cat([of_signs for *_, of_signs in texts])
        of_matrix.append(layer_error(approx[..., :-1], exact[..., :-1]))
        of_sums.append((approx[..., -1] - 1).abs().mean().item())
    return {
        "error": mean(per_layer),
        "matrix_error": mean(of_matrix),
        "row_sum_error": mean(of_sums),
        "head_error": mean(map(mean, per_head)),
        "per_layer": [round(error, 5) for error in per_layer],
        "per_head": [[round(error, 5) for error in heads] for heads in per_head],
    }


def timed(config: Error, methods: list[Approximation], layer: Layer) -> dict[str, Line]:
    """Of each method, on one layer of one text: multiply-adds per token and head, time, and its ratio to exact."""
    _, h, n, _ = layer.query.shape

    def call(attend: Attend) -> None:
        with torch.inference_mode():
            attend(layer.query, layer.key, layer.value, None, layer.scale)

    steps = {method.label: (lambda attend=method.attend: call(attend)) for method in methods}
    times = take_turns({"exact": lambda: call(exact_attention), **steps}, config.rounds, config.seconds, config.threads)
    return {
        label: {
            "multiply_adds": multiply_adds(step) / (n * h),
            "ms": median(times[label]),
            "ms_rounds": [round(ms, 4) for ms in times[label]],
            "times_exact": times_ours(times[label], times["exact"]),
        }
        for label, step in steps.items()
    }


COLUMNS: dict[str, tuple[str, str]] = {
    "error": ("error", "{error:.3f}"),
    "matrix_error": ("matrix", "{matrix_error:.3f}"),
    "row_sum_error": ("row sums", "{row_sum_error:.3f}"),
    "hidden_error": ("states", "{hidden_error:.3f}"),
    "cosine_mean": ("cosine (least)", "{cosine_mean:.3f} ({cosine_min:.3f})"),
    "nearest": ("nearest", "{nearest:.0%}"),
    "probe": ("probe", "{probe:.1%}"),
    "multiply_adds": ("multiply-adds", "{multiply_adds:.0f}"),
    "ms": ("ms", "{ms:.1f}"),
    "times_exact": ("of exact", "{times_exact:.2f}x"),
}
"""Of each field that a line may have: its heading and its cell."""


def summary(lines: list[Line]) -> Grid:
    """The lines of one length as a table, a row per method and setting."""
    first = lines[0]
    about = f"{first['model']}, {first['texts']} texts of {first['n']} tokens from {', '.join(first['text'])}"
    probe = f", probe on {first['probe_texts']} (exact {first['probe_exact']:.1%})" if "probe" in first else ""
    title = f"{about}{probe}, {first['threads']} threads"
    columns = {field: column for field, column in COLUMNS.items() if all(field in line for line in lines)}
    rows = [[line["label"], *(cell.format(**line) for _, cell in columns.values())] for line in lines]
    return Grid(title, ["method", *(heading for heading, _ in columns.values())], rows)
