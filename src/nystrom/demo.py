"""Everything once, in about three minutes on two CPU cores, without a network.

Pretrains a small byte-level model at length 2048 with Nyström attention on the standard library of the running Python,
scores it on files it never saw, fills masks in a real line, and times exact against Nyström attention.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # files only; a window needs a screen

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from nystrom import runs
from nystrom.bench import memory, speed
from nystrom.bench.lines import Grid, show
from nystrom.environment import describe
from nystrom.recipes import fill_mask, pretrain
from nystrom.recipes.pretrain import Pretrain


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Pretrain a small model on real text, use it, and time exact against Nyström attention (about 3 minutes)."""

    out: Path = Path("demo")
    """Folder for the model, the two pictures and demo.json; replaces what an earlier demo left there."""
    steps: int = 1400
    """Training steps (count)."""
    length: int = 2048
    """Tokens per block."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    """Sequence lengths that are timed (tokens)."""


def run(config: Demo) -> None:
    """Run the demo; every number that it prints is also in demo.json."""
    if config.length < 256:
        raise ValueError(f"length must be at least 256, for a line and its context: got {config.length}")
    model_folder, numbers = config.out / "model", config.out / "demo.json"
    if model_folder.exists():
        if not numbers.exists():
            raise FileExistsError(
                f"{model_folder}: exists, and not from a demo ({numbers} is missing); pass another --out"
            )
        shutil.rmtree(model_folder)
    config.out.mkdir(parents=True, exist_ok=True)
    runs.write_json(numbers, {"finished": False})  # from here on the folder is a demo's
    training = Pretrain(
        out=model_folder,
        length=config.length,
        steps=config.steps,
        eval_steps=max(1, config.steps // 5),
        batch_size=1,
        lr=2.5e-3,
        warmup=0.1,
        embed_dim=128,
        num_layers=2,
        num_heads=8,
        ffn_dim=256,
        dropout=0.0,
        conv_kernel_size=5,
        num_landmarks=32,
        precision="float32",
    )
    print(f"1. Pretraining a byte-level model with Nyström attention at length {config.length}\n", flush=True)
    metrics = pretrain.train(training)
    print_accuracy(metrics)
    print("\n2. Filling masks in a line of a held-out file\n")
    filled = fill_a_real_line(config, training)
    print("\n3. Exact against Nyström attention: forward pass, 4 heads of 64, 64 landmarks\n", flush=True)
    cost = measure_cost(config)
    plot_loss(metrics, config.out / "loss.png")
    plot_cost(cost, config.out / "cost.png")
    measured = {"training": metrics, "filled": filled, "cost": cost}
    runs.write_json(numbers, {"finished": True, "environment": describe(), **measured})
    print(f"\nWrote {config.out}/loss.png, cost.png, demo.json and model/")


def print_accuracy(metrics: dict[str, Any]) -> None:
    """Learned against guessed, on held-out files."""
    held_out, trained = metrics["held_out"], metrics["train"]
    commonest = bytes([held_out["baseline"]["token"] - 6]).decode(errors="replace")
    print(
        f"\n{trained['parameters']:,} parameters, trained on {trained['files']} files; "
        f"scored on {held_out['blocks']} blocks of {held_out['files']} files it never saw:\n"
        f"  masked-byte accuracy        {held_out['accuracy']:6.1%}\n"
        f"  always guessing {commonest!r}         {held_out['baseline']['accuracy']:6.1%}"
    )


def fill_a_real_line(config: Demo, training: Pretrain) -> dict[str, Any]:
    """Mask every seventh byte of the first long `def` line of the held-out files; the text before it is context."""
    _, held_out = pretrain.corpus(training)
    candidates = (
        (text, line)
        for source in held_out
        for document in source.documents()
        for text in document
        for line in text.splitlines()
        if line.lstrip().startswith("def ") and 50 <= len(line) <= 75 and line.isascii()
    )
    text, line = next(candidates, ("", ""))
    if not line:
        raise ValueError("no held-out file of this Python holds a 'def' line of 50 to 75 letters to mask")
    places = range(len(line) - len(line.lstrip()) + 5, len(line), 7)
    masked = "".join("[MASK]" if i in places else letter for i, letter in enumerate(line))
    before = text[: text.index(line)].encode()[-(config.length // 2) :].decode(errors="ignore")
    model, tokenizer = fill_mask.load(training.out)
    answer = fill_mask.fill(model, tokenizer, before + masked).text[-len(line) :]
    right = sum(answer[i] == line[i] for i in places)
    hidden = "".join("▁" if i in places else letter for i, letter in enumerate(line))
    print(f"  masked  {hidden}\n  filled  {answer}\n  truth   {line}\n  {right} of {len(places)} right")
    return {"masked": hidden, "filled": answer, "truth": line, "right": right, "masks": len(places)}


def measure_cost(config: Demo) -> list[dict[str, Any]]:
    """Time and peak memory of both forms at every length, printed as a table and returned row by row."""
    forms = ("exact", "nystrom")
    timing = speed.Speed(heads=4, forms=forms, rounds=3, seconds=0.05)
    sizing = memory.Memory(heads=4, forms=forms)
    rows = []
    for n in config.lengths:
        timed = {line["method"]: line for line in speed.measure(timing, n)}
        sized = {line["method"]: line for line in memory.measure_all(sizing, n)}
        row: dict[str, Any] = {"n": n, "time_ratio": timed["exact"]["times_nystrom"]}
        row |= {f"{form}_ms": timed[form]["ms"] for form in forms}
        rows.append(row | {f"{form}_extra_mib": sized[form]["extra_mib"] for form in forms})
    headings = ["n", "exact, ms", "Nyström, ms", "exact / Nyström", "exact, MiB", "Nyström, MiB"]
    keys = ["exact_ms", "nystrom_ms", "time_ratio", "exact_extra_mib", "nystrom_extra_mib"]
    show(Grid("", headings, [[str(row["n"]), *(f"{row[key]:.1f}" for key in keys)] for row in rows]))
    print("MiB: peak of a fresh process beyond inputs and output. Exact attention is torch's fused kernel.")
    return rows


def plot_loss(metrics: dict[str, Any], path: Path) -> None:
    """Training loss, and held-out accuracy against the baseline, over steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    losses = [(entry["step"], entry["loss"]) for entry in metrics["curve"] if "loss" in entry]
    scores = [(entry["step"], entry["eval_accuracy"]) for entry in metrics["curve"] if "eval_accuracy" in entry]
    left.plot(*zip(*losses, strict=True), color="tab:blue")
    left.set(title="Training loss", xlabel="step", ylabel="cross-entropy per masked byte (nats)")
    right.plot(*zip(*scores, strict=True), color="tab:blue", marker="o", label="Nyström model")
    baseline = metrics["held_out"]["baseline"]["accuracy"]
    right.axhline(baseline, color="tab:gray", linestyle="--", label="commonest byte")
    right.set(title="Masked-byte accuracy, held-out files", xlabel="step", ylim=(0, 1))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_cost(rows: list[dict[str, Any]], path: Path) -> None:
    """Time of both forms against length, log-log, and their ratio."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    lengths = [row["n"] for row in rows]
    for form, label, color in (("exact", "exact", "tab:red"), ("nystrom", "Nyström, 64 landmarks", "tab:blue")):
        left.plot(lengths, [row[f"{form}_ms"] for row in rows], color=color, marker="o", label=label)
    left.set(title="Forward pass, 4 heads of 64", xlabel="length (tokens)", ylabel="ms", xscale="log", yscale="log")
    left.legend()
    right.plot(lengths, [row["time_ratio"] for row in rows], color="tab:blue", marker="o")
    right.axhline(1, color="tab:gray", linestyle="--")
    right.set(title="How many times faster", xlabel="length (tokens)", ylabel="exact / Nyström", xscale="log")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xticks(lengths, [str(n) for n in lengths], minor=False)
        axes.minorticks_off()
    figure.savefig(path, dpi=120)
    plt.close(figure)
