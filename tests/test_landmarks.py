"""The kinds of landmarks, against loops over token lists."""

from functools import partial

import pytest
import torch
from torch import Tensor

import reference
from nystrom import _cpu, grid_means, kmeans, nystrom_attention, segment_means, strided

F64 = torch.float64
ALL = {
    "segment_means": segment_means,
    "strided": strided,
    "kmeans": kmeans,
    "grid_means": partial(grid_means, grid=(5, 7)),
}


def tokens_and_mask(n: int = 35) -> tuple[Tensor, Tensor]:
    mask = torch.rand(2, n) < 0.7
    mask[1, 5:] = False
    mask[1, 2] = True
    return torch.randn(2, 3, n, 5, dtype=F64), mask


@pytest.fixture(params=["cpu", "cpu, small blocks", "plain"])
def kernel(request, monkeypatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(_cpu, "usable", lambda *tensors: False)
    elif request.param == "cpu, small blocks":
        monkeypatch.setattr(_cpu, "BLOCK", 50)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("m", [1, 4, 8, 35, 50])
@pytest.mark.parametrize("masked", [False, True])
def test_segment_means_and_strided_against_token_lists(m, masked):
    tokens, mask = tokens_and_mask()
    means, counts = segment_means(tokens, m, mask if masked else None)
    chosen, same_counts = strided(tokens, m, mask if masked else None)
    assert torch.equal(counts, same_counts)
    for i in range(2):
        valid = mask[i].nonzero().flatten().tolist() if masked else list(range(35))
        lists = reference.segments(valid, min(m, 35))
        got = [row for row, count in enumerate(counts[i].tolist()) if count]
        assert [counts[i, row].item() for row in got] == [len(one) for one in lists]
        for row, one in zip(got, lists, strict=True):
            torch.testing.assert_close(means[i, :, row], tokens[i][:, one].mean(1))
            assert torch.equal(chosen[i, :, row], tokens[i, :, one[(len(one) - 1) // 2]])
        assert (means[i][:, counts[i] == 0] == 0).all() and (chosen[i][:, counts[i] == 0] == 0).all()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_kmeans_is_lloyds_algorithm(masked, steps):
    tokens, mask = tokens_and_mask()
    means, counts = kmeans(tokens, 6, mask if masked else None, num_steps=steps)
    counts = counts if counts.ndim == 3 else counts[:, None].expand(2, 3, -1)
    for i in range(2):
        valid = mask[i].nonzero().flatten().tolist() if masked else list(range(35))
        for j in range(3):
            clusters = reference.segments(valid, 6)
            clusters = clusters if len(clusters) == 6 else None
            if clusters is None:  # fewer tokens than clusters: each is its own mean from the start
                assert sorted(counts[i, j].tolist()) == [0] * (6 - len(valid)) + [1] * len(valid)
                continue
            for _ in range(steps):
                centres = [tokens[i, j, one].mean(0) for one in clusters]
                nearest = [min(range(6), key=lambda c: (tokens[i, j, t] - centres[c]).norm().item()) for t in valid]
                clusters = [[t for t, c in zip(valid, nearest, strict=True) if c == k] for k in range(6)]
            assert counts[i, j].tolist() == [len(one) for one in clusters]
            for k, one in enumerate(clusters):
                want = tokens[i, j, one].mean(0) if one else torch.zeros(5, dtype=F64)
                torch.testing.assert_close(means[i, j, k], want)


def test_kmeans_finds_separated_clusters():
    centres = 10 * torch.randn(4, 5, dtype=F64)
    label = torch.randint(4, (200,))
    tokens = (centres[label] + 0.01 * torch.randn(200, 5, dtype=F64))[None, None]
    start, _ = segment_means(tokens, 4)
    found, counts = kmeans(tokens, 4, num_steps=5)
    spread = [torch.cdist(tokens[0, 0], x[0, 0]).amin(1).square().sum().item() for x in (start, found)]
    assert spread[1] < spread[0] and counts.sum() == 200


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("masked", [False, True])
def test_grid_means_are_rectangles(masked):
    tokens, mask = tokens_and_mask()
    means, counts = grid_means(tokens, 6, mask if masked else None, grid=(5, 7))
    rows, columns = [range(0, 2), range(2, 5)], [range(0, 2), range(2, 4), range(4, 7)]
    for i in range(2):
        for k, (row, column) in enumerate((row, column) for row in rows for column in columns):
            inside = [7 * y + x for y in row for x in column if not masked or mask[i, 7 * y + x]]
            assert counts[i, k] == len(inside)
            want = tokens[i][:, inside].mean(1) if inside else torch.zeros(3, 5, dtype=F64)
            torch.testing.assert_close(means[i, :, k], want)


@pytest.mark.unhooked
@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(make, masked):
    tokens, mask = tokens_and_mask()
    weight = torch.randn(2, 3, 5, dtype=F64)  # one per sample and head

    def landmarks(tokens: Tensor) -> Tensor:
        return make(tokens, 6, mask if masked else None)[0] * weight[:, :, None]

    assert torch.autograd.gradcheck(landmarks, (tokens.requires_grad_(),))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_the_op_with_any_landmarks(make):
    """Padding content, batch mates, empty samples, and the output as the formula over these landmarks has it."""
    query, key, value = (torch.randn(3, 3, 35, 5, dtype=F64, requires_grad=True) for _ in range(3))
    mask = torch.rand(3, 35) < 0.7
    mask[1, 3:] = False
    mask[1, 0] = True
    mask[2] = False

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return nystrom_attention(query, key, value, mask, num_landmarks=6, num_pinv_iters=30, landmarks=make)

    out = attend(query, key, value, mask)
    assert (out[2] == 0).all()
    grads = torch.autograd.grad(out.square().sum(), (query, key, value))
    assert all(grad.isfinite().all() and (grad[2] == 0).all() for grad in grads)
    for i in range(2):
        torch.testing.assert_close(
            attend(query[i : i + 1], key[i : i + 1], value[i : i + 1], mask[i : i + 1])[0], out[i]
        )
    with torch.no_grad():
        filled = [x.masked_fill(~mask[:, None, :, None], 1e6) for x in (query, key, value)]
        torch.testing.assert_close(attend(*filled, mask)[:2][mask[:2][:, None].expand(-1, 3, -1)],
                                   out[:2][mask[:2][:, None].expand(-1, 3, -1)])  # fmt: skip
        scale = 5**-0.5
        for i in range(2):
            for j in range(3):
                tilde = []
                for x in (query, key):
                    made, counts = make(x, 6, mask)
                    counts = counts if counts.ndim == 3 else counts[:, None].expand(3, 3, -1)
                    tilde.append(made[i, j][counts[i, j] > 0])
                left = torch.softmax(scale * query[i, j] @ tilde[1].T, -1)
                core = torch.softmax(scale * tilde[0] @ tilde[1].T, -1)
                right = torch.softmax(scale * tilde[0] @ key[i, j][mask[i]].T, -1)
                want = left @ reference.pinv(core, 30) @ right @ value[i, j][mask[i]]
                torch.testing.assert_close(out[i, j], want, rtol=1e-6, atol=1e-8)


def test_names_are_the_functions():
    query, key, value = (torch.randn(2, 3, 35, 5) for _ in range(3))
    for name in ("segment_means", "strided", "kmeans"):
        one = nystrom_attention(query, key, value, num_landmarks=6, landmarks=name)
        other = nystrom_attention(query, key, value, num_landmarks=6, landmarks=ALL[name])
        assert torch.equal(one, other)
        assert name == "segment_means" or not torch.equal(one, nystrom_attention(query, key, value, num_landmarks=6))


def test_a_function_of_ones_own_may_return_halves():
    query, key, value = (torch.randn(2, 3, 35, 5).bfloat16() for _ in range(3))

    def first(tokens: Tensor, num_landmarks: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return tokens[:, :, :num_landmarks], torch.ones(2, num_landmarks)

    out = nystrom_attention(query, key, value, num_landmarks=6, landmarks=first)
    wide = (query.float(), key.float(), value.float())
    want = nystrom_attention(*wide, num_landmarks=6, landmarks=first)
    assert torch.equal(out, want.bfloat16())


def test_grouped_heads_and_cross_attention_with_kmeans():
    query, key, value = torch.randn(2, 6, 35, 5), torch.randn(2, 3, 50, 5), torch.randn(2, 3, 50, 4)
    out = nystrom_attention(query, key, value, enable_gqa=True, num_landmarks=6, landmarks="kmeans")
    repeated = [x.repeat_interleave(2, dim=1) for x in (key, value)]
    torch.testing.assert_close(out, nystrom_attention(query, *repeated, num_landmarks=6, landmarks="kmeans"))


@pytest.mark.unhooked
def test_refusals():
    x = torch.randn(2, 3, 35, 5)
    for call, message in (
        (lambda: strided(x, 0), "num_landmarks and the length must be at least 1: got 0 and 35"),
        (lambda: kmeans(x, 4, num_steps=-1), "num_steps must be at least 0: got -1"),
        (lambda: kmeans(x, 4, torch.ones(2, 34) > 0), r"mask must be bool of shape \(b, n\) = \(2, 35\)"),
        (lambda: grid_means(x, 4, grid=(6, 6)), "grid must hold the n tokens: got 6 x 6 = 36 for n = 35"),
        (lambda: grid_means(x, 11, grid=(5, 7)), "at most 5 rows and at most 7 columns: got 11"),
        (lambda: nystrom_attention(x, x, x, landmarks="random"), "segment_means, strided, kmeans, .* got 'random'"),
        (
            lambda: nystrom_attention(x, x, x, landmarks=lambda t, m, mask: (t[:, :1], torch.ones(2, 35))),
            r"landmarks must return landmarks \(2, 3, m, 5\) .* got \(2, 1, 35, 5\) and \(2, 35\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
