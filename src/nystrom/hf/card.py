"""The README.md of a converted model: how to load it, its settings, what was measured; nothing that was not."""

import json
from pathlib import Path
from typing import Any

CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What the card of the first model says that holds for this one."""
TITLES = {"nystrom": "Nyström", "nystrom_shift": "spectral shift", "nystrom_residual": "residual Nyström"}


def metadata(source: Path, model: str) -> dict[str, Any]:
    """The head of the card, which the Hugging Face Hub reads; `source` is the folder of the first model."""
    import yaml
    from huggingface_hub import metadata_load

    old: dict[str, Any] = {}
    if (source / "README.md").is_file():
        try:
            old = metadata_load(source / "README.md") or {}
        except (ValueError, yaml.YAMLError):
            old = {}  # somebody else's card, and none of it is needed
    new = {name: old[name] for name in CARRIED if name in old}
    similar = ["sentence-transformers"] if (source / "modules.json").is_file() else []
    return {"base_model": model, **new, "library_name": "transformers", "tags": ["nystrom", "long-context", *similar]}


def card(head: dict[str, Any], report: dict[str, Any], folder: str) -> str:
    """The whole of it; `report` is what measured.json holds, `folder` the name to load the model by."""
    import yaml

    model, title = report["model"], TITLES[report["attention"]]
    reads = "" if model["positions"] is None else f" It reads up to {model['positions']:,} tokens."
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {report['base_model']}, with {title} attention",
        "",
        f"`nystrom convert` put {title} attention in the place of softmax attention in every layer of "
        f"`{report['base_model']}`: its cost grows linearly with the length.{reads} Nothing was trained: the weights "
        "are those of the model it was made from.",
        "",
        "```python",
        *loading(report, folder),
        "```",
        "",
        "`pip install 'nystrom[hf]'` gives the first line; without it transformers does not know this attention.",
        "",
        "## Settings",
        "",
        "| setting | value |",
        "|---|---|",
        f"| attention | `{report['attention']}` |",
        *(f"| {name} | {value} |" for name, value in report["settings"].items()),
        *([f"| positions | {model['positions_words']} |"] if model["positions_words"] else []),
        "",
        *exact_words(report),
        "## Measured",
        "",
        *measured(report),
    ]
    return "\n".join(lines)


def loading(report: dict[str, Any], folder: str) -> list[str]:
    """Python that opens it."""
    name, path = report["model"]["architecture"], json.dumps(folder)
    first = "import nystrom.hf"
    if report["model"]["sentence_transformers"]:
        return [
            first,
            "from sentence_transformers import SentenceTransformer",
            f"model = SentenceTransformer({path})",
        ]
    auto = "AutoModelForMaskedLM" if name.endswith("ForMaskedLM") else "AutoModel" if name.endswith("Model") else name
    return [
        first,
        f"from transformers import {auto}, AutoTokenizer",
        f"model, tokenizer = {auto}.from_pretrained({path}), AutoTokenizer.from_pretrained({path})",
    ]


def exact_words(report: dict[str, Any]) -> list[str]:
    """From which length on the exchanged attention is what runs."""
    start = report["settings"].get("exact_below", 0)
    if start == 0:
        return []
    return [
        f"Inputs of fewer than {start:,} tokens, padding included, get exact attention, which is the faster one there: "
        "the errors below do not occur in them. `nystrom.hf.configure(model, exact_below=0)` turns that off.",
        "",
    ]


def measured(report: dict[str, Any]) -> list[str]:
    """The table, and what its numbers mean."""
    runs, sample = report["measured"], report["sample"]
    what = "a text that comes with nystrom, written for it" if sample["source"] is None else f"`{sample['source']}`"
    where = f"commit {report['environment']['commit']}, " if report["environment"]["commit"] else ""
    missing = []
    if report["not_measured"]:
        missing = [
            f"At {report['not_measured']:,} tokens nothing was measured: the sample has {sample['tokens']:,}. "
            "`--text FILE` takes a longer one.",
            "",
        ]
    rows = [("", [f"{run['tokens']:,} tokens" for run in runs]), ("---", ["---"] * len(runs))]
    for i in range(len(runs[0]["layer_errors"])):
        rows.append((f"error of layer {i}", [f"{run['layer_errors'][i]:.3f}" for run in runs]))
    rows.append(("error of the last hidden states", [f"{run['hidden_error']:.3f}" for run in runs]))
    rows.append(("cosine of the embeddings", [f"{min(run['cosine'], 1):.4f}" for run in runs]))
    return [
        f"On {what}, its first tokens, against exact attention in the same model with the same positions; on the "
        f"{report['environment']['processor']}, nystrom {report['environment']['nystrom']}, {where}{report['utc']}. "
        "One text says little about another: `--text` measures on yours.",
        "",
        *(f"| {' | '.join([title, *cells])} |" for title, cells in rows),
        "",
        "The error of a layer is ‖approximate - exact‖ / ‖exact‖ of its attention's output, where the layers before "
        "it are exact; that of the hidden states is with every layer approximate. The embedding is the mean over the "
        "tokens of the last hidden states.",
        "",
        *missing,
        *convolution(report),
        "The same numbers are in measured.json.",
        "",
    ]


def convolution(report: dict[str, Any]) -> list[str]:
    """That the convolution changes nothing yet."""
    differences = [run["convolution_difference"] for run in report["measured"] if "convolution_difference" in run]
    if not differences:
        return []
    return [
        "The convolution's weights are zero, to be trained. On the sample the last hidden states with it and without "
        f"it differ by at most {max(differences):.1g}, relatively.",
        "",
    ]
