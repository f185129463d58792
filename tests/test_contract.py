"""Promises about the package itself: what it exports, what it imports, which way imports point."""

import ast
import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nystrom
import nystrom.analysis
import nystrom.attention
import nystrom.functional
import nystrom.inverses
import nystrom.landmarks
import nystrom.maps
import nystrom.residual
import nystrom.spectral
from nystrom import environment
from nystrom.bench.table import markdown, read
from nystrom.lra.table import markdown as lra_markdown
from nystrom.lra.table import place
from nystrom.report.collect import collect, placed, together
from nystrom.report.page import details, made_with, overview

PACKAGE = Path(nystrom.__file__).parent
# Each may import itself and what stands above it.
ORDER = [
    "_validate",
    "_precision",
    "_opaque",
    "_cpu",
    "_stream",
    "_tree",
    "_choice",
    "landmarks",
    "_stretches",
    "inverses",
    "functional",
    "spectral",
    "residual",
    "convolution",
    "maps",
    "analysis",
    "attention",
    "multihead",
    "compat",
    "encoder",
    "streaming",
    "distributed",
    "baselines",
    "environment",
    "memory",
    "runs",
    "metrics",
    "presets",
    "models",
    "hf",
    "training",
    "data",
    "report",
    "lra",
    "bench",
    "inspect",
    "recipes",
    "demo",
    "cli",
]


def imports_of(path: Path) -> list[str]:
    """Every `nystrom.…` module that a file imports, at any depth of indentation."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in found if name.split(".")[0] == "nystrom"]


def test_imports_point_up():
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts == ("__init__",):
            continue
        assert parts[0] in ORDER, f"{path}: give it a place in ORDER"
        for name in imports_of(path):
            target = name.split(".")[1] if "." in name else None
            if target in ORDER:
                assert ORDER.index(target) <= ORDER.index(parts[0]), f"{path} imports {name}"
            assert not (parts[0] == "recipes" and target == "recipes"), f"{path}: recipes never import recipes"


def test_import_loads_torch_and_nothing_heavy():
    code = "import sys, nystrom; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"nystrom", "torch", "jaxtyping"} <= loaded
    heavy = {
        "transformers",
        "datasets",
        "accelerate",
        "matplotlib",
        "tensorboard",
        "tyro",
        "rich",
        "pandas",
        "beartype",
    }
    assert not loaded & heavy


def test_all_names_what_is_there():
    public = {
        name for name, thing in vars(nystrom).items() if not name.startswith("_") and type(thing).__name__ != "module"
    }
    assert set(nystrom.__all__) == public
    assert nystrom.__all__ == sorted(nystrom.__all__, key=lambda name: (name[0].islower(), name))


def test_sources_stay_small():
    for path in PACKAGE.rglob("*.py"):
        limit = 400 if path.parent.name == "recipes" else 300
        assert len(path.read_text().splitlines()) <= limit, path


def test_commit_is_this_projects_or_none(tmp_path, monkeypatch):
    """A copy inside another project's checkout must not claim that project's commit."""
    root = PACKAGE.parents[1]
    if (root / ".git").exists():
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert head.stdout.startswith((environment.commit() or "").rstrip("+")) and environment.commit()
    copy = tmp_path / "environment.py"
    copy.touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(environment, "__file__", str(copy))
    assert environment.commit() is None


def test_typed_marker_is_shipped():
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.unhooked
@pytest.mark.parametrize(
    "module",
    [
        nystrom.functional,
        nystrom.spectral,
        nystrom.residual,
        nystrom.landmarks,
        nystrom.inverses,
        nystrom.maps,
        nystrom.analysis,
        nystrom.attention,
    ],
)
def test_docstring_examples(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0 and outcome.failed == 0


@pytest.mark.unhooked
def test_readme_examples_run(tmp_path):
    from transformers import BertConfig, BertModel, NystromformerConfig, NystromformerForMaskedLM

    readme = (PACKAGE.parents[1] / "README.md").read_text()
    first, swap, checkpoint = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(first.strip().splitlines()) <= 10
    scope: dict[str, object] = {}
    exec(first, scope)
    output, exact = scope["output"], scope["exact"]
    assert isinstance(output, torch.Tensor) and isinstance(exact, torch.Tensor)
    assert output.shape == exact.shape and output.isfinite().all()

    sizes = dict(vocab_size=50, hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32)
    ids = torch.arange(5, 45)[None]
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    scope = {"PATH": tmp_path / "bert"}
    exec(swap, scope)
    model = scope["model"]
    assert isinstance(model, BertModel) and model(input_ids=ids).last_hidden_state.isfinite().all()
    assert model.config._attn_implementation == "nystrom_residual"
    assert model.config.nystrom == {"top_k": 96, "exact_below": 2048}
    NystromformerForMaskedLM(NystromformerConfig(**sizes)).save_pretrained(tmp_path / "nystromformer")
    scope = {"PATH": tmp_path / "nystromformer"}
    exec("import nystrom.hf\n" + checkpoint, scope)
    model = scope["model"]
    assert isinstance(model, torch.nn.Module) and model(input_ids=ids).logits.shape == (1, 40, 50)


def test_tables_in_the_docs_are_made_from_the_committed_lines():
    docs = PACKAGE.parents[1] / "docs"
    page = (docs / "results.md").read_text()
    for name in ("peers", "speed", "hf", "memory", "error", "synthetic", "lra", "scale", "ranks", "plan"):
        assert markdown(read(docs / "results" / f"{name}.jsonl")) in page, name


def test_the_tables_of_runs_are_made_from_the_committed_ones():
    docs = PACKAGE.parents[1] / "docs"
    page = (docs / "results.md").read_text()
    found = {name: placed(together(collect([docs / "results" / name])[0])) for name in ("language", "pretraining")}
    for own in found.values():
        assert overview(own) in page and made_with(own) in page
    assert details(found["pretraining"]) in page
    for name in ("lra", "lra-gpu"):
        assert lra_markdown(place(collect([docs / "results" / name])[0]), []) in page, name


def test_numbers_in_the_readme_are_those_of_the_committed_demo():
    root = PACKAGE.parents[1]
    readme, demo = (root / "README.md").read_text(), json.loads((root / "docs/results/demo.json").read_text())
    held_out, filled = demo["training"]["held_out"], demo["filled"]
    assert f"masked-byte accuracy        {held_out['accuracy']:6.1%}" in readme
    assert f"{held_out['baseline']['accuracy']:6.1%}" in readme
    assert f"filled  {filled['filled']}" in readme
    for row in demo["cost"]:
        cells = [f"{row[key]:.1f}" for key in ("exact_ms", "nystrom_ms", "time_ratio")]
        assert re.search(r"│ *" + " │ *".join([str(row["n"]), *cells]) + " │", readme), row
