"""The heavy steps for eager CPU tensors: in blocks of tokens that stay in cache, with backward passes by hand.

Same numbers as the plain torch code that runs everywhere else (compiled, exported, on a GPU, under `torch.func`), up to
rounding. Nothing here but the results has an n in its size: weights are made again in the backward pass, which costs
less than storing them, since fresh memory is slow. Products run in float32 or wider whatever the tokens' dtype.
"""

# torch types Function.backward for any number of gradients; each one here names its own.
# pyright: reportIncompatibleMethodOverride=false

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd import Function
from torch.autograd.function import once_differentiable

BLOCK = 2**20  # weights per block: 4 MiB in float32, measured best between 2^19 and 2^21


def usable(x: Tensor) -> bool:
    """Whether x is a plain eager CPU tensor, not being traced or transformed."""
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, nn.Parameter)
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def few_keys(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    value: Float[Tensor, "b h m v"],
    mask: Bool[Tensor, "b h2 m"] | None,
    scale: float,
) -> Float[Tensor, "b h n v"]:
    """Exact attention of many queries over few keys, which may be of a wider dtype; the output is in query's."""
    out = _FewKeys.apply(query, key, value, mask, scale)
    return out.transpose(1, 2) if _token_major(query) else out


def few_queries(
    query: Float[Tensor, "b h m d"],
    key: Float[Tensor, "b h s d"],
    value: Float[Tensor, "b h s v"],
    mask: Bool[Tensor, "b s"] | None,
    scale: float,
) -> Float[Tensor, "b h m v"]:
    """Exact attention of few queries over many keys, which may be of a narrower dtype; the output is in query's."""
    return _FewQueries.apply(query, key, value, mask, scale)


def segment_sums(
    tokens: Float[Tensor, "b h n d"], bins: Int[Tensor, "b n"] | None, m: int
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h m d"]]:
    """The tokens, and their sums over m bins (bin m is "none"), or over m consecutive segments where bins is None.

    Whoever uses the tokens again takes those returned: the two gradients then meet here and are added in place, which
    saves two arrays of the tokens' size.
    """
    return _SegmentSums.apply(tokens, bins, m)


def refine_inverse(
    matrix: Float[Tensor, "*batch p q"], start: Float[Tensor, "*batch q p"], num_iters: int
) -> Float[Tensor, "*batch q p"]:
    """`num_iters` steps of `iterative_pinv` from a start."""
    a, z = (x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]) for x in (matrix, start))
    return _RefineInverse.apply(a, z, num_iters).view(start.shape)


class _FewKeys(Function):
    """softmax over the keys. Shapes in the blocks: h heads, c tokens, m keys."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx, query, key, value, mask, scale):
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        (b, h, n, _), v = query.shape, value.shape[-1]
        ctx.token_major = _token_major(query)
        memory = query.new_empty((b, n, h, v) if ctx.token_major else (b, h, n, v))  # a view could not be written to
        out = memory.transpose(1, 2) if ctx.token_major else memory
        scaled = (scale * key).mT.contiguous()  # (b, h, d, m)
        bias = _bias(mask, key.dtype)
        for i, tokens, weight in _blocks(query, key):
            _softmax(query[i, :, tokens], scaled[i], None if bias is None else bias[i, :, None], weight, dim=-1)
            _product(weight, value[i], out[i, :, tokens])
        return memory

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")  # a backward pass may run inside autocast
    def backward(ctx, grad):
        query, key, value, mask = ctx.saved_tensors
        grad = grad.transpose(1, 2) if ctx.token_major else grad
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        scaled = ctx.scale * key
        scaled_t, value_t = scaled.mT.contiguous(), value.mT.contiguous()
        bias = _bias(mask, key.dtype)
        for i, tokens, weight, grad_logits in _blocks(query, key, 2):
            q, g = query[i, :, tokens].to(key.dtype), grad[i, :, tokens].to(key.dtype)
            _softmax(q, scaled_t[i], None if bias is None else bias[i, :, None], weight, dim=-1)
            grad_value[i].baddbmm_(weight.mT, g)
            torch.bmm(g, value_t[i], out=grad_logits)
            torch.ops.aten._softmax_backward_data.out(grad_logits, weight, -1, key.dtype, grad_input=grad_logits)
            _product(grad_logits, scaled[i], grad_query[i, :, tokens])
            grad_key[i].baddbmm_(grad_logits.mT, q, alpha=ctx.scale)
        return grad_query, grad_key, grad_value, None, None


class _FewQueries(Function):
    """Softmax over the tokens: each block's own softmax, then joined by the blocks' shares of the total weight."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx, query, key, value, mask, scale):
        b, h, m, _ = query.shape
        out = query.new_zeros(b, h, m, value.shape[-1])
        log_totals = []  # of each block's weights, (h, 1, m)
        total = query.new_full((b, h, 1, m), -torch.inf)
        scaled = (scale * query).mT.contiguous()
        bias = _bias(mask, query.dtype)
        for i, tokens, weight in _blocks(key, query):
            top = _softmax(key[i, :, tokens], scaled[i], None if bias is None else bias[i, tokens, None], weight, dim=1)
            log_total = top - weight.amax(1, keepdim=True).log_()
            log_totals.append(log_total)
            both = torch.logaddexp(total[i], log_total)
            part = torch.bmm(weight.mT, value[i, :, tokens].to(query.dtype))
            out[i].mul_((total[i] - both).exp_().mT).addcmul_(part, (log_total - both).exp_().mT)
            total[i] = both
        ctx.save_for_backward(query, key, value, mask, out, total, torch.stack(log_totals).unflatten(0, (b, -1)))
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")  # a backward pass may run inside autocast
    def backward(ctx, grad):
        query, key, value, mask, out, total, log_totals = ctx.saved_tensors
        grad_query, grad_key, grad_value = torch.zeros_like(query), torch.empty_like(key), torch.empty_like(value)
        scaled = ctx.scale * query
        scaled_t, grad_t = scaled.mT.contiguous(), grad.mT.contiguous()
        bias = _bias(mask, query.dtype)
        spread = (grad * out).sum(-1)[:, :, None]  # (b, h, 1, m)
        shares = (log_totals - total[:, None]).exp_().flatten(0, 1)
        for share, (i, tokens, weight, grad_logits) in zip(shares, _blocks(key, query, 2), strict=True):
            k, v = key[i, :, tokens].to(query.dtype), value[i, :, tokens].to(query.dtype)
            _softmax(k, scaled_t[i], None if bias is None else bias[i, tokens, None], weight, dim=1)
            weight.mul_(share)
            _product(weight, grad[i], grad_value[i, :, tokens])
            torch.bmm(v, grad_t[i], out=grad_logits)
            grad_logits.sub_(spread[i]).mul_(weight)
            _product(grad_logits, scaled[i], grad_key[i, :, tokens])
            grad_query[i].baddbmm_(grad_logits.mT, k, alpha=ctx.scale)
        return grad_query, grad_key, grad_value, None, None


