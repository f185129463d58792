"""Each attention kind we compare with, against its definition written out densely, and against other people's code."""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BigBirdConfig, LongformerConfig, ReformerConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

import reference
from nystrom.baselines import (
    BigBirdAttention,
    LinformerAttention,
    PerformerAttention,
    PerformerReLUAttention,
    ReformerAttention,
    SkyformerAttention,
    bigbird,
    linear_attention,
    window_attention,
)
from nystrom.baselines.draws import stream
from nystrom.baselines.performer import orthogonal_features
from nystrom.baselines.reformer import hashed_order
from nystrom.baselines.skyformer import choose

B, H, D, V = 2, 3, 5, 7
OneHead = Callable[[Tensor, Tensor, Tensor, list[int], int, int], Tensor]
"""query (n, d), key, value (n, v) of one head, its valid tokens, sample and head, to (n, v)."""


def tokens(n: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.randn(B, H, n, width, dtype=torch.float64) for width in (D, D, V))
    return query, key, value


def holes(n: int) -> Tensor:
    """A mask with gaps, of as many tokens in no sample as in another."""
    mask = torch.rand(B, n) < 0.75
    mask[:, n // 2], mask[1, -3:] = True, False
    return mask


def assert_defined_by(attend: Callable[..., Tensor], one_head: OneHead, n: int, shared: bool = False) -> None:
    """Output and gradients of `attend` are those of `one_head`, head by head."""
    for mask in (None, holes(n)):
        query, key, value = tokens(n)
        inputs = [x.requires_grad_() for x in ([query, value] if shared else [query, key, value])]
        query, key, value = (query, query, value) if shared else (query, key, value)
        real = torch.ones(B, n, dtype=torch.bool) if mask is None else mask
        heads = [
            one_head(query[i, j], key[i, j], value[i, j], real[i].nonzero().flatten().tolist(), i, j)
            for i, j in product(range(B), range(H))
        ]
        want = torch.stack(heads).unflatten(0, (B, H)) * real[:, None, :, None]
        got = attend(query, key, value, mask)
        torch.testing.assert_close(got, want)
        upstream = torch.randn_like(want)
        got_grads, want_grads = (torch.autograd.grad(out, inputs, upstream) for out in (got, want))
        torch.testing.assert_close(got_grads, want_grads)


def softmax_over(query: Tensor, key: Tensor, value: Tensor, reads: list[list[int]]) -> Tensor:
    """Exact attention where token i reads the tokens reads[i], one of them as often as it is named there."""
    rows = []
    for i, j in enumerate(reads):
        weights = torch.exp(key[j] @ query[i] / math.sqrt(D))
        rows.append(weights @ value[j] / weights.sum() if j else torch.zeros_like(value[0]))
    return torch.stack(rows)


def test_linear():
    def one_head(q, k, v, real, *_):
        q, k = nn.functional.elu(q) + 1, nn.functional.elu(k[real]) + 1
        weights = q @ k.T
        return weights / weights.sum(1, keepdim=True) @ v[real]

    assert_defined_by(linear_attention, one_head, 23)


def test_linear_attention_far_below_zero():
    """elu(x) + 1 in single precision is 0 below -17, and the weights 0 / 0; here they are so below -103."""
    query, key, value = (x.float() for x in tokens(11))
    out = linear_attention(query - 30, key - 30, value)
    want = linear_attention(query.double() - 30, key.double() - 30, value.double())
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)
    assert (linear_attention(query - 300, key - 300, value) == 0).all()


def test_linformer():
    module = LinformerAttention(H, 40, 6).double()
    nn.init.normal_(module.projection)

    def one_head(q, k, v, real, _, j):
        keys = sum(module.projection[j, :, t, None] * k[t] for t in real)
        values = sum(module.projection[j, :, t, None] * v[t] for t in real)
        return torch.softmax(q @ keys.T / math.sqrt(D), -1) @ values

    assert_defined_by(module, one_head, 23)
    assert_defined_by(module, one_head, 40)
    out = module(*tokens(23))
    out.sum().backward()
    grad = module.projection.grad
    assert grad is not None and (grad[:, :, :23].abs() > 0).all() and (grad[:, :, 23:] == 0).all()


