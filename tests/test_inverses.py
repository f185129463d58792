"""The inverses: what each computes, its exact gradient, and no NaN whatever the core."""

from functools import partial

import pytest
import torch
from torch import Tensor

import reference
from nystrom import _cpu, chebyshev_pinv, iterative_pinv, nystrom_attention, ridge_pinv, svd_pinv

F64 = torch.float64
ALL = {"iterative": iterative_pinv, "chebyshev": chebyshev_pinv, "ridge": ridge_pinv, "svd": svd_pinv}
SHAPES = [(9, 9), (2, 9, 6), (2, 3, 6, 9)]


def filtered(matrix: Tensor, keep) -> Tensor:
    """V f(sigma) U^T: what an inverse that treats each singular value by `keep` must be."""
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    return vh.mT @ torch.diag_embed(keep(sigma)) @ u.mT


@pytest.mark.parametrize("shape", SHAPES)
def test_ridge_is_its_formula(shape):
    matrix = torch.rand(shape, dtype=F64)
    want = filtered(matrix, lambda sigma: sigma / (sigma**2 + 0.1))
    torch.testing.assert_close(ridge_pinv(matrix, 0.1), want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_drops_small_singular_values(shape):
    matrix = torch.rand(shape, dtype=F64)
    want = filtered(matrix, lambda s: torch.where(s > 0.2 * s[..., :1], 1 / s, 0.0))
    assert not torch.allclose(want, torch.linalg.pinv(matrix))
    torch.testing.assert_close(svd_pinv(matrix, 0.2), want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(svd_pinv(matrix, 0.0), torch.linalg.pinv(matrix), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_chebyshev_converges_to_the_pseudo_inverse(shape):
    matrix = torch.rand(shape, dtype=F64)
    torch.testing.assert_close(chebyshev_pinv(matrix, 40), torch.linalg.pinv(matrix), rtol=1e-7, atol=1e-8)


def test_chebyshev_damps_as_the_published_iteration_does_with_fewer_matmuls():
    """What is left of 1 / sigma, over six decades of sigma squared: within 0.05 everywhere."""
    sigma = torch.logspace(0, -3, 60, dtype=F64)
    kept = {
        name: torch.diagonal(pinv(torch.diag(sigma))) * sigma
        for name, pinv in (("iterative", iterative_pinv), ("chebyshev", chebyshev_pinv))
    }
    assert (kept["iterative"] - kept["chebyshev"]).abs().max() < 0.05
    assert kept["iterative"].min() < 0.01 and kept["iterative"].max() > 0.999


@pytest.mark.parametrize("num_iters", range(1, 9))
def test_chebyshev_brings_all_above_its_bound_as_near_to_one_as_known(num_iters):
    low = 1e-2
    sigma = torch.logspace(0, -1, 300, dtype=F64)
    kept = torch.diagonal(chebyshev_pinv(torch.diag(sigma), num_iters, lowest=low)) * sigma
    for _ in range(num_iters):
        d = 2 * ((1 + low) / (1 - low)) ** 2 - 1
        low = (1 - 1 / d) / (1 + 1 / d)
    assert kept.max() < 1 + 1e-12
    assert abs(kept.min() - low) < 1e-2 * (1 - low) + 1e-12


@pytest.mark.unhooked
@pytest.mark.parametrize("pinv", ALL.values(), ids=ALL.keys())
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(pinv, shape):
    assert torch.autograd.gradcheck(pinv, (torch.rand(shape, dtype=F64, requires_grad=True),))


@pytest.mark.unhooked
@pytest.mark.parametrize(
    "matrix",
    [torch.eye(4), torch.ones(3, 3) / 3, torch.diag(torch.tensor([1.0, 1.0, 0.0]))],
    ids=["equal singular values", "rank one", "rank two"],
)
@pytest.mark.parametrize("pinv", [ridge_pinv, svd_pinv], ids=["ridge", "svd"])
def test_closed_form_gradients_where_plain_ones_break(pinv, matrix):
    """Along directions that keep the rank: another rank is another function."""
    matrix = matrix.double()
    left, right = (torch.randn_like(matrix, requires_grad=True) for _ in range(2))

    def moved(left: Tensor, right: Tensor) -> Tensor:
        eye = torch.eye(len(matrix), dtype=F64)
        return pinv((eye + 0.1 * left) @ matrix @ (eye + 0.1 * right))

    assert torch.autograd.gradcheck(moved, (left, right))


@pytest.mark.unhooked
def test_svd_gradient_counts_the_dropped_values_too():
    matrix = torch.diag(torch.tensor([3.0, 2.0, 0.1, 0.05])).double() + 0.01 * torch.randn(4, 4, dtype=F64)
    assert torch.autograd.gradcheck(partial(svd_pinv, rtol=0.1), (matrix.requires_grad_(),))


@pytest.mark.unhooked
@pytest.mark.parametrize("pinv", [ridge_pinv, partial(svd_pinv, rtol=0.3)], ids=["ridge", "svd"])
def test_closed_form_gradients_can_be_differentiated_again(pinv):
    assert torch.autograd.gradgradcheck(pinv, (torch.rand(2, 5, 5, dtype=F64, requires_grad=True),))


@pytest.mark.parametrize("pinv", ALL.values(), ids=ALL.keys())
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_matrix_leaves_its_batch_mates_alone(pinv, bad):
    matrix = torch.softmax(torch.randn(3, 6, 6), -1)
    want = pinv(matrix)
    matrix[1, 2, 3] = bad
    got = pinv(matrix)
    assert not got[1].isfinite().all()
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]])


