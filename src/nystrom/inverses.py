"""Inverses of the core factor. `iterative_pinv` is the paper's; the others trade its cost, or its bias, for another.

None of them is a better attention for being nearer to the exact inverse: where queries and keys differ, small singular
values of the core are noise, and whatever damps them helps. How much each damps is part of what trained weights mean.
How much of 1/σ each keeps at x = σ² / (‖A‖₁ ‖A‖∞):

    x                            1e-2    1e-3    1e-4    1e-5
    iterative, 6 steps           1.000   0.687   0.111   0.012    24 matmuls
    chebyshev, 7 steps           1.000   0.731   0.120   0.013    14 matmuls
    ridge λ = ‖A‖₁ ‖A‖∞ / 1000   0.909   0.500   0.091   0.010    a Cholesky factor
    svd                          1 above the cut, 0 below         an SVD
"""

# torch types Function.backward for any number of gradients; each one here names its own.
# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from nystrom import _cpu
from nystrom._precision import full_precision

Inverse = Callable[[Tensor], Tensor]
"""Matrices (..., p, q) to their inverses (..., q, p), in the same dtype."""

InverseName = Literal["iterative", "chebyshev", "ridge", "svd"]


def iterative_pinv(matrix: Float[Tensor, "*batch p q"], num_iters: int = 6) -> Float[Tensor, "*batch q p"]:
    """Approximate the Moore-Penrose inverse of each matrix by the published iteration.

    ``Z ← ¼ Z (13 I − A Z (15 I − A Z (7 I − A Z)))`` from ``Z₀ = Aᵀ / (‖A‖₁ ‖A‖∞)``, the scale taken per matrix, so
    that no result depends on batch mates. With x = 1 − e an eigenvalue of A Z, a step maps e to (3 e³ + e⁴) / 4: small
    x grow 3.25-fold, so few steps leave small singular values damped, an implicit ridge. Cost 4 matmuls a step, and 8
    backward.

    Args:
        matrix: any real matrices, rectangular and rank-deficient included; a zero matrix gives zero.
        num_iters: steps (count).

    Returns:
        The inverses, in matrix's dtype; computed in float32 or wider, under autocast too.

    Raises:
        ValueError: num_iters < 1; matrix is not floating-point.

    Source: Xiong et al. 2021, arXiv:2102.03902, eq 14 and Lemma 1; start of Pan & Schreiber 1991.

    >>> iterative_pinv(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), num_iters=6)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.2500]])
    """
    _check(matrix, num_iters)
    with full_precision(matrix.device):
        a = _widen(matrix)
        pinv = _start(a)
        if _cpu.usable(a):
            return _cpu.refine_inverse(a, pinv, num_iters).to(matrix.dtype)
        eye = torch.eye(a.shape[-2], dtype=a.dtype, device=a.device)
        for _ in range(num_iters):
            product = a @ pinv
            pinv = 0.25 * pinv @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
        return pinv.to(matrix.dtype)


