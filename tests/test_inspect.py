"""`nystrom inspect`: its numbers against direct computation, its advice, and its page in a real browser."""

import ast
import base64
import hashlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from browser import CHROMIUM, browser
from nystrom.analysis import (
    diagonal_weight,
    exact_attention,
    layer_error,
    output_error,
    singular_values,
    softmax_matrix,
)
from nystrom.cli import run
from nystrom.inspect import command, cost
from nystrom.inspect.advice import (
    RECOMMENDED,
    answer,
    cosine,
    faster_from,
    percent,
    reason,
    recommend,
    times,
)
from nystrom.inspect.command import counts, write_together
from nystrom.inspect.measure import fidelity, spectrum, states
from nystrom.inspect.pictures import SIDE, decode, default_heads, encode, groups, picture
from nystrom.inspect.report import html
from nystrom.inspect.settings import EXACT, paste, settings
from nystrom.inspect.texts import pieces, special_tokens
from nystrom.models import capture, load

LAYERS, HEADS, N, COUNT = 3, 3, 150, 2
EVIL = "</script><img/src=x/onerror=alert(1)>"
ASKED = f"--length {N} --texts {COUNT} --landmarks 16 8 --top-k 4 24 --lengths 600 150 300 --heads 2:1 0:0 --threads 1"
KNOWN = settings((16, 8), (4, 24))
BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed; apt-get install chromium")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A tiny BERT with random weights, sharp attention and a tokenizer of words; a name that HTML must escape."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / 'tiny "bert" & <i>co'
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", EVIL, *(f"w{i}" for i in range(80))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    sizes = dict(hidden_size=24, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=32)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(names), max_position_embeddings=160, initializer_range=0.3, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Three documents of 170 words and one of 20, all of which hold something nasty."""
    folder = tmp_path_factory.mktemp("corpus") / "texts"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i, n in enumerate((170, 170, 170, 20)):
        words = [f"w{word}" for word in torch.randint(80, (n,), generator=generator)]
        (folder / f"{i}.txt").write_text(" ".join([EVIL, *words]))
    return folder


