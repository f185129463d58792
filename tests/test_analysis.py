"""What an approximation does to an attention matrix, against plain loops over the valid tokens, in float64."""

from functools import partial

import pytest
import torch

from nystrom import attention_factors, nystrom_attention
from nystrom.analysis import (
    attention_matrix,
    diagonal_weight,
    exact_attention,
    layer_error,
    matrix_error,
    output_error,
    row_sum_error,
    singular_values,
    softmax_matrix,
    squares,
)

B, H, N, D, V = 2, 3, 11, 5, 7
MASK = torch.ones(B, N, dtype=torch.bool)
MASK[0, 7:] = False
MASK[1, [2, 5]] = False


def inputs(g: int = H) -> list[torch.Tensor]:
    return [torch.randn(B, heads, N, width, dtype=torch.float64) for heads, width in ((H, D), (g, D), (g, V))]


def valid(b: int, mask: torch.Tensor | None) -> list[int]:
    return [i for i in range(N) if mask is None or mask[b, i]]


def loops(query, key, mask, scale):
    matrix = torch.zeros(B, H, N, N, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in valid(b, mask):
                weights = {j: torch.exp(scale * query[b, h, i] @ key[b, h, j]) for j in valid(b, mask)}
                for j, weight in weights.items():
                    matrix[b, h, i, j] = weight / sum(weights.values())
    return matrix


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "masked"])
@pytest.mark.parametrize("scale", [None, 0.9])
def test_softmax_matrix_is_softmax(mask, scale):
    query, key, value = inputs()
    want = loops(query, key, mask, scale or D**-0.5)
    matrix = softmax_matrix(query, key, mask, scale)
    torch.testing.assert_close(matrix, want)
    out = exact_attention(query, key, value, mask, scale)
    keep = MASK[:, None, :, None] if mask is not None else torch.tensor(True)
    torch.testing.assert_close(out * keep, want @ value)


def test_shared_key_heads_are_repeated():
    query, key, value = inputs(g=1)
    repeated = [x.expand(-1, H, -1, -1) for x in (key, value)]
    torch.testing.assert_close(softmax_matrix(query, key), softmax_matrix(query, repeated[0]))
    torch.testing.assert_close(exact_attention(query, key, value), exact_attention(query, *repeated))
    matrix = attention_matrix(exact_attention, query, key)
    torch.testing.assert_close(matrix, softmax_matrix(query, key))


def test_half_precision_is_widened():
    query, key, _ = (x.bfloat16() for x in inputs())
    assert softmax_matrix(query, key).dtype == torch.float32


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "masked"])
def test_attention_matrix_is_what_the_method_multiplies_values_with(mask):
    query, key, value = inputs()
    attend = partial(nystrom_attention, attn_mask=mask, num_landmarks=4)
    matrix = attention_matrix(attend, query, key)
    left, core_pinv, right = attention_factors(query, key, mask, num_landmarks=4)
    torch.testing.assert_close(matrix, left @ core_pinv @ right)
    torch.testing.assert_close(matrix @ value, attend(query, key, value))


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "masked"])
def test_errors_are_frobenius_norms_over_samples_and_valid_tokens(mask):
    approx, exact = torch.randn(2, B, H, N, V, dtype=torch.float64).unbind()
    off, whole = torch.zeros(2, B, H, dtype=torch.float64).unbind()
    for b in range(B):
        for h in range(H):
            for i in valid(b, mask):
                off[b, h] += sum((a - e) ** 2 for a, e in zip(approx[b, h, i], exact[b, h, i], strict=True))
                whole[b, h] += sum(e**2 for e in exact[b, h, i])
    torch.testing.assert_close(squares(exact, mask), whole)
    torch.testing.assert_close(output_error(approx, exact, mask), (off.sum(0) / whole.sum(0)).sqrt())
    assert layer_error(approx, exact, mask) == pytest.approx((off.sum() / whole.sum()).sqrt().item())
    assert squares(exact.float()).dtype == torch.float64


def test_only_valid_rows_and_columns_count():
    """Garbage at masked places changes nothing; what is left is what a sample of the valid tokens alone would give."""
    query, key, _ = inputs()
    exact = softmax_matrix(query, key, MASK)
    approx = exact + 0.1 * torch.randn_like(exact)
    both = MASK[:, None, :, None] & MASK[:, None, None, :]
    dirty, dirty_exact = (torch.where(both, x, torch.full_like(x, 1e3)) for x in (approx, exact))
    off, whole, sums, own, counts = (torch.zeros(H, dtype=torch.float64) for _ in range(5))
    for b in range(B):
        tokens = valid(b, MASK)
        small, small_exact = (x[b][:, tokens][:, :, tokens] for x in (approx, exact))
        off += (small - small_exact).square().sum((1, 2))
        whole += small_exact.square().sum((1, 2))
        sums += (small.sum(-1) - 1).abs().sum(-1)
        own += small.diagonal(dim1=1, dim2=2).sum(-1)
        counts += len(tokens)
        values = singular_values(dirty, MASK)[b]
        torch.testing.assert_close(values[:, : len(tokens)], torch.linalg.svdvals(small))
        assert values[:, len(tokens) :].abs().max() < 1e-12
    torch.testing.assert_close(matrix_error(dirty, dirty_exact, MASK), (off / whole).sqrt())
    torch.testing.assert_close(row_sum_error(dirty, MASK), sums / counts)
    torch.testing.assert_close(diagonal_weight(dirty, MASK), own / counts)


def test_without_a_mask_all_count():
    approx, exact = torch.rand(2, B, H, N, N, dtype=torch.float64).unbind()
    everything = torch.ones(B, N, dtype=torch.bool)
    for number in (row_sum_error, diagonal_weight, singular_values):
        torch.testing.assert_close(number(approx), number(approx, everything))
    torch.testing.assert_close(matrix_error(approx, exact), matrix_error(approx, exact, everything))
    torch.testing.assert_close(diagonal_weight(approx), approx.diagonal(dim1=2, dim2=3).mean((0, 2)))
