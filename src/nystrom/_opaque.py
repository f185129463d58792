"""An operator that torch.compile and torch.export do not look into: what they make runs the eager code, at any length.

For a choice of keys whose shapes are no short expression of the length: traced, they take minutes to compile, and the
result is slower than the eager blocks, which stay in cache.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nystrom._precision import full_precision

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, list[int], float], Tensor]
"""q (b, g, r, n, d), k (b, g, s, d), v (b, g, s, v), query mask (b, n) and key mask (b, s), sizes (counts), and the
probability of dropout, to (b, g, r, n, v)."""

AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality  # switched off inside every operator


def in_compile() -> bool:
    """Whether torch.compile or torch.export traces this, without torch.func, which would look for rules of ours."""
    return torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def opaque(name: str, attend: Attend) -> Attend:
    """`attend` as the operator `name`. Its backward pass runs the forward again; there is no second derivative."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_mask: Tensor | None,
        key_mask: Tensor | None,
        seed: Tensor | None,
        sizes: list[int],
        dropout_p: float,
    ) -> Tensor:
        with full_precision(q.device):
            if seed is None:
                return attend(q, k, v, query_mask, key_mask, sizes, dropout_p).contiguous()
            devices = [] if q.device.type == "cpu" else [q.device]
            with torch.random.fork_rng(devices, device_type=q.device.type if devices else "cuda"):
                torch.manual_seed(int(seed))  # the backward pass drops the same weights
                return attend(q, k, v, query_mask, key_mask, sizes, dropout_p).contiguous()

    @torch.library.custom_op(f"{name}_backward", mutates_args=())
    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_mask: Tensor | None,
        key_mask: Tensor | None,
        seed: Tensor | None,
        sizes: list[int],
        dropout_p: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._SetExcludeDispatchKeyGuard(AUTOGRAD, False), torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            out = run(q, k, v, query_mask, key_mask, seed, sizes, dropout_p)
            if not out.requires_grad:  # no sample has a token that takes part
                return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
            grads = torch.autograd.grad(out, (q, k, v), grad, materialize_grads=True)
        grad_q, grad_k, grad_v = (x.contiguous() for x in grads)
        return grad_q, grad_k, grad_v

    forward = torch.library.custom_op(name, run, mutates_args=())

    def save(ctx, inputs, output):
        *tensors, ctx.sizes, ctx.dropout_p = inputs
        ctx.save_for_backward(*tensors)

    def differentiate(ctx, grad):
        gradients = backward(grad, *ctx.saved_tensors, ctx.sizes, ctx.dropout_p)
        return *gradients, None, None, None, None, None

    forward.register_fake(lambda q, k, v, *_: q.new_empty(*q.shape[:4], v.shape[3]))
    backward.register_fake(lambda grad, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)))
    forward.register_autograd(differentiate, setup_context=save)

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_mask: Tensor | None,
        key_mask: Tensor | None,
        sizes: list[int],
        dropout_p: float,
    ) -> Tensor:
        seed = torch.randint(2**62, ()) if dropout_p else None
        return forward(q, k, v, query_mask, key_mask, seed, sizes, dropout_p)

    return call