def test_linformer_begins_as_the_lra_runs_do():
    assert LinformerAttention(2, 1000, 64).projection.std().item() == pytest.approx(0.02, rel=0.02)


def test_performer():
    module = PerformerAttention(D, 13).double()

    def one_head(q, k, v, real, *_):
        q, k = ((torch.exp(x @ module.features.T - x.square().sum(1, True) / 2)) for x in (q / D**0.25, k / D**0.25))
        weights = q @ k[real].T
        return weights / weights.sum(1, keepdim=True) @ v[real]

    assert_defined_by(module, one_head, 23)


def test_performer_relu():
    module = PerformerReLUAttention(D, 13).double()

    def one_head(q, k, v, real, *_):
        q, k = (0.001 + (x @ module.features.T / D**0.25).clamp_min(0) for x in (q, k))
        weights = q @ k[real].T
        return weights / weights.sum(1, keepdim=True) @ v[real]

    assert_defined_by(module, one_head, 23)


def test_performer_is_stable():
    """Features that leave single precision's range, in both directions and for different tokens."""
    module = PerformerAttention(D, 13)
    query, key, value = (x.float() for x in tokens(11))
    key[:, :, ::2] *= 100
    out = module(40 * query, key, value)
    want = module.double()(40 * query.double(), key.double(), value.double())
    torch.testing.assert_close(out.double(), want, rtol=1e-3, atol=1e-3)


def test_performers_features_give_the_softmax_kernel():
    """Without bias, within four standard errors; and attention itself comes near with many features."""
    x, y = 0.3 * torch.randn(2, 20, D, dtype=torch.float64)
    kernels = []
    for seed in range(300):
        features = orthogonal_features(12, D, torch.Generator().manual_seed(seed)).double()
        a, b = (torch.exp(z @ features.T - z.square().sum(1, True) / 2) for z in (x, y))
        kernels.append((a * b).mean(1))
    kernels = torch.stack(kernels)
    error = kernels.mean(0) - torch.exp((x * y).sum(1))
    assert (error.abs() < 4 * kernels.std(0) / math.sqrt(300)).all()

    query, key, value = (0.5 * x for x in tokens(30))
    exact = nn.functional.scaled_dot_product_attention(query, key, value)
    errors = [(PerformerAttention(D, m)(query, key, value) - exact).norm() / exact.norm() for m in (8, 64, 4096)]
    assert errors[2] < 0.1 < errors[1] < errors[0]


def test_performers_features_are_orthogonal_in_blocks():
    features = orthogonal_features(3 * 64 + 5, 64, torch.Generator().manual_seed(0)).double()
    assert features.shape == (197, 64)
    for block in features.split(64):
        products = block @ block.T
        assert (products - products.diag().diag()).abs().amin() < 1e-4
        torch.testing.assert_close(products, products.diag().diag(), rtol=0, atol=1e-4)
    squares = features.square().sum(1)  # chi-squared with 64 degrees of freedom
    assert squares.mean().item() == pytest.approx(64, abs=4 * math.sqrt(128 / 197))
    assert squares.std().item() == pytest.approx(math.sqrt(128), rel=0.25)
    first = [orthogonal_features(2, 2, torch.Generator().manual_seed(seed))[0] for seed in range(400)]
    assert (torch.stack(first).sign().mean(0).abs() < 0.2).all()  # every direction, not half of them