CORES = {
    "zero": torch.zeros(6, 6),
    "uniform": torch.full((6, 6), 1 / 6),
    "near-uniform": torch.softmax(1e-6 * torch.randn(6, 6), -1),
    "identity": torch.eye(6),
    "large logits": torch.softmax(1e4 * torch.randn(6, 6), -1),
    "all on one key": torch.nn.functional.one_hot(torch.zeros(6).long(), 6).float(),
    "empty landmarks": torch.softmax(torch.randn(6, 6), -1) * (torch.arange(6) < 3),
}


@pytest.mark.parametrize("core", CORES.values(), ids=CORES.keys())
@pytest.mark.parametrize("pinv", ALL.values(), ids=ALL.keys())
def test_no_nan_in_any_inverse_or_its_gradient(pinv, core):
    core = core.clone().requires_grad_()
    out = pinv(core)
    (grad,) = torch.autograd.grad(out.square().sum(), core)
    assert out.isfinite().all() and grad.isfinite().all()
    if (core == 0).all():
        assert (out == 0).all()


@pytest.mark.parametrize("pinv", ALL.values(), ids=ALL.keys())
def test_halves_and_autocast_run_in_float32(pinv):
    matrix = torch.softmax(2 * torch.randn(8, 8), -1)
    want = pinv(matrix.bfloat16().float())
    half = pinv(matrix.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), want, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pinv(matrix), pinv(matrix.clone()))
        inside = pinv(matrix)
    assert torch.equal(inside, pinv(matrix))


@pytest.mark.parametrize("shape", [*SHAPES, (0, 4, 4)])
def test_cpu_and_plain_iteration_agree(shape, monkeypatch):
    matrix = torch.rand(shape, dtype=F64, requires_grad=True)
    results = []
    for usable in (_cpu.usable, lambda *tensors: False):
        monkeypatch.setattr(_cpu, "usable", usable)
        out = iterative_pinv(matrix)
        results.append((out, torch.autograd.grad(out.cos().sum(), matrix)[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_the_op_uses_the_inverse_it_is_asked_for(name):
    query, key, value = (torch.randn(2, 3, 35, 5, dtype=F64) for _ in range(3))
    outputs = {other: nystrom_attention(query, key, value, num_landmarks=7, pinv=other) for other in ALL}
    called = nystrom_attention(query, key, value, num_landmarks=7, pinv=ALL[name])
    assert torch.equal(outputs[name], called)
    assert all((outputs[name] - out).norm() > 1e-4 * out.norm() for other, out in outputs.items() if other != name)


def test_the_op_with_an_exact_inverse_equals_the_reference():
    query, key, value = (torch.randn(2, 3, 35, 5, dtype=F64) for _ in range(3))
    mask = torch.arange(35) < torch.tensor([[35], [4]])
    got = nystrom_attention(query, key, value, mask, num_landmarks=7, pinv=partial(svd_pinv, rtol=0.0))
    want = reference.nystrom_attention(query, key, value, mask, num_landmarks=7, num_iters=None)
    assert (got - want).norm() < 1e-9 * want.norm()


@pytest.mark.unhooked
def test_refusals():
    matrix, x = torch.eye(3), torch.randn(1, 1, 8, 4)
    for call, message in (
        (lambda: chebyshev_pinv(matrix, 0), "num_iters must be at least 1: got 0"),
        (lambda: chebyshev_pinv(matrix, lowest=1.0), r"lowest must be in \(0, 1\): got 1.0"),
        (lambda: ridge_pinv(matrix, 0.0), r"ridge must be positive: got 0.0; .*torch.linalg.pinv"),
        (lambda: svd_pinv(matrix, 1.0), r"rtol must be in \[0, 1\): got 1.0"),
        (lambda: svd_pinv(matrix.long()), r"floating-point tensor: got torch.int64"),
        (lambda: nystrom_attention(x, x, x, pinv="exact"), "one of iterative, chebyshev, ridge, svd, .*: got 'exact'"),
        (
            lambda: nystrom_attention(x, x, x, pinv="ridge", num_pinv_iters=6),
            "for iterative and chebyshev alone: got 6 with pinv='ridge'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