def chebyshev_pinv(
    matrix: Float[Tensor, "*batch p q"], num_iters: int = 7, *, lowest: float = 1e-2
) -> Float[Tensor, "*batch q p"]:
    """Approximate the Moore-Penrose inverse by Newton steps scaled to shrink the worst residual: fewer matmuls.

    ``Z ← r (2 Z − r Z A Z)`` from ``Z₀ = Aᵀ / (‖A‖₁ ‖A‖∞)``: r > 1 spreads the eigenvalues of A Z, known to lie in
    [l, 1], around 1 as evenly as can be before the Newton step, and puts the largest back to 1 after it (l starts at
    `lowest`; r falls to 1). Eigenvalues below `lowest` grow up to 4-fold a step and stay damped: the defaults damp as 6
    steps of `iterative_pinv` do, with 14 matmuls for 24. Cost 2 matmuls a step, and 4 backward.

    Args:
        matrix: any real matrices, rectangular and rank-deficient included; a zero matrix gives zero.
        num_iters: steps (count).
        lowest: squared singular values above this share of ‖A‖₁ ‖A‖∞ are meant to be inverted.

    Returns:
        The inverses, in matrix's dtype; computed in float32 or wider, under autocast too.

    Raises:
        ValueError: num_iters < 1; lowest outside (0, 1); matrix is not floating-point.

    Source: ours, from the classical Chebyshev acceleration of Newton-Schulz (Pan & Schreiber 1991).

    >>> chebyshev_pinv(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    tensor([[0.5000, 0.0000],
            [0.0000, 0.2500]])
    """
    _check(matrix, num_iters)
    if not 0 < lowest < 1:
        raise ValueError(f"lowest must be in (0, 1): got {lowest}")
    with full_precision(matrix.device):
        a = _widen(matrix)
        pinv = _start(a)
        half_width = (1 - lowest) / (1 + lowest)  # of the interval that holds the eigenvalues, over its centre
        for _ in range(num_iters):
            stretch = 1 + half_width
            pinv = stretch * (2 * pinv - stretch * pinv @ (a @ pinv))
            half_width = half_width**2 / (2 - half_width**2)
        return pinv.to(matrix.dtype)


def ridge_pinv(matrix: Float[Tensor, "*batch p q"], ridge: float = 1e-3) -> Float[Tensor, "*batch q p"]:
    """The ridge inverse ``(AᵀA + λ I)⁻¹ Aᵀ`` by a Cholesky factor: 1/σ becomes σ / (σ² + λ).

    Cost one Cholesky factorisation and two triangular solves, about q³; the gradient is in closed form, exact.

    Args:
        matrix: any real matrices, rectangular and rank-deficient included; a zero matrix gives zero.
        ridge: λ, in units of a squared singular value (the core's rows sum to one, so its largest is at least 1).
            Below the rounding of AᵀA, about 1e-6 for a core in float32, it is lost in noise.

    Returns:
        The inverses, in matrix's dtype; computed in float32 or wider, under autocast too. NaN for a matrix that holds
        NaN or infinity, or for whose rounding λ is too small.

    Raises:
        ValueError: ridge <= 0; matrix is not floating-point.

    Source: Tikhonov regularisation; its use here is ours.

    >>> ridge_pinv(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), ridge=1e-6)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.2500]])
    """
    _check(matrix)
    if not ridge > 0:
        raise ValueError(f"ridge must be positive: got {ridge}; for no ridge use torch.linalg.pinv")
    with full_precision(matrix.device):
        return _Ridge.apply(_widen(matrix), ridge)[0].to(matrix.dtype)


def svd_pinv(matrix: Float[Tensor, "*batch p q"], rtol: float = 1e-2) -> Float[Tensor, "*batch q p"]:
    """The Moore-Penrose inverse from a singular value decomposition that drops small singular values.

    Cost one SVD, many times that of the iterations on a GPU; the gradient is in closed form, exact as long as no
    singular value crosses the cut, and finite where singular values coincide.

    Args:
        matrix: any real matrices, rectangular and rank-deficient included; a zero matrix gives zero, and one that
            holds NaN or infinity gives NaN.
        rtol: singular values up to this share of the largest are dropped; torch.linalg.pinv drops only rounding errors.

    Returns:
        The inverses, in matrix's dtype; computed in float32 or wider, under autocast too.

    Raises:
        ValueError: rtol outside [0, 1); matrix is not floating-point.

    Source: Moore-Penrose inverse, truncated; the gradient is ours (Daleckii-Krein divided differences).

    >>> svd_pinv(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    tensor([[0.5000, 0.0000],
            [0.0000, 0.2500]])
    """
    _check(matrix)
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol must be in [0, 1): got {rtol}")
    with full_precision(matrix.device):
        a = _widen(matrix)
        p, q = a.shape[-2:]
        finite = a.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
        square = torch.nn.functional.pad(a, (0, max(p - q, 0), 0, max(q - p, 0)))  # zeros stay zeros in the inverse
        pinv = _TruncatedInverse.apply(square.masked_fill(~finite, 0.0), rtol)[0][..., :q, :p]
        return pinv.masked_fill(~finite, torch.nan).to(matrix.dtype)


