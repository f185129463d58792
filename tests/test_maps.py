"""Factors and rows of the attention matrix, against the independent reference and the op itself."""

import pytest
import torch
from torch import Tensor

import reference
from nystrom import attention_factors, attention_rows, nystrom_attention

F64 = torch.float64


def case(name: str) -> tuple[Tensor, Tensor, Tensor, dict]:
    g, s = {"self": (6, 35), "cross": (6, 77), "grouped": (3, 77)}[name]
    query, key = torch.randn(2, 6, 35, 5, dtype=F64), torch.randn(2, g, s, 5, dtype=F64)
    mask = torch.rand(2, s) < 0.7
    mask[1, 3:] = False
    mask[1, 0] = True
    return query, key, mask, dict(enable_gqa=True, num_landmarks=7)


@pytest.mark.parametrize("name", ["self", "cross", "grouped"])
@pytest.mark.parametrize("masked", [False, True])
def test_factors_multiply_to_the_reference_matrix_and_the_op(name, masked):
    query, key, mask, options = case(name)
    mask = mask if masked else torch.ones_like(mask)
    left, core_pinv, right = attention_factors(query, key, mask if masked else None, **options)
    matrix = left @ core_pinv @ right
    own = mask if query.shape[2] == key.shape[2] else torch.ones(2, 35, dtype=torch.bool)
    for i in range(2):
        for j in range(6):
            want = reference.nystrom_matrix(
                query[i, j],
                key[i, j // (6 // key.shape[1])],
                num_landmarks=7,
                num_iters=6,
                scale=5**-0.5,
                query_tokens=own[i].nonzero().flatten().tolist(),
                key_tokens=mask[i].nonzero().flatten().tolist(),
            )
            torch.testing.assert_close(matrix[i, j], want, rtol=1e-9, atol=1e-10)
    value = torch.randn(*key.shape[:3], 4, dtype=F64)
    out = nystrom_attention(query, key, value, mask if masked else None, **options)
    repeated = value.repeat_interleave(6 // key.shape[1], dim=1)
    torch.testing.assert_close(matrix @ repeated, out, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["self", "cross", "grouped"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_rows_are_those_of_the_matrix_in_token_order(name, per_sample):
    query, key, mask, options = case(name)
    indices = torch.tensor([[0, 34, 7], [3, 3, 1]]) if per_sample else torch.tensor([0, 34, 7])
    rows = attention_rows(query, key, indices, mask, **options)
    left, core_pinv, right = attention_factors(query, key, mask, **options)
    matrix = left @ core_pinv @ right
    for i, chosen in enumerate(indices.expand(2, 3).tolist()):
        torch.testing.assert_close(rows[i], matrix[i][:, chosen], rtol=1e-10, atol=1e-12)
    hidden = ~mask[:, None, None, :].expand_as(rows)
    assert (rows[hidden] == 0).all() and (rows[~hidden] != 0).any()


def test_other_landmarks_inverses_and_scale_reach_the_rows():
    query, key, value = (torch.randn(2, 3, 35, 5, dtype=F64) for _ in range(3))
    options = dict(num_landmarks=7, landmarks="kmeans", pinv="ridge", scale=0.7)
    out = nystrom_attention(query, key, value, **options)
    rows = attention_rows(query, key, torch.arange(35), **options)
    torch.testing.assert_close(rows @ value, out)


def test_a_sample_without_keys_has_zero_rows():
    query, key, _, options = case("cross")
    mask = torch.ones(2, 77, dtype=torch.bool)
    mask[1] = False
    rows = attention_rows(query, key, torch.arange(35), mask, **options)
    assert (attention_factors(query, key, mask, **options).right[1] == 0).all()
    assert (rows[1] == 0).all() and rows[0].isfinite().all() and (rows[0] != 0).any()


def test_a_row_of_a_long_bag_needs_no_matrix():
    """50,000 tokens: the n x n matrix would take 20 GB for the two heads."""
    query, key = torch.randn(2, 1, 2, 50_000, 16).unbind()
    row = attention_rows(query, key, torch.tensor([0]), num_landmarks=32)
    assert row.shape == (1, 2, 1, 50_000)
    torch.testing.assert_close(row.sum(-1), torch.ones(1, 2, 1), rtol=0.1, atol=0)


def test_halves_give_float32():
    query, key = torch.randn(2, 1, 2, 50, 16).bfloat16().unbind()
    assert all(factor.dtype == torch.float32 for factor in attention_factors(query, key, num_landmarks=7))
    assert attention_rows(query, key, torch.tensor([0]), num_landmarks=7).dtype == torch.float32


@pytest.mark.unhooked
def test_rows_compile_as_one_graph():
    torch._dynamo.reset()
    query, key, mask, options = case("cross")
    compiled = torch.compile(attention_rows, fullgraph=True, backend="aot_eager")
    rows = compiled(query, key, torch.tensor([3, 0]), mask, **options)
    torch.testing.assert_close(rows, attention_rows(query, key, torch.tensor([3, 0]), mask, **options))


@pytest.mark.unhooked
def test_refusals():
    x = torch.randn(2, 3, 35, 5)
    for indices, message in (
        (torch.tensor([35]), r"indices must be in \[0, 35\): got 35"),
        (torch.tensor([-1]), r"indices must be in \[0, 35\): got -1"),
        (torch.tensor([0.5]), r"indices must be integers of shape .* got torch.float32 of shape \(1,\)"),
        (torch.ones(35) > 0, r"indices must be integers of shape .* got torch.bool"),
        (torch.zeros(3, 1).long(), "one row per sample: got 3 rows for batch 2"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_rows(x, x, indices)
    with pytest.raises(ValueError, match="share the number of heads"):
        attention_factors(x, x[:, :1])