def nystrom(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The real command."""
    program = [sys.executable, "-c", "from nystrom.cli import main; main()", "inspect", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def made(encoder, corpus, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("made")
    done = nystrom(encoder, corpus, *ASKED.split(), "--target-error", "0.3", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    return folder / "report.html", done


@pytest.fixture(scope="module")
def report(made) -> dict:
    return json.loads(made[0].with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def read(encoder, corpus):
    """The model, and what it read for the report."""
    model, tokenizer = load(encoder)
    ids = pieces(tokenizer, corpus, N, COUNT)
    return model, ids, [capture(model, each[None]) for each in ids]


# Its numbers


def test_the_report_says_what_was_measured(report, made, encoder):
    model = {"architecture": "BertModel", "layers": LAYERS, "heads": HEADS, "head_dim": 8, "positions": 160}
    assert report["model"] == {"name": f"{encoder.parent.name}/{encoder.name}", **model}
    assert report["texts"]["count"] == COUNT and report["texts"]["length"] == N
    assert report["texts"]["path"].endswith("/texts") and report["texts"]["path"].count("/") == 1
    assert report["target_error"] == 0.3 and report["environment"]["threads"] == 1
    assert list(report["settings"]) == [
        *("nystrom-8", "nystrom-16", "spectral_shift-8", "spectral_shift-16", "residual-4", "residual-24")
    ]
    assert report["settings"]["residual-4"]["options"] == {"num_landmarks": 16, "top_k": 4}
    assert len(report["tokens"]) == N and EVIL in report["tokens"]
    assert report["answer"]["headline"] in made[1].stdout and "Wrote report.html and report.json" in made[1].stdout
    assert all(sentence in made[1].stdout for sentence in report["answer"]["sentences"])


def test_errors_and_spectra_of_layers_are_those_computed_directly(report, read):
    for index, texts in enumerate(zip(*read[2], strict=True)):
        layer = report["layers"][index]
        exact = torch.cat([exact_attention(x.query, x.key, x.value, None, x.scale) for x in texts])
        for name, setting in KNOWN.items():
            approx = torch.cat([setting.attend(x.query, x.key, x.value, None, x.scale) for x in texts])
            assert layer["error"][name] == pytest.approx(layer_error(approx, exact), rel=1e-3, abs=1e-6)
            heads = output_error(approx, exact).tolist()
            assert layer["head_error"][name] == pytest.approx(heads, rel=1e-3, abs=1e-6)
        matrices = torch.cat([softmax_matrix(x.query, x.key, None, x.scale) for x in texts])
        assert layer["diagonal"] == pytest.approx(diagonal_weight(matrices).mean().item(), rel=1e-4)
        curves = layer["singular_values"]
        assert curves["rank"][0] == 1 and curves["rank"][-1] == N
        values = singular_values(matrices)
        relative = (values / values[..., :1]).flatten(0, 1)
        for rank, median, least, most in zip(*curves.values(), strict=True):
            column = relative[:, rank - 1]
            want = [column.median().item(), column.min().item(), column.max().item()]
            assert [median, least, most] == pytest.approx(want, rel=1e-3, abs=1e-6)
        assert layer["rank90"] <= layer["rank99"]


def test_a_sum_of_layers_is_measured_where_every_layer_is():
    speed = {"lengths": [10, 20], "ms": {EXACT: [1.0, 4.0], "a": [2.0, 3.0], "b": [1.0, 1.0]}, "rest_ms_per_token": 0.1}
    speed["measured"] = {EXACT: [True, False], "a": [True, True], "b": [True, True]}
    assert cost.speed_up(["a", "b"], speed) == {
        "attention_ms": [3, 4],
        "measured": [True, True],
        "attention_speed_up": pytest.approx([2 / 3, 2], rel=1e-5),
        "model_speed_up": pytest.approx([3 / 4, 10 / 6], rel=1e-5),
    }
    assert cost.speed_up(["a", EXACT], speed)["measured"] == [True, False]


def test_ranks_hold_their_part_of_the_energy():
    values = torch.tensor([[[3.0, 1.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0], [1.0, 1.0, 0.3, 0.1]]])
    found = spectrum(values)  # 9 of 10; four alike; 2 of 2.1, 2.09 of 2.1
    assert [found["rank90"], found["rank99"]] == [2, 3]
    assert found["singular_values"]["rank"] == [1, 2, 3, 4]
    assert found["singular_values"]["median"] == pytest.approx([1, 1, 0.3, 0.1])
    assert spectrum(values[:, :1])["rank90"] == 1


def test_the_model_really_ran_with_each_option(report, read):
    model, ids, _ = read
    with torch.no_grad():
        exact = model(input_ids=ids).last_hidden_state
    choices = {RECOMMENDED: [layer["recommended"] for layer in report["layers"]]}
    choices |= {name: [name] * LAYERS for name in KNOWN}
    assert list(report["options"]) == list(choices)
    for name, each in choices.items():
        option, swapped = report["options"][name], states(model, ids, each, KNOWN)
        assert option["hidden_error"] == pytest.approx(((swapped - exact).norm() / exact.norm()).item(), rel=1e-3)
        found = torch.nn.functional.cosine_similarity(swapped.mean(1), exact.mean(1))
        assert option["cosine_mean"] == pytest.approx(found.mean().item(), abs=1e-5)
        assert option["cosine_min"] == pytest.approx(found.min().item(), abs=1e-5)
        errors = [0.0 if x == EXACT else report["layers"][i]["error"][x] for i, x in enumerate(each)]
        assert option["error_most"] == max(errors)
        assert option["error_mean"] == pytest.approx(sum(errors) / LAYERS, rel=1e-4)
    assert fidelity(model, ids, {"own": [EXACT] * LAYERS}, KNOWN)["own"]["hidden_error"] == 0


def test_times_and_what_follows_from_them(report):
    speed = report["speed"]
    assert speed["lengths"] == [150, 300, 600] and set(speed["ms"]) == {EXACT, *KNOWN}
    assert all(len(ms) == 3 and min(ms) > 0 for ms in speed["ms"].values())
    assert all(speed["measured"][name] == [True] * 3 for name in speed["ms"])
    for name, choices in {
        "nystrom-8": ["nystrom-8"] * LAYERS,
        RECOMMENDED: [x["recommended"] for x in report["layers"]],
    }.items():
        option = report["options"][name]
        for i, n in enumerate(speed["lengths"]):
            ours, exact = sum(speed["ms"][x][i] for x in choices), LAYERS * speed["ms"][EXACT][i]
            rest = n * speed["rest_ms_per_token"]
            assert option["measured"][i]
            assert option["attention_ms"][i] == pytest.approx(ours, rel=1e-4)
            assert option["attention_speed_up"][i] == pytest.approx(exact / ours, rel=1e-4)
            assert option["model_speed_up"][i] == pytest.approx((rest + exact) / (rest + ours), rel=1e-4)


def test_what_takes_too_long_is_continued(read, monkeypatch):
    """Exact attention with the square of the length, others in proportion, each from the last that was measured."""
    asked = []

    def turns(steps, rounds, seconds, threads):
        asked.append(list(steps))
        return {name: [70.0, 30.0, 40.0] if name == EXACT else [50.0 * len(asked), 900.0] for name in steps}

    monkeypatch.setattr(cost, "take_turns", turns)
    monkeypatch.setattr(cost, "LONGEST_MS", 100.0)
    found = cost.times(read[2][0][0], {"nystrom-8": KNOWN["nystrom-8"]}, (40, 10, 20, 80, 20), threads=1)
    assert found["lengths"] == [10, 20, 40, 80]
    assert found["ms"] == {EXACT: [30, 120, 480, 1920], "nystrom-8": [50, 100, 200, 400]}
    assert found["measured"] == {EXACT: [True, False, False, False], "nystrom-8": [True, True, False, False]}
    assert asked == [[EXACT, "nystrom-8"], ["nystrom-8"], [], []]


# Its advice


def test_recommended_is_the_fastest_that_meets_the_target(report):
    target, longest = report["target_error"], {name: ms[-1] for name, ms in report["speed"]["ms"].items()}
    for layer in report["layers"]:
        met = [EXACT, *(name for name, error in layer["error"].items() if error <= target)]
        assert layer["recommended"] in met
        assert longest[layer["recommended"]] <= 1.05 * min(longest[name] for name in met)
        assert layer["error"][layer["closest"]] == min(layer["error"].values())
        assert layer["shown"] == (layer["closest"] if layer["recommended"] == EXACT else layer["recommended"])


@pytest.mark.parametrize(
    ("cost", "target", "want"),
    [
        ({"a": 1, "b": 2, "c": 3}, 0.25, "b"),
        ({"a": 1, "b": 2, "c": 3}, 0.3, "a"),  # at most, not below
        ({"a": 1, "b": 2, "c": 3}, 0.05, EXACT),
        ({"a": 1.02, "b": 1.04, "c": 1}, 0.3, "c"),
        ({"a": 1, "b": 1.04, "c": 1.06}, 0.3, "b"),  # as fast, and closer
        ({"a": 10, "b": 9.6, "c": 11}, 0.3, EXACT),
    ],
)
def test_recommendation(cost, target, want):
    cost = {name: float(ms) for name, ms in (cost | {EXACT: 10}).items()}
    assert recommend({"a": 0.3, "b": 0.2, "c": 0.1}, cost, target) == want


def example(report: dict, recommended: list[str], target: float, **changes) -> dict:
    """A report of three layers with these recommendations and simple numbers."""
    layers = [{**layer, "recommended": x} for layer, x in zip(report["layers"], recommended, strict=True)]
    ends = {"hidden_error": 0.05, "cosine_mean": 0.999, "cosine_min": 0.99999}
    ends |= {"attention_speed_up": [0.5, 1.5, 12.34], "model_speed_up": [0.9, 1.2, 3.456]}
    options = {name: {**ends, "hidden_error": 0.3 - 0.01 * i} for i, name in enumerate(KNOWN)} | {RECOMMENDED: ends}
    return report | {"layers": layers, "target_error": target, "options": options} | changes


def test_answers(report):
    a, b = "residual-24", "nystrom-8"
    least = max(min(layer["error"].values()) for layer in report["layers"])
    yes = answer(example(report, [a, a, b], 0.9), KNOWN)
    assert yes["verdict"] == "yes" and yes["option"] == RECOMMENDED
    headline = "from 300 tokens on: approximate attention keeps an error of at most 0.9 in"
    assert yes["headline"] == f"Yes, {headline} all 3 layers."
    words = " ".join(yes["sentences"])
    for said in (
        "embeddings of your 2 texts of 150 tokens keep a cosine of 0.9990 with the original ones (least 0.9999), and "
        "the last hidden states differ by 5.0\u00a0%.",
        "faster than the exact one from 300 tokens on: 12.3× at 600 tokens, where the whole encoder becomes 3.5× f",
        "The model itself reads at most 160 tokens; to gain anything it has to be made to read more.",
        "Errors were measured at 150 tokens and may differ at other lengths.",
    ):
        assert said in words
    assert "would have to be accepted" not in words and "Exact attention stays" not in words

    part = answer(example(report, [EXACT, a, EXACT], least / 2), KNOWN)
    assert part["verdict"] == "in part" and f"at most {least / 2:g} in 1 of 3 layers." in part["headline"]
    words = " ".join(part["sentences"])
    assert "Exact attention stays in layers 0, 2." in words
    assert (
        f"For a setting in every layer, an error of {math.ceil(1000 * least) / 1000:g} would have to be accepted."
        in words
    )

    no = answer(example(report, [EXACT] * 3, 1e-9), KNOWN)
    assert no["verdict"] == "no" and no["headline"] == "No: no setting keeps an error of at most 1e-09 in any layer."
    assert no["option"] == "residual-24" and "residual_nystrom_attention(" in no["code"]
    assert no["sentences"][0].startswith(
        "The closest setting for all layers is Residual, 16 landmarks, top 24: with it"
    )
    slow = answer(example(report, [EXACT] * 3, 0.9), KNOWN)
    assert slow["headline"].startswith(
        "No: up to 600 tokens exact attention is faster than every setting with an error"
    )
    reaches = example(report, [a] * 3, 0.9, model=report["model"] | {"positions": 512})
    assert "512 tokens; times beyond are what its attention would take" in " ".join(answer(reaches, KNOWN)["sentences"])
    rotary = example(report, [a] * 3, 0.9, model=report["model"] | {"positions": None})
    assert "The model itself reads" not in " ".join(answer(rotary, KNOWN)["sentences"])


@pytest.mark.parametrize(
    ("ratios", "want"),
    [([2, 3, 4], 150), ([0.5, 1.1, 4], 300), ([2, 0.9, 1.1], 600), ([2, 3, 1], None), ([0.1, 0.2, 0.3], None)],
)
def test_faster_from_a_length_on(report, ratios, want):
    at = report | {"options": {"x": {"attention_speed_up": ratios, "model_speed_up": ratios}}}
    assert faster_from(at, "x") == want


def test_reasons():
    layer = {"error": {"a": 0.2, "b": 0.3}}
    assert reason("a", layer, 0.25, 4096) == "the cheapest setting with an error of at most 0.25"
    assert reason(EXACT, layer, 0.25, 4096) == "what meets the target is slower than exact attention at 4,096 tokens"
    assert reason(EXACT, layer, 0.1, 4096) == "no setting has an error of at most 0.1"


def test_numbers_in_words():
    assert [cosine(x) for x in (1.0, 0.99999, 0.98765)] == ["1", "0.9999", "0.9877"]
    assert [times(x) for x in (0.234, 1.999, 2.04, 99.94, 123.4)] == ["0.23×", "2.00×", "2.0×", "99.9×", "123×"]
    assert [percent(x) for x in (0.0123, 0.0994, 0.256)] == ["1.2\u00a0%", "9.9\u00a0%", "26\u00a0%"]


@pytest.mark.parametrize(
    "choices",
    [["nystrom-16"] * 3, ["residual-24", EXACT, "spectral_shift-8"], [EXACT] * 3],
    ids=["one", "mixed", "exact"],
)
def test_pasted_code_does_what_was_measured(read, choices):
    model, ids, _ = read
    scope = {"model": model, "batch": {"input_ids": ids[:1]}}
    with torch.no_grad():
        exec(paste(choices, KNOWN), scope)
    torch.testing.assert_close(scope["outputs"].last_hidden_state, states(model, ids[:1], choices, KNOWN))


def test_pasted_code_of_the_report(report):
    recommended = [layer["recommended"] for layer in report["layers"]]
    assert EXACT not in recommended or len(set(recommended)) > 1 or report["answer"]["verdict"] == "no"
    used = recommended if report["answer"]["option"] == RECOMMENDED else [report["answer"]["option"]] * LAYERS
    assert report["answer"]["code"] == paste(used, KNOWN)
    imports = [line for line in report["answer"]["code"].splitlines() if "import" in line]
    assert all(report["answer"]["code"].count(line.split()[-1]) >= 2 for line in imports)  # each is used


def test_settings_of_the_residual_method():
    fixed = {m: settings(m, (5,))["residual-5"].options["num_landmarks"] for m in ((16, 32, 128), (64, 128), (96, 128))}
    assert list(fixed.values()) == [32, 64, 96]


# What it reads


def test_pieces_are_whole_and_from_as_many_files_as_there_are(encoder, corpus, tmp_path):
    _, tokenizer = load(encoder)
    ids = pieces(tokenizer, corpus, 50, 3)
    assert ids.shape == (3, 50) and (ids[:, 0] == 2).all() and (ids[:, -1] == 3).all()
    starts = [tokenizer(path.read_text())["input_ids"][1:49] for path in corpus.iterdir()]
    assert all(row[1:-1].tolist() in starts for row in ids) and len({tuple(row.tolist()) for row in ids}) == 3
    assert torch.equal(pieces(tokenizer, corpus, 50, 3), ids)
    words = [f"w{i % 80}" for i in range(200)]
    (tmp_path / "one.txt").write_text(" ".join(words))
    of_one = pieces(tokenizer, tmp_path / "one.txt", 52, 4)[:, 1:-1].flatten()
    assert of_one.tolist() == tokenizer.convert_tokens_to_ids(words)  # one after another, nothing twice
    assert special_tokens(tokenizer) == ([2], [3])


def test_files_too_few_are_read_on(encoder, corpus):
    """Three files are long enough for two texts of 80 each: the first four are three beginnings and one second."""
    _, tokenizer = load(encoder)
    ids = pieces(tokenizer, corpus, 82, 4)
    assert (ids[:3, 1] == tokenizer.convert_tokens_to_ids(EVIL)).all() and ids[3, 1] != ids[0, 1]


@pytest.mark.unhooked
def test_too_short_texts_say_how_long_they_are_and_what_would_do(encoder, corpus, tmp_path):
    _, tokenizer = load(encoder)
    (tmp_path / "a.txt").write_text(" ".join(["w1"] * 98))
    (tmp_path / "b.txt").write_text(" ".join(["w1"] * 40))
    for length, count, best, said in (
        (101, 1, 100, "the longest of 2 files has 100, which makes 0 texts in all; pass --length 100"),
        (60, 2, 51, "the longest of 2 files has 100, which makes 1 texts in all; pass --length 51 or --texts 1"),
        (90, 3, 42, "--length 42 or --texts 1"),
    ):
        with pytest.raises(ValueError, match=f"too short for {count} texts of {length} tokens: .*{said}"):
            pieces(tokenizer, tmp_path, length, count)
        assert len(pieces(tokenizer, tmp_path, best, count)) == count
        with pytest.raises(ValueError):
            pieces(tokenizer, tmp_path, best + 1, count)
    (tmp_path / "a.txt").write_bytes(b"w1 \xff")
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 text: invalid start byte at offset 3"):
        pieces(tokenizer, tmp_path / "a.txt", 10, 1)
    with pytest.raises(ValueError, match="length must leave room beside 2 special tokens: got 2"):
        pieces(tokenizer, corpus, 2, 1)


# Its maps


def test_groups_sum_keys_and_average_queries():
    matrix = torch.rand(7, 7).softmax(-1)
    small = groups(matrix, 3)
    for i, rows in enumerate((slice(0, 3), slice(3, 6), slice(6, 7))):
        for j, columns in enumerate((slice(0, 3), slice(3, 6), slice(6, 7))):
            assert small[i, j] == pytest.approx(matrix[rows, columns].sum(1).mean().item(), rel=1e-5)
    torch.testing.assert_close(small.sum(1), torch.ones(3))
    assert torch.equal(groups(matrix, 1), matrix)


def test_maps_survive_their_coding():
    matrix = torch.tensor([[0.0, -0.25, 1e9], [1.0, 3.14159e-5, -2e5], [1e-3, 0.7, 0.1]])
    assert decode(encode(matrix)).flatten().tolist() == pytest.approx(
        [0, -0.25, 65504, 1, 3.14159e-5, -65504, 1e-3, 0.7, 0.1], rel=2e-3
    )


def test_maps_are_those_of_the_heads_asked_for(report, read):
    assert [(head["layer"], head["head"], head["why"]) for head in report["heads"]] == [
        *((2, 1, "asked for"), (0, 0, "asked for"))
    ]
    for head in report["heads"]:
        layer = read[2][0][head["layer"]]
        exact = softmax_matrix(layer.query, layer.key, None, layer.scale)[0, head["head"]]
        assert (head["group"], head["side"]) == (2, 75) and N / 2 == 75 <= SIDE
        assert decode(head["exact"]).allclose(groups(exact, 2), rtol=2e-3, atol=1e-6)
        shown, *others = head["approximate"]
        assert shown == report["layers"][head["layer"]]["shown"]
        assert {"nystrom", "spectral_shift", "residual"} == {name.split("-")[0] for name in head["approximate"]}
        eye = torch.eye(N).expand(1, HEADS, N, N)
        for name in (shown, *others):
            whole = KNOWN[name].attend(layer.query, layer.key, eye, None, layer.scale)[0, head["head"]]
            assert decode(head["approximate"][name]).allclose(groups(whole, 2), rtol=5e-3, atol=1e-4), name


def test_default_heads_are_the_extremes_and_the_middle():
    error = [[0.5, 0.1, 0.3], [0.2, 0.9, 0.4]]
    layers = [{"index": i, "shown": "a", "head_error": {"a": x, "b": [0.0] * 3}} for i, x in enumerate(error)]
    why = default_heads(layers)
    assert why == {
        (1, 1): "largest error of all heads",
        (0, 2): "median error of all heads",
        (0, 1): "smallest error of all heads",
    }
    assert list(default_heads([{"index": 0, "shown": "a", "head_error": {"a": [0.2]}}])) == [(0, 0)]


def test_a_short_text_is_drawn_whole(read):
    model, ids, _ = read
    found = picture(capture(model, ids[:1, :40])[0], 0, ["nystrom-8"], KNOWN)
    assert (found["group"], found["side"]) == (1, 40) and decode(found["exact"]).shape == (40, 40)


# Its files


@pytest.mark.unhooked
def test_an_existing_report_is_replaced_only_by_force(encoder, corpus, made, tmp_path):
    before = {path: path.read_bytes() for path in made[0].parent.iterdir()}
    done = nystrom(encoder, corpus, cwd=made[0].parent)
    assert done.returncode == 2 and "nystrom: report.html: exists; pass another name, or --force" in done.stderr
    assert {path: path.read_bytes() for path in made[0].parent.iterdir()} == before
    (tmp_path / "numbers").write_text("mine")
    arguments = [encoder, corpus, *ASKED.split(), "--out", tmp_path / "new" / "x.html", "--json", tmp_path / "numbers"]
    with pytest.raises(FileExistsError, match="numbers: exists"):
        run(["inspect", *map(str, arguments)])
    assert not (tmp_path / "new").exists()
    run(["inspect", *map(str, arguments), "--force"])
    assert json.loads((tmp_path / "numbers").read_text())["format"] == 1
    assert (tmp_path / "new" / "x.html").read_text().startswith("<!doctype html>")
    assert len(list(tmp_path.rglob("*"))) == 3


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "deeper" / "new"
    old.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        write_together({old: "after", new: "\ud800"})  # no UTF-8
    assert old.read_text() == "before" and [path for path in tmp_path.rglob("*") if path.is_file()] == [old]
    replaced = []
    replace = os.replace
    monkeypatch.setattr(command.os, "replace", lambda a, b: (replaced.append((a.parent, b)), replace(a, b)))
    write_together({old: "after", new: "new"})
    assert (old.read_text(), new.read_text()) == ("after", "new")
    assert replaced == [(tmp_path, old), (new.parent, new)]  # from beside it: never across file systems
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deeper", "new", "old"]


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--length 161", "reads at most 160 tokens: got length 161"),
        ("--length 0", "length must be at least 1: got 0"),
        ("--texts 0", "texts must be at least 1: got 0"),
        ("--lengths 0", "lengths must be at least 1: got (0,)"),
        ("--threads 0", "threads must be at least 1: got 0"),
        (
            "--texts 9",
            "too short for 9 texts of 160 tokens: the longest of 4 files has 173, which makes 3 texts in all",
        ),
        ("--landmarks 8 160", "landmarks must be below the length, 160 tokens: got 8 160"),
        ("--length 100 --top-k 100", "top_k must be below the length, 100 tokens: got 100"),
        ("--length 16", "landmarks must be below the length, 16 tokens: got 16 32 64 128"),
        ("--target-error 0", "target_error must be between 0 and 1, an error of 10 % being 0.1: got 0.0"),
        ("--target-error 10", "target_error must be between 0 and 1"),
        ("--heads 1", "heads must be written layer:head, each from 0, such as 0:3: got '1'"),
        ("--heads 1:-1", "got '1:-1'"),
        ("--heads 0:0 3:0 --texts 2", "heads: got 3:0, but"),
        ("--heads 0:3 --texts 2", "has 3 layers of 3 heads, each counted from 0"),
        ("--heads " + "0:0 " * 11, "heads must be at most 10, to keep the page small: got 11"),
        ("--json report.html", "out and json must be two files"),
        ("--out report.json", "out and json must be two files"),
        ("--out .", "is a folder; name a file"),
        ("--out file/x.html", "file/x.html: cannot be written"),
    ],
)
def test_refusals_name_the_cause_and_write_nothing(encoder, corpus, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises((ValueError, OSError)) as refusal:
        run(["inspect", str(encoder), str(corpus), *arguments.split()])
    assert message in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_most_heads_keep_the_page_below_3_mb():
    a_map = len(encode(torch.zeros(SIDE, SIDE)))
    assert command.MOST_HEADS * 5 * a_map < 2_300_000  # the exact one, what the layer is shown with, each method's best


def test_counts_below_the_length():
    assert counts("landmarks", None, 64) == (16, 32) and counts("landmarks", None, 2048) == (16, 32, 64, 128)
    assert counts("landmarks", (5,), 6) == (5,)


def test_every_flag_is_explained(capsys):
    (body,) = (x.body for x in ast.walk(ast.parse(inspect.getsource(command.Inspect))) if isinstance(x, ast.ClassDef))
    for field, following in pairwise(body):
        assert not isinstance(field, ast.AnnAssign) or isinstance(following, ast.Expr), ast.unparse(field)
    with pytest.raises(SystemExit) as done:
        run(["inspect", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert done.value.code == 0 and "MODEL TEXT" in shown and "Largest relative error of a layer's" in shown


@pytest.mark.unhooked
def test_no_text_and_no_model_are_named(encoder, tmp_path):
    done = nystrom(encoder, tmp_path / "nothing", cwd=tmp_path)
    assert done.returncode == 2 and "nothing: no such file or folder" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(OSError, match="nowhere: no such folder"):
        run(["inspect", "/nowhere", str(tmp_path), "--out", str(tmp_path / "x.html")])
    assert not list(tmp_path.iterdir())


# Its page, as text


class Seen(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self.path: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.path.append(tag)
            self.inside.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.path.pop() == tag  # well formed

    def handle_data(self, data):
        for tag in set(self.path):
            self.inside[tag][-1] += data


def test_the_page_needs_nothing_else(made, report):
    text = made[0].read_text()
    assert len(text) < 3_000_000
    page = Seen(text)
    outside = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}
    assert not [x for x in page.tags if outside & x[1].keys()] and not re.search(r"url\(|@import|fetch\(|XMLHttp", text)
    assert not [x for x in page.tags if any(name.startswith("on") or name == "style" for name in x[1])]
    addresses = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, which nobody asks for
    (policy,) = (x["content"] for tag, x in page.tags if tag == "meta" and "http-equiv" in x)
    _, script = page.inside["script"]
    (style,) = page.inside["style"]
    hashes = {
        name: base64.b64encode(hashlib.sha256(x.encode()).digest()).decode()
        for name, x in (("script", script), ("style", style))
    }
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'"
    )


def test_no_token_and_no_name_breaks_out(made, report, encoder):
    page = Seen(made[0].read_text())
    assert [tag for tag, _ in page.tags if tag in ("script", "img", "i")] == ["script", "script"]
    data, _ = page.inside["script"]
    assert json.loads(data) == report and EVIL in json.loads(data)["tokens"]
    name = f"{encoder.parent.name}/{encoder.name}"
    assert page.inside["h1"] == [name] and page.inside["title"] == [f"Attention of {name}"]


def test_the_page_tells_the_answer_without_its_script(made, report):
    page = Seen(made[0].read_text())
    words, found = page.inside["section"][0], report["options"][report["answer"]["option"]]
    for said in (report["answer"]["headline"], *report["answer"]["sentences"], report["answer"]["code"]):
        assert said in words
    assert f"Embedding cosine{cosine(found['cosine_mean'])}" in words
    options, layers, lengths = page.inside["table"]
    for name, option in report["options"].items():
        row = next(
            row for row in page.inside["tr"] if row.startswith(report["settings"].get(name, {}).get("label", "Recomm"))
        )
        assert row.endswith(
            f"{option['error_mean']:.3f}{option['error_most']:.3f}{option['hidden_error']:.3f}"
            f"{cosine(option['cosine_mean'])}{cosine(option['cosine_min'])}"
            f"{times(option['attention_speed_up'][-1])}{times(option['model_speed_up'][-1])}"
        )
    assert "Every setting" in options and "Tokens" in lengths
    for layer in report["layers"]:
        cells = f"{layer['index']}{layer['rank90']}{layer['rank99']}{layer['diagonal']:.3f}"
        assert cells in layers


# Its page, in a browser


@pytest.fixture(scope="module")
def page():
    with browser() as page:
        yield page


WIDTHS = pytest.mark.parametrize("width", [1280, 390])
OVERFLOW = """[...document.querySelectorAll('body *')].filter((x) => {
  const box = x.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1) && !x.closest('thead, pre, .choice input');
}).map((x) => x.outerHTML.slice(0, 120))"""


@BROWSER
@WIDTHS
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_opens_without_a_complaint_and_fits(page, made, width, dark):
    page.open(made[0], width, dark=dark)
    assert page.run("document.documentElement.scrollWidth") == width and page.run(OVERFLOW) == []
    assert page.run("document.querySelectorAll('svg.chart').length") == 8
    assert page.run(
        "[...document.querySelectorAll('svg.chart')].every((x) => x.querySelector('.axis-name') && "
        "x.querySelector('.curve, .mark') && !/NaN|undefined|Infinity/.test(x.outerHTML))"
    )
    assert page.run("getComputedStyle(document.body).backgroundColor") == (
        "rgb(16, 20, 24)" if dark else "rgb(255, 255, 255)"
    )
    heading = "getComputedStyle(document.querySelector('#options td'), '::after').content"
    assert page.run(heading) == ('"Layer error, mean"' if width == 390 else "none")  # a row is a card on a phone
    assert page.problems == []


@BROWSER
def test_a_complaint_would_be_heard(page, made, tmp_path):
    """The check above can fail: a script that is not the report's is refused, and so is an address."""
    broken = tmp_path / "broken.html"
    evil = "<script>alert(1)</script><img src='x.png'><div style='width: 2000px'>wide</div></main>"
    broken.write_text(made[0].read_text().replace("</main>", evil))
    page.open(broken, 390)
    assert sum("Content Security Policy" in problem for problem in page.problems) >= 3
    broken.write_text(made[0].read_text().replace("const LETTER", "const WORD"))  # changes the hash as well
    page.open(broken, 390)
    assert page.problems and page.run("document.querySelectorAll('svg.chart').length") == 0