class _SegmentSums(Function):
    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx, tokens, bins, m):
        b, h, n, d = tokens.shape
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        ctx.save_for_backward(bins)
        ctx.m = m
        if bins is None:
            return tokens, torch.cat([part.sum(3, dtype=dtype) for part in _segments(tokens, m)], dim=2)
        sums = tokens.new_zeros(b, m + 1, h, d, dtype=dtype)
        for i in range(b):
            for part in _slices(n, h * d):
                sums[i].index_add_(0, bins[i, part], tokens[i, :, part].transpose(0, 1).to(dtype))
        return tokens, sums[:, :m].transpose(1, 2)

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")  # a backward pass may run inside autocast
    def backward(ctx, grad, grad_sums):
        (bins,) = ctx.saved_tensors
        if bins is None:
            done = 0
            for part in _segments(grad, ctx.m):
                part += grad_sums[:, :, done : done + part.shape[2], None]
                done += part.shape[2]
            return grad, None, None
        b, h, n, d = grad.shape
        rows = grad_sums.new_zeros(b, ctx.m + 1, h, d)
        rows[:, : ctx.m] = grad_sums.transpose(1, 2)
        for i in range(b):
            for part in _slices(n, h * d):
                grad[i, :, part] += rows[i].index_select(0, bins[i, part]).transpose(0, 1)
        return grad, None, None


class _RefineInverse(Function):
    """Z ← Z T₃ with P = A Z, T₁ = (7 I - P) / 4, T₂ = 15/4 I - P T₁, T₃ = 13/4 I - P T₂."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx, a, z, num_iters):
        eye = torch.eye(a.shape[-2], dtype=a.dtype)
        steps = []
        for _ in range(num_iters):
            p = torch.bmm(a, z)
            t1 = torch.sub(1.75 * eye, p, alpha=0.25)
            t2 = torch.baddbmm(3.75 * eye, p, t1, alpha=-1)
            t3 = torch.baddbmm(3.25 * eye, p, t2, alpha=-1)
            steps += [z, p, t1, t2, t3]
            z = torch.bmm(z, t3)
        ctx.save_for_backward(a, *steps)
        return z

    @staticmethod
    @once_differentiable
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


def _blocks(tokens: Tensor, landmarks: Tensor, num_buffers: int = 1):
    """(sample, slice of its tokens, buffers (h, c, m) for that slice), block by block; the memory is used again."""
    b, h, n, _ = tokens.shape
    m = landmarks.shape[2]
    slices = _slices(n, h * m)
    longest = max(part.stop - part.start for part in slices)
    memory = landmarks.new_empty(num_buffers, h * longest * m)
    for i in range(b):
        for part in slices:
            c = part.stop - part.start
            yield i, part, *(buffer[: h * c * m].view(h, c, m) for buffer in memory)


def _softmax(tokens: Tensor, landmarks_t: Tensor, bias: Tensor | None, out: Tensor, dim: int) -> Tensor:
    """out = softmax(tokens @ landmarks_t + bias); returns the largest logits where dim = 1."""
    torch.bmm(tokens.to(out.dtype), landmarks_t, out=out)
    if bias is not None:
        out.add_(bias)
    top = out.amax(1, keepdim=True) if dim == 1 else out
    torch.softmax(out, dim, out=out)
    return top


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """0 where mask is True, the lowest number elsewhere: finite, so that an entirely masked block makes no NaN."""
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, without a copy where the dtypes agree."""
    if out.dtype == a.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))


def _token_major(tokens: Tensor) -> bool:
    """Whether (b, h, n, d) tokens lie in memory as (b, n, h, d), as projections make them."""
    return tokens.stride(1) < tokens.stride(2)


def _segments(tokens: Tensor, m: int) -> list[Tensor]:
    """Views (b, h, segments, length, d) of the short segments and of the long ones, if any."""
    n = tokens.shape[2]
    length, num_long = n // m, n % m
    num_short = m - num_long
    short, long = tokens.split([num_short * length, num_long * (length + 1)], dim=2)
    parts = [short.unflatten(2, (num_short, length))]
    return [*parts, long.unflatten(2, (num_long, length + 1))] if num_long else parts
