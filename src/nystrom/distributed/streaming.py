"""A few queries read many keys, held by many ranks: by blocks of keys, so that no array is as long as the sequence.

With weights p_j = exp(q·k_j - log_mass) the output is Σ p_j v_j. Each rank runs over its own keys, forward and
backward; between the two it needs from the others nothing but the outputs and the masses.
"""

# torch types Function.backward for any number of gradients; each one here names its own.
# pyright: reportIncompatibleMethodOverride=false

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd import Function

from nystrom._cpu import once
from nystrom.distributed.exchange import Group, merge, total

CACHE = 2**20
"""Weights at a time on a CPU: about what stays in its cache (count)."""
NUMBERS = 2**27
"""The same on other devices (count)."""


def read(
    query: Float[Tensor, "b g m d"],
    key: Float[Tensor, "b g s d"],
    value: Float[Tensor, "b g s v"],
    key_mask: Bool[Tensor, "b s"] | None,
    scale: float,
    group: Group,
) -> tuple[Float[Tensor, "b g m v"], Float[Tensor, "b g m"]]:
    """Exact attention of queries that all ranks hold to the keys of all ranks, and log Σ exp(scale q·k).

    Time O(b g s m (d + v)) on a rank, memory O(b g m (d + v)); of each rank's output and masses all get the merged.

    Args:
        query: the same on every rank, but for its gradient: each rank gives the part that is due to its keys.
        key: this rank's.
        value: this rank's.
        key_mask: True = takes part. Without any on all ranks: zeros, and -inf.
        scale: factor on the logits.
        group: the ranks.
    """
    return _Read.apply(query, key, value, key_mask, scale, group)


class _Read(Function):
    @staticmethod
    def forward(ctx, query, key, value, key_mask, scale, group):
        q = query * scale
        b, g, m, _ = q.shape
        most = q.new_full((b, g, m, 1), torch.finfo(q.dtype).min)
        mass, out = torch.zeros_like(most), q.new_zeros(b, g, m, value.shape[3])
        for at in _blocks(q, key):
            logits = _logits(q, key, key_mask, at)
            before, most = most, most.maximum(logits.amax(-1, keepdim=True))
            weight = logits.sub_(most).exp_()
            shrink = (before - most).exp()
            mass = mass * shrink + weight.sum(-1, keepdim=True)
            out = out.mul_(shrink).add_(weight @ value[:, :, at])
        out /= mass.clamp_min(torch.finfo(mass.dtype).tiny)
        out, log_mass = merge(out, (most + mass.log()).squeeze(-1), group)
        ctx.save_for_backward(query, key, value, key_mask, out, log_mass)
        ctx.scale, ctx.group = scale, group
        return out, log_mass

    @staticmethod
    @once
    def backward(ctx, grad_out, grad_log_mass):
        query, key, value, key_mask, out, log_mass = ctx.saved_tensors
        both = total(torch.cat([grad_out, grad_log_mass[..., None]], -1), ctx.group)
        grad_out = both[..., :-1]
        # of a logit: p (grad_out·v - grad_out·out + grad_log_mass)
        shared = both[..., -1:] - (grad_out * out).sum(-1, keepdim=True)
        q = query * ctx.scale
        finite = log_mass[..., None].clamp_min(torch.finfo(log_mass.dtype).min)
        grad_q, grad_key, grad_value = torch.zeros_like(q), torch.empty_like(key), torch.empty_like(value)
        for at in _blocks(q, key):
            weight = _logits(q, key, key_mask, at).sub_(finite).exp_()
            grad_value[:, :, at] = weight.mT @ grad_out
            grad_logits = (grad_out @ value[:, :, at].mT).add_(shared).mul_(weight)
            grad_key[:, :, at] = grad_logits.mT @ q
            grad_q += grad_logits @ key[:, :, at]
        return grad_q * ctx.scale, grad_key, grad_value, None, None, None


def _blocks(q: Tensor, key: Tensor) -> list[slice]:
    """Keys at a time."""
    length = max(1, (CACHE if q.device.type == "cpu" else NUMBERS) // max(1, q.shape[:3].numel()))
    return [slice(start, start + length) for start in range(0, key.shape[2], length)]


def _logits(
    q: Float[Tensor, "b g m d"], key: Float[Tensor, "b g s d"], key_mask: Bool[Tensor, "b s"] | None, at: slice
) -> Float[Tensor, "b g m length"]:
    logits = q @ key[:, :, at].mT
    return logits if key_mask is None else logits.masked_fill_(~key_mask[:, None, None, at], -torch.inf)