class _Ridge(Function):
    """Z = M Aᵀ with M = (AᵀA + λ I)⁻¹, so dZ = M dAᵀ (I − A Z) − Z dA Z."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        factor = _ridge_factor(a, ridge)
        return torch.cholesky_solve(a.mT, factor), factor

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        a, ctx.ridge = inputs
        ctx.save_for_backward(a, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        a, pinv, factor = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: the factor depends on a
            factor = _ridge_factor(a, ctx.ridge)
        with full_precision(grad.device):  # a backward pass may run inside autocast
            return torch.cholesky_solve(grad - grad @ a @ pinv, factor).mT - pinv.mT @ grad @ pinv.mT, None


def _ridge_factor(a: Float[Tensor, "*batch p q"], ridge: float) -> Float[Tensor, "*batch q q"]:
    """The Cholesky factor of AᵀA + λ I; NaN for a matrix that has none, which leaves its batch mates alone."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    factor, failed = torch.linalg.cholesky_ex(a.mT @ a + ridge * eye)
    return factor.masked_fill((failed != 0)[..., None, None], torch.nan)


class _TruncatedInverse(Function):
    """Z = V f(Σ) Uᵀ with f = 1/σ for kept σ, else 0; each dA meets divided differences of f, finite where σ coincide.

    With H = Uᵀ Gᵀ V the gradient is U (α ∘ H + γ ∘ Hᵀ) Vᵀ, where for i and j both kept α = 0 and γ = −1 / (σᵢ σⱼ); for
    one kept, σ, and one dropped, τ, α = 1 / (σ² − τ²) and γ = α τ / σ; for both dropped zero.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, rtol: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        u, sigma, vt = torch.linalg.svd(a)
        keep = sigma > rtol * sigma[..., :1]
        inverse = torch.where(keep, 1 / torch.where(keep, sigma, 1.0), 0.0)
        return vt.mT @ (inverse[..., None] * u.mT), u, sigma, vt, keep

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0], *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, grad, *_):
        a, u, sigma, vt, keep = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: the factors depend on a
            u, sigma, vt = torch.linalg.svd(a)
        kept = torch.where(keep, sigma, 1.0)
        both = keep[..., :, None] & keep[..., None, :]
        one = keep[..., :, None] ^ keep[..., None, :]
        high = torch.maximum(sigma[..., :, None], sigma[..., None, :])
        low = torch.minimum(sigma[..., :, None], sigma[..., None, :])
        alpha = torch.where(one, 1 / torch.where(one, high**2 - low**2, 1.0), 0.0)
        gamma = torch.where(one, alpha * low / torch.where(one, high, 1.0), 0.0)
        gamma = gamma - torch.where(both, 1 / (kept[..., :, None] * kept[..., None, :]), 0.0)
        with full_precision(grad.device):  # a backward pass may run inside autocast
            inner = u.mT @ grad.mT @ vt.mT
            return u @ (alpha * inner + gamma * inner.mT) @ vt, None


def _check(matrix: Tensor, num_iters: int = 1) -> None:
    if num_iters < 1:
        raise ValueError(f"num_iters must be at least 1: got {num_iters}")
    if not matrix.is_floating_point():
        raise ValueError(f"matrix must be a floating-point tensor: got {matrix.dtype}; convert it with .float()")


def _widen(matrix: Tensor) -> Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _start(a: Float[Tensor, "*batch p q"]) -> Float[Tensor, "*batch q p"]:
    """Aᵀ / (‖A‖₁ ‖A‖∞), which puts the eigenvalues of A Z in [0, 1]."""
    pinv = a.mT
    for axis in (-2, -1):  # one norm after the other: their product can leave the dtype's range
        norm = a.abs().sum(axis).amax(-1)
        # no clamp: its gradient at 0 must be finite
        pinv = pinv / torch.where(norm > 0, norm, 1.0)[..., None, None]
    return pinv