COLOURS = """(() => {
  const c = document.querySelector('#map-%s canvas');
  const data = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
  return [c.width, new Set(Array.from({length: data.length / 4}, (_, i) => data.slice(4 * i, 4 * i + 3).join())).size];
})()"""


def as_number(shown: str) -> float:
    """What the page writes as 0.123, or as −1.2 × 10⁻⁴."""
    front, _, power = shown.strip().replace("−", "-").partition("10⁻")
    size = 10.0 ** -int(power.translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789"))) if power else 1.0
    return float(front.strip(" ×") or 1) * size


def centre(page, selector: str, row: float, column: float) -> tuple[float, float]:
    """Where a part of a canvas is in the window, after scrolling there."""
    page.run(f"document.querySelector('{selector}').scrollIntoView({{block: 'center'}})")
    x, y, width, height = page.run(
        f"(() => {{ const b = document.querySelector('{selector}').getBoundingClientRect(); "
        "return [b.left, b.top, b.width, b.height]; })()"
    )
    return x + column * width, y + row * height


@BROWSER
@WIDTHS
def test_maps_are_drawn_and_read(page, made, report, width):
    page.open(made[0], width)
    for name in ("exact", "approximate"):
        side, colours = page.run(COLOURS % name)
        assert side == 75 and colours > 100
    head = report["heads"][0]
    shown = next(iter(head["approximate"]))
    row, column = 30, 12
    for canvas in ("exact", "approximate"):
        page.hover(1, 1)
        page.hover(*centre(page, f"#map-{canvas} canvas", (row + 0.5) / 75, (column + 0.5) / 75))
        read = page.run("document.getElementById('readout').innerText").split("\n")
        read = " ".join(part.strip() for part in read if part.strip())
        exact, approximate = (decode(x)[row, column].item() for x in (head["exact"], head["approximate"][shown]))
        want = [f"query tokens 60–61 {' '.join(report['tokens'][60:62])}"]
        want.append(f"key tokens 24–25 {' '.join(report['tokens'][24:26])}")
        assert read.startswith(" ".join(want)), read
        numbers = [as_number(x) for x in re.findall(r"(?:exact|approximate) ([−0-9][^a-z]*)", read)]
        assert numbers == pytest.approx([exact, approximate], rel=0.06)
    numbers = torch.tensor([[0.5, -0.25, 3e-6], [-1e5, 1e-7, -0.001], [1.0, 0.0, 2e-5]])  # among them subnormal ones
    assert page.run(f"Array.from(decode({encode(numbers)!r}))") == decode(encode(numbers)).flatten().tolist()
    written = page.run("[0, 1e-4, 2.34e-5, 0.001, 0.12345, -0.5, -3e-5, 12.345, 12345].map(digits)")
    assert written == ["0", "10⁻⁴", "2.3 × 10⁻⁵", "0.001", "0.123", "−0.5", "−3.0 × 10⁻⁵", "12.3", "12,345"]
    assert [as_number(x) for x in written[:8]] == pytest.approx([0, 1e-4, 2.3e-5, 0.001, 0.123, -0.5, -3e-5, 12.3])
    assert page.problems == []


@BROWSER
def test_a_nasty_token_is_shown_as_text(page, made, report):
    page.open(made[0], 1280)
    at = report["tokens"].index(EVIL)
    page.hover(*centre(page, "#map-exact canvas", (at // 2 + 0.5) / 75, 0.5))
    assert EVIL in page.run("document.getElementById('readout').textContent")
    assert page.run("document.images.length") == 0 and page.problems == []


@BROWSER
def test_everything_is_reached_by_keyboard(page, made, report):
    page.open(made[0], 1280)
    page.run("document.querySelector('#layer-choice input:checked').focus()")
    before = page.run("document.getElementById('spectrum').innerHTML")
    page.press("ArrowRight")
    layer = report["layers"][1]
    assert page.run("document.getElementById('layer-words').textContent").startswith("Layer 1: ")
    assert page.run("document.getElementById('layer-code').textContent") == report["settings"][layer["shown"]]["code"]
    assert page.run("document.getElementById('spectrum').innerHTML") != before
    assert f"90 % in {layer['rank90']}" in page.run("document.getElementById('spectrum').textContent")
    focusable = (
        "document.querySelectorAll('svg.chart[tabindex], canvas[tabindex], input, button, pre[tabindex]').length"
    )
    assert page.run(focusable) >= 8 + 2 + LAYERS + 2 + 3 + 1 + 2
    page.run("document.querySelector('#by-layer svg.chart').focus()")
    page.press("ArrowRight")
    best = min((x for x in KNOWN if x.startswith("nystrom")), key=report["layers"][0]["error"].__getitem__)
    assert report["settings"][best]["label"] in page.run("document.querySelector('#by-layer .point-words').textContent")
    page.run("document.querySelector('#map-exact canvas').focus()")
    first = page.run("document.getElementById('readout').textContent")
    page.press("ArrowDown")
    page.press("ArrowLeft")
    second = page.run("document.getElementById('readout').textContent")
    assert "query tokens 74–75" in first.replace("\u00a0", " ") and "query tokens 76–77" in second
    assert "key tokens 74–75" in first and "key tokens 72–73" in second
    assert page.problems == []


@BROWSER
def test_another_head_or_approximation_is_another_map(page, made, report):
    page.open(made[0], 1280)
    picture_of = "document.querySelector('#map-{} canvas').toDataURL()"
    exact, approximate = (page.run(picture_of.format(x)) for x in ("exact", "approximate"))
    maps = list(report["heads"][0]["approximate"].values())
    other = next(i for i, drawn in enumerate(maps) if drawn != maps[0])
    page.run(f"document.querySelectorAll('#map-choice input')[{other}].click()")
    assert page.run(picture_of.format("exact")) == exact and page.run(picture_of.format("approximate")) != approximate
    second = list(report["heads"][0]["approximate"])[other]
    assert (
        page.run("document.querySelector('#map-approximate figcaption').textContent")
        == report["settings"][second]["label"]
    )
    page.run("document.querySelectorAll('#head-choice input')[1].click()")
    assert page.run(picture_of.format("exact")) != exact
    error = report["layers"][0]["head_error"][next(iter(report["heads"][1]["approximate"]))][0]
    chosen = page.run("document.querySelector('#map-choice input:checked + span').textContent")
    assert float(chosen.split("error ")[1]) == pytest.approx(error, rel=0.01)
    light = page.run(picture_of.format("exact"))
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    page.run("new Promise((done) => setTimeout(done, 50))")
    assert page.run(picture_of.format("exact")) != light
    assert page.problems == []


@BROWSER
@pytest.mark.parametrize("case", ["none meets", "one layer", "zero error", "extrapolated"])
def test_other_reports_are_drawn_too(page, report, tmp_path, case):
    """What the first one does not have: a No, a single layer, an error of zero, times that were not measured."""
    changed = json.loads(json.dumps(report))
    if case == "none meets":
        changed = example(changed, [EXACT] * 3, 1e-6)
        changed["layers"] = [{**x, "shown": x["closest"], "reason": "none"} for x in changed["layers"]]
        changed["options"] = {x: report["options"][x] | changed["options"][x] for x in changed["options"]}
        changed["options"][RECOMMENDED] |= {
            "hidden_error": 0.0,
            "error_mean": 0.0,
            "error_most": 0.0,
            "cosine_mean": 1.0,
        }
    elif case == "one layer":
        changed["layers"], changed["heads"] = changed["layers"][:1], changed["heads"][1:]
        changed["speed"]["lengths"] = [150, 300, 65536]
    elif case == "zero error":
        for layer in changed["layers"]:
            layer["error"] = dict.fromkeys(layer["error"], 0.0)
            layer["head_error"] = {x: [0.0] * HEADS for x in layer["head_error"]}
        for option in changed["options"].values():
            option["hidden_error"] = 0.0
    else:
        changed["speed"]["measured"] = {x: [True, False, False] for x in changed["speed"]["measured"]}
        for option in changed["options"].values():
            option["measured"] = [True, False, False]
    changed["answer"] = answer(changed, KNOWN)
    file = tmp_path / "report.html"
    file.write_text(html(changed))
    page.open(file, 390)
    assert page.problems == [] and page.run("document.documentElement.scrollWidth") == 390
    assert page.run("document.querySelectorAll('svg.chart').length") == 8
    assert not page.run("/NaN|undefined|Infinity/.test(document.querySelector('main').outerHTML)")
    if case == "extrapolated":
        lines = 4 + (changed["answer"]["option"] == RECOMMENDED)
        assert page.run("document.querySelectorAll('#times .mark.hollow').length") == 2 * lines
        assert page.run("document.querySelectorAll('#ratios .mark.hollow').length") == 2 * 2
        assert page.run("document.querySelector('#speed table').textContent").count("(extrapolated)") == 4
        assert page.run("document.querySelector('.figures').textContent").count("extrapolated") == 2