@pytest.mark.parametrize("num_hashes, length", [(1, 4), (2, 4), (3, 5), (1, 1), (2, 1), (2, 30)])
def test_reformer(num_hashes, length):
    """All rounds' tokens in one softmax, those met twice counted twice, and the token itself only where it is alone."""
    module = ReformerAttention(num_hashes, length).eval()

    def attend(query, key, value, mask):
        return module(query, key, value, mask)

    def one_head(q, k, v, real, _, j):
        n = len(q)
        mask = torch.isin(torch.arange(n), torch.tensor(real))[None]
        reads: list[list[int]] = [[] for _ in range(n)]
        for order in hashed_order(q.detach().expand(1, H, -1, -1), mask, num_hashes, length, 0):
            places = order[0, j, : len(real)].tolist()
            assert sorted(places) == real
            for place, token in enumerate(places):
                chunk = place // length
                near = places[max(0, chunk - 1) * length : (chunk + 1) * length]
                reads[token] += [other for other in near if other != token]
        for token in real:
            reads[token] = reads[token] or [token]
        unit = k / (k.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return softmax_over(q, unit, v, reads)

    assert_defined_by(attend, one_head, 23, shared=True)


def test_reformer_within_a_chunk_is_exact_without_the_token_itself():
    query, _, value = tokens(23)
    mask = holes(23)
    logits = query @ (query / query.norm(dim=-1, keepdim=True)).mT
    logits = logits.masked_fill(torch.eye(23, dtype=torch.bool) | ~mask[:, None, None], -torch.inf)
    want = logits.softmax(-1) @ value * mask[:, None, :, None]
    torch.testing.assert_close(ReformerAttention(2, 23).eval()(query, query, value, mask), want, rtol=0, atol=1e-4)


def test_reformer_hashes_by_the_nearest_random_direction():
    """Of as many as the sample's own tokens ask for, and their opposites; sorted by place within a bucket."""
    n, length, seed = 41, 4, 5
    query, mask = tokens(n)[0], holes(n)
    directions = stream(torch.randn, 11, (2, H, D), seed).double()
    for i, order in enumerate(hashed_order(query, mask, 2, length, seed)):
        for b, j in product(range(B), range(H)):
            real = mask[b].nonzero().flatten().tolist()
            own = directions[: math.ceil(len(real) / length), i, j]
            both = torch.cat([own, -own])
            bucket = {t: int(torch.stack([query[b, j, t] @ r for r in both]).argmax()) for t in real}
            assert len(set(bucket.values())) > 3
            assert order[b, j, : len(real)].tolist() == sorted(real, key=lambda t, bucket=bucket: (bucket[t], t))
    assert mask.sum(1).unique().numel() == 2


def test_reformer_hashes_long_inputs_in_parts(monkeypatch):
    query, mask = tokens(41)[0], holes(41)
    whole = hashed_order(query, mask, 2, 4, 0)
    monkeypatch.setattr("nystrom.baselines.reformer.BLOCK", 500)
    for parts, order in zip(hashed_order(query, mask, 2, 4, 0), whole, strict=True):
        assert torch.equal(parts, order)


def test_reformer_equals_transformers():
    """But for the tokens of a round's first chunk, which there look back at the last chunk of all."""
    n, length = 32, 4
    config = ReformerConfig(
        attention_head_size=D,
        num_attention_heads=H,
        hidden_size=16,
        num_hashes=2,
        num_buckets=16,
        lsh_attn_chunk_length=length,
        lsh_attention_probs_dropout_prob=0.0,
        is_decoder=False,
    )
    theirs = LSHSelfAttention(config).double().eval()
    hidden = torch.randn(B, n, 16, dtype=torch.float64)
    mask = torch.arange(n) < torch.tensor([[n], [n - 5]])
    query, value = (
        project(hidden).unflatten(-1, (H, D)).transpose(1, 2).detach() for project in (theirs.query_key, theirs.value)
    )
    seen = mask[:, None, :, None]
    rounds = hashed_order(query * seen, mask, 2, length, 0)
    buckets = torch.stack([order.argsort(-1) + i * n for i, order in enumerate(rounds)], 2)  # each a bucket of its own
    want = theirs(hidden, mask, buckets=buckets).hidden_states.unflatten(-1, (H, D)).transpose(1, 2)
    got = ReformerAttention(2, length).eval()(query, query, value, mask)
    first = torch.zeros(B, H, n, dtype=torch.bool)
    for order in rounds:
        first.scatter_(2, order[:, :, :length], True)
    compared = mask[:, None] & ~first
    assert compared.float().mean() > 0.5
    torch.testing.assert_close(got[compared], want[compared], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window, num_global", [(2, 0), (6, 2), (8, 1), (4, 9), (60, 3), (2, 40)])
@pytest.mark.parametrize("n", [1, 23])
def test_window(window, num_global, n):
    def one_head(q, k, v, real, *_):
        reads = [
            [j for j in real if abs(i - j) <= window // 2 or {i, j} & {*real[:num_global]}] if i in real else []
            for i in range(n)
        ]
        return softmax_over(q, k, v, reads)

    assert_defined_by(lambda *x: window_attention(*x, window=window, num_global=num_global), one_head, n)


def test_window_equals_transformers():
    n, window, num_global = 32, 8, 3
    config = LongformerConfig(
        hidden_size=H * D, num_attention_heads=H, attention_window=[window], attention_probs_dropout_prob=0.0
    )
    theirs = LongformerSelfAttention(config, 0).double().eval()
    for name in ("query", "key", "value"):
        getattr(theirs, f"{name}_global").load_state_dict(getattr(theirs, name).state_dict())
    hidden = torch.randn(B, n, H * D, dtype=torch.float64)
    mask = torch.arange(n) < torch.tensor([[n], [n - 5]])
    query, key, value = (
        project(hidden).unflatten(-1, (H, D)).transpose(1, 2) for project in (theirs.query, theirs.key, theirs.value)
    )
    read_by_all = (torch.arange(n) < num_global).expand(B, n)
    say = torch.where(mask, 0.0, -10000.0).masked_fill(read_by_all, 10000.0)
    want = theirs(hidden, say, ~mask, read_by_all, True)[0]
    got = window_attention(query, key, value, mask, window=window, num_global=num_global)
    torch.testing.assert_close(got.transpose(1, 2).flatten(2)[mask], want[mask], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block, num_random", [(4, 0), (4, 2), (3, 9), (1, 3), (40, 2)])
@pytest.mark.parametrize("n", [1, 9, 31])
def test_bigbird(block, num_random, n):
    module = BigBirdAttention(block, num_random, seed=3)

    def one_head(q, k, v, real, _, j):
        last = max(real, default=0) // block
        index, present = bigbird.read_blocks(torch.tensor([last]), last + 1, H, num_random, 3)
        reads = []
        for i in range(n):
            own = i // block
            if i not in real or own in (0, last):
                reads.append(real if i in real else [])
                continue
            near = {own - 1, own, own + 1, 0, last}
            chosen = index[0, j, own, 5:][present[0, j, own, 5:]].tolist()
            assert len(set(chosen) - near) == len(chosen) == min(num_random, last + 1 - len(near))
            reads.append([t for t in real if t // block in near | set(chosen)])
        return softmax_over(q, k, v, reads)

    assert_defined_by(module, one_head, n)


def test_bigbirds_random_blocks_are_evenly_chosen():
    """By each block, among those that it does not read anyway."""
    counts = torch.zeros(12, 12)
    for seed in range(100):
        index, present = bigbird.read_blocks(torch.tensor([11]), 12, 4, 2, seed)
        assert present[:, :, :, 5:].all()
        for j in range(4):
            counts.scatter_add_(1, index[0, j, :, 5:], torch.ones(12, 2))
    for row in range(12):
        free = [j for j in range(1, 11) if abs(row - j) > 1]
        assert counts[row].sum() == counts[row, free].sum() == 800
        mean = 800 / len(free)
        assert (counts[row, free] - mean).abs().max() < 4.5 * math.sqrt(mean)


def test_bigbirds_random_blocks_differ_by_seed_and_head():
    def chosen(seed: int) -> Tensor:
        return bigbird.read_blocks(torch.tensor([30]), 31, 2, 3, seed)[0][0, :, :, 5:]

    assert torch.equal(chosen(0), chosen(0))
    assert not torch.equal(chosen(0), chosen(1)) and not torch.equal(*chosen(0))


def test_bigbird_equals_transformers(monkeypatch):
    """Given its random blocks, in a length whose every block has some."""
    n, block, num_random = 32, 4, 1
    config = BigBirdConfig(
        hidden_size=H * D, num_attention_heads=H, block_size=block, num_random_blocks=num_random, use_bias=True
    )
    theirs = BigBirdBlockSparseAttention(config, seed=0).double().train()
    hidden = torch.randn(B, n, H * D, dtype=torch.float64)
    mask = torch.arange(n) < torch.tensor([[n], [n - 3]])
    query, key, value = (
        project(hidden).unflatten(-1, (H, D)).transpose(1, 2) for project in (theirs.query, theirs.key, theirs.value)
    )
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(mask.double(), block)
    want = theirs(hidden, band, rows, columns, blocked, blocked)[0]

    np.random.seed(0)
    lengths, counts = theirs._get_rand_attn_plan(n, block, num_random)
    plan = theirs._bigbird_block_rand_mask_with_head(n, n, block, block, H, lengths, counts)
    ours = bigbird.read_blocks

    def planned(last, num_blocks, num_heads, *_):
        index, present = ours(last, num_blocks, num_heads, num_random, 0)
        index[:, :, 1:-1, 5:] = torch.tensor(np.stack(plan))
        present[:, :, 1:-1, 5:] = True
        return index, present

    monkeypatch.setattr(bigbird, "read_blocks", planned)
    got = BigBirdAttention(block, num_random)(query, key, value, mask)
    torch.testing.assert_close(got.transpose(1, 2).flatten(2)[mask], want[mask], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_landmarks", [1, 9, 200])
def test_skyformer(num_landmarks):
    module = SkyformerAttention(num_landmarks, seed=3).eval()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-((x[:, None] - y).square().sum(2)) / (2 * math.sqrt(D)))

    def one_head(q, k, v, real, *_):
        mask = torch.isin(torch.arange(len(q)), torch.tensor(real))[None]
        places, exists = choose(mask, num_landmarks, 3)
        landmarks = torch.cat([q, k])[places[0, exists[0]]]
        assert len(landmarks) == min(num_landmarks, 2 * len(real))
        core = kernel(landmarks, landmarks) + 0.1 * torch.eye(len(landmarks))
        half = core.sum(1).rsqrt().diag()
        inverse = half @ reference.pinv(half @ core @ half, 6) @ half
        return kernel(q, landmarks) @ inverse @ kernel(landmarks, k[real]) @ v[real]

    assert_defined_by(module, one_head, 23)


def test_skyformer_with_all_landmarks_nears_the_gaussian_kernel():
    query, key, value = tokens(23)
    want = torch.exp(-torch.cdist(query, key).square() / (2 * math.sqrt(D))) @ value
    errors = []
    for ridge in (1e-1, 1e-2, 1e-3, 1e-5):
        got = SkyformerAttention(46, ridge=ridge, num_pinv_iters=60).eval()(query, key, value)
        errors.append(((got - want).norm() / want.norm()).item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4 < 1e-2 < errors[0]


def test_skyformers_landmarks_are_chosen_evenly_among_real_tokens():
    n = 10
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[1, [0, 4, 9]] = False
    counts = torch.zeros(2, 2 * n)
    for seed in range(500):
        places, exists = choose(mask, 6, seed)
        assert exists.all() and all(len(row.unique()) == 6 for row in places)
        counts.scatter_add_(1, places, torch.ones(2, 6))
    for row, real in zip(counts, mask, strict=True):
        real = real.repeat(2)
        mean = 500 * 6 / real.sum()
        assert (row[~real] == 0).all() and ((row[real] - mean).abs() < 4.5 * mean.sqrt()).all()
