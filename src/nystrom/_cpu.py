"""Landmark sums and inverse for eager CPU tensors, with backward passes by hand.

The same numbers, up to rounding, as the plain torch code that runs everywhere else (compiled, exported, on a GPU, under
`torch.func`), with fewer arrays: fresh memory costs as much as the arithmetic.
"""

# torch types Function.backward for any number of gradients; each one here names its own.
# pyright: reportIncompatibleMethodOverride=false

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd import Function

Runs = list[tuple[int, int]]
"""How tokens fall into consecutive segments: so many of them, of so many tokens each (counts); then so many others."""

BLOCK = 2**20  # numbers to copy at a time: 4 MiB in float32, which stay in cache


def usable(*tensors: Tensor) -> bool:
    """Whether all are plain eager CPU tensors, neither empty nor being traced or transformed."""
    return eager() and all(
        x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter) and x.numel() > 0 for x in tensors
    )


def eager() -> bool:
    """Whether code runs now, on real numbers: neither compiled, traced nor transformed by `torch.func`."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
    )


def bin_sums(
    tokens: Float[Tensor, "b h n d"], bins: Int[Tensor, "b n"], m: int
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h m d"]]:
    """The tokens, and their sums over m bins (bin m is "none").

    Whoever uses the tokens again takes those returned: the two gradients then meet here and are added in place, which
    saves two arrays of the tokens' size.
    """
    return _BinSums.apply(tokens, bins, m)


def run_sums(tokens: Float[Tensor, "b h n d"], runs: Runs) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h m d"]]:
    """The same over consecutive segments."""
    return _RunSums.apply(tokens, runs)


def refine_inverse(
    matrix: Float[Tensor, "*batch p q"], start: Float[Tensor, "*batch q p"], num_iters: int
) -> Float[Tensor, "*batch q p"]:
    """`num_iters` steps of `iterative_pinv` from a start."""
    a, z = (x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]) for x in (matrix, start))
    return _RefineInverse.apply(a, z, num_iters).view(start.shape)


def once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Refuse to be differentiated again: torch's own `once_differentiable` lets torch.autograd.grad go wrong unsaid."""

    def wrapped(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "on a CPU the gradients of nystrom's functions cannot be differentiated again: got create_graph=True; "
                "for second derivatives use torch.func inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
            )
        return backward(ctx, *grads)

    return wrapped


class _BinSums(Function):
    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx, tokens, bins, m):
        b, h, n, d = tokens.shape
        ctx.save_for_backward(bins)
        ctx.m = m
        sums = tokens.new_zeros(b, m + 1, h, d, dtype=torch.promote_types(tokens.dtype, torch.float32))
        for i in range(b):
            for part in _slices(n, h * d):
                sums[i].index_add_(0, bins[i, part], tokens[i, :, part].transpose(0, 1).to(sums.dtype))
        return tokens, sums[:, :m].transpose(1, 2)

    @staticmethod
    @once
    @custom_bwd(device_type="cpu")  # a backward pass may run inside autocast
    def backward(ctx, grad, grad_sums):
        (bins,) = ctx.saved_tensors
        b, h, n, d = grad.shape
        rows = grad_sums.new_zeros(b, ctx.m + 1, h, d)
        rows[:, : ctx.m] = grad_sums.transpose(1, 2)
        for i in range(b):
            for part in _slices(n, h * d):
                grad[i, :, part] += rows[i].index_select(0, bins[i, part]).transpose(0, 1)
        return grad, None, None


class _RunSums(Function):
    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx, tokens, runs):
        ctx.runs = runs
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        return tokens, torch.cat([part.sum(3, dtype=dtype) for part in segments(tokens, runs)], dim=2)

    @staticmethod
    @once
    @custom_bwd(device_type="cpu")
    def backward(ctx, grad, grad_sums):
        done = 0
        for part in segments(grad, ctx.runs):
            part += grad_sums[:, :, done : done + part.shape[2], None]
            done += part.shape[2]
        return grad, None


class _RefineInverse(Function):
    """Z ← Z T₃ with P = A Z, T₁ = (7 I - P) / 4, T₂ = 15/4 I - P T₁, T₃ = 13/4 I - P T₂."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx, a, z, num_iters):
        eye = torch.eye(a.shape[-2], dtype=a.dtype, device=a.device)
        steps = []
        for _ in range(num_iters):
            p = torch.bmm(a, z)
            t1 = torch.sub(1.75 * eye, p, alpha=0.25)
            t2 = torch.baddbmm(3.75 * eye, p, t1, alpha=-1)
            t3 = torch.baddbmm(3.25 * eye, p, t2, alpha=-1)
            if any(ctx.needs_input_grad):
                steps += [z, p, t1, t2, t3]
            z = torch.bmm(z, t3)
        ctx.save_for_backward(a, *steps)
        return z

    @staticmethod
    @once
    @custom_bwd(device_type="cpu")  # a backward pass may run inside autocast
    def backward(ctx, grad_z):
        a, *steps = ctx.saved_tensors
        grad_a = torch.zeros_like(a)
        for i in range(len(steps) - 5, -1, -5):
            z, p, t1, t2, t3 = steps[i : i + 5]
            grad_t3 = torch.bmm(z.mT, grad_z)
            minus_grad_t2 = torch.bmm(p.mT, grad_t3)
            minus_grad_p = torch.bmm(grad_t3, t2.mT).baddbmm_(minus_grad_t2, t1.mT, alpha=-1)
            minus_grad_p.baddbmm_(p.mT, minus_grad_t2, alpha=0.25)
            grad_a.baddbmm_(minus_grad_p, z.mT, alpha=-1)
            grad_z = torch.bmm(grad_z, t3.mT).baddbmm_(a.mT, minus_grad_p, alpha=-1)
        return grad_a, grad_z, None


def _slices(n: int, row: int) -> list[slice]:
    """Stretches of n tokens for which `row` numbers a token make about a block."""
    length = max(1, BLOCK // row)
    return [slice(start, min(n, start + length)) for start in range(0, n, length)]


def segments(tokens: Tensor, runs: Runs) -> list[Tensor]:
    """A view (b, h, segments, length, d) of each run."""
    parts = tokens.split([count * length for count, length in runs], dim=2)
    return [part.unflatten(2, run) for part, run in zip(parts, runs, strict=True)]
