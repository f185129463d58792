"""nystrom_attention, segment_means and iterative_pinv against the independent reference and the laws they obey."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from nystrom import _cpu, iterative_pinv, nystrom_attention, segment_means
from nystrom.bench.methods import three_factor

F64 = torch.float64


def qkv(b: int, h: int, n: int, d: int, *, g: int | None = None, s: int | None = None, v: int | None = None):
    """Random float64 query (b, h, n, d), key (b, g, s, d), value (b, g, s, v)."""
    g, s, v = g or h, s or n, v or d
    query = torch.randn(b, h, n, d, dtype=F64)
    key = torch.randn(b, g, s, d, dtype=F64)
    return query, key, torch.randn(b, g, s, v, dtype=F64)


def prefix_mask(lengths: list[int], s: int) -> Tensor:
    return torch.arange(s) < torch.tensor(lengths)[:, None]


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


# Every size a different number, so that a swapped axis cannot pass.
SELF = dict(b=2, h=3, n=35, d=5)
CROSS = dict(b=2, h=3, n=35, d=5, s=77, v=11)
GROUPED = dict(b=2, h=6, n=35, d=5, g=3, s=77, v=4)
CASES = {
    "self": (SELF, 7, None),
    "self uneven": (SELF, 8, None),
    "self masked": (SELF, 7, [35, 16]),
    "fewer valid than landmarks": (SELF, 7, [35, 4]),
    "one valid": (SELF, 7, [1, 35]),
    "more landmarks than tokens": (SELF, 50, None),
    "one landmark": (SELF, 1, None),
    "one token": (dict(b=2, h=3, n=1, d=5), 7, None),
    "cross": (CROSS, 7, None),
    "cross masked": (CROSS, 7, [77, 30]),
    "cross, fewer queries than landmarks": (dict(b=2, h=3, n=4, d=5, s=77), 7, None),
    "cross, fewer keys than landmarks": (dict(b=2, h=3, n=35, d=5, s=4), 7, [4, 2]),
    "grouped": (GROUPED, 7, None),
    "grouped masked": (GROUPED, 7, [77, 30]),
}


@pytest.mark.parametrize(("sizes", "m", "lengths"), CASES.values(), ids=CASES.keys())
def test_equals_reference_output_and_gradients(sizes, m, lengths):
    query, key, value = (x.requires_grad_() for x in qkv(**sizes))
    mask = None if lengths is None else prefix_mask(lengths, key.shape[2])
    out = nystrom_attention(query, key, value, mask, enable_gqa=True, num_landmarks=m)
    want = reference.nystrom_attention(query, key, value, mask, num_landmarks=m)
    assert out.shape == want.shape
    assert relative(out, want) < 1e-12
    weight = torch.randn_like(want)
    got_grads = torch.autograd.grad(out, (query, key, value), weight)
    want_grads = torch.autograd.grad(want, (query, key, value), weight)
    for got, wanted in zip(got_grads, want_grads, strict=True):
        assert (got - wanted).norm() <= 1e-9 * (1 + wanted.norm())


def test_scattered_mask_and_query_mask_equal_reference():
    query, key, value = qkv(**CROSS)
    key_mask = torch.rand(2, 77) < 0.6
    query_mask = torch.rand(2, 35) < 0.4
    got = nystrom_attention(query, key, value, key_mask, query_mask=query_mask, num_landmarks=7)
    want = reference.nystrom_attention(query, key, value, key_mask, query_mask, num_landmarks=7)
    assert relative(got, want) < 1e-12


def test_custom_scale_equals_reference():
    query, key, value = qkv(**SELF)
    got = nystrom_attention(query, key, value, scale=0.7, num_landmarks=7)
    assert relative(got, reference.nystrom_attention(query, key, value, num_landmarks=7, scale=0.7)) < 1e-12


@pytest.mark.unhooked
@pytest.mark.parametrize("lengths", [None, [11, 5], [11, 2], [11, 0]])
@pytest.mark.parametrize("block", [8, _cpu.BLOCK])
def test_gradcheck(lengths, block, monkeypatch):
    monkeypatch.setattr(_cpu, "BLOCK", block)
    inputs = tuple(x.requires_grad_() for x in qkv(2, 2, 11, 3))
    mask = None if lengths is None else prefix_mask(lengths, 11)
    assert torch.autograd.gradcheck(lambda q, k, v: nystrom_attention(q, k, v, mask, num_landmarks=3), inputs)


@pytest.mark.parametrize("block", [8, _cpu.BLOCK])
def test_gradients_refuse_to_be_differentiated_again(block, monkeypatch):
    """torch's own guard is passed over by torch.autograd.grad, which then gives wrong numbers."""
    monkeypatch.setattr(_cpu, "BLOCK", block)
    x = torch.randn(1, 2, 20, 4, dtype=F64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again|not implemented"):
        (grad,) = torch.autograd.grad(nystrom_attention(x, x, x, num_landmarks=5).square().sum(), x, create_graph=True)
        torch.autograd.grad(grad.square().sum(), x)


def test_second_derivatives_through_functorch_and_the_math_backend():
    x, v = torch.randn(2, 1, 2, 12, 4, dtype=F64).unbind()

    def loss(x: Tensor) -> Tensor:
        return nystrom_attention(x, x, x, num_landmarks=4).square().sum()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient = torch.func.grad(loss)
        _, product = torch.func.vjp(gradient, x)
        numeric = (gradient(x + 1e-5 * v) - gradient(x - 1e-5 * v)) / 2e-5
        torch.testing.assert_close(product(v)[0], numeric, rtol=1e-5, atol=1e-6)


def test_rows_sum_to_one():
    query, key, _ = qkv(3, 2, 64, 8)
    ones = torch.ones(3, 2, 64, 1, dtype=F64)
    error = {
        k: (nystrom_attention(query, key, ones, num_landmarks=8, num_pinv_iters=k) - 1).norm() / 3**0.5 for k in (6, 20)
    }
    assert error[20] < 1e-10  # the exact inverse
    assert 1e-6 < error[6] < 0.6  # six steps are not it: nothing switches algorithm behind the user's back


@pytest.mark.parametrize("lengths", [None, [64, 40, 9]])
def test_one_landmark_per_token_is_softmax_attention(lengths):
    query, key, value = qkv(3, 2, 64, 8)
    mask = None if lengths is None else prefix_mask(lengths, 64)
    exact = F.scaled_dot_product_attention(query, key, value, None if mask is None else mask[:, None, None])
    real = torch.ones(3, 1, 64, 1, dtype=F64) if mask is None else mask[:, None, :, None].to(F64)
    error = {
        k: relative(real * nystrom_attention(query, key, value, mask, num_landmarks=64, num_pinv_iters=k), real * exact)
        for k in (6, 20, 40)
    }
    assert error[40] < 1e-9
    assert error[20] < error[6]
    assert 1e-3 < error[6] < 0.2


@given(
    n=st.integers(1, 40), m=st.integers(1, 48), d=st.integers(1, 8), valid=st.integers(1, 40), seed=st.integers(0, 99)
)
@settings(max_examples=150, deadline=None)
def test_any_size_equals_reference_and_ignores_padding(n, m, d, valid, seed):
    torch.manual_seed(seed)
    query, key, value = qkv(2, 2, n, d)
    mask = prefix_mask([n, min(valid, n)], n)
    out = nystrom_attention(query, key, value, mask, num_landmarks=m)
    assert out.isfinite().all()
    want = reference.nystrom_attention(query, key, value, mask, num_landmarks=m)
    assert (out - want).norm() <= 1e-10 * want.norm()


def test_padding_content_changes_nothing():
    query, key, value = qkv(2, 3, 35, 5)
    mask = prefix_mask([35, 16], 35)
    before = nystrom_attention(query, key, value, mask, num_landmarks=7)
    for x in (query, key, value):
        x[1, :, 16:] = 1e9
    after = nystrom_attention(query, key, value, mask, num_landmarks=7)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1, :, :16], after[1, :, :16])


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_amount_of_padding_changes_nothing(side):
    query, key, value = qkv(1, 3, 35, 5)
    alone = nystrom_attention(query, key, value, num_landmarks=8)
    places = {
        "left": torch.arange(35) + 15,
        "right": torch.arange(35),
        "scattered": torch.randperm(50)[:35].sort().values,
    }
    mask = torch.zeros(1, 50, dtype=torch.bool)
    mask[:, places[side]] = True
    padded = [torch.randn(1, 3, 50, 5, dtype=F64).index_copy(2, places[side], x) for x in (query, key, value)]
    out = nystrom_attention(*padded, mask, num_landmarks=8)
    torch.testing.assert_close(out[:, :, places[side]], alone, rtol=1e-12, atol=1e-12)


def test_batch_mates_change_nothing():
    query, key, value = qkv(3, 2, 64, 8)
    together = nystrom_attention(query, key, value, num_landmarks=8)
    key[1:] *= 10
    query[1:] *= 10
    assert torch.equal(nystrom_attention(query, key, value, num_landmarks=8)[0], together[0])
    alone = nystrom_attention(query[:1], key[:1], value[:1], num_landmarks=8)
    torch.testing.assert_close(alone, together[:1], rtol=1e-13, atol=1e-14)


def test_moving_every_key_by_one_vector_changes_nothing():
    query, key, value = qkv(3, 2, 64, 8)
    moved = key + torch.randn(8, dtype=F64)
    got = nystrom_attention(query, moved, value, num_landmarks=8)
    assert relative(got, nystrom_attention(query, key, value, num_landmarks=8)) < 1e-12


def test_shuffling_keys_inside_segments_changes_nothing():
    query, key, value = qkv(3, 2, 64, 8)
    order = torch.cat([8 * i + torch.randperm(8) for i in range(8)])
    got = nystrom_attention(query, key[:, :, order], value[:, :, order], num_landmarks=8)
    assert relative(got, nystrom_attention(query, key, value, num_landmarks=8)) < 1e-12


def test_reordering_whole_segments():
    query, key, value = qkv(3, 2, 64, 8)
    out = nystrom_attention(query, key, value, num_landmarks=8)
    order = torch.cat([8 * i + torch.arange(8) for i in torch.randperm(8)])
    keys_moved = nystrom_attention(query, key[:, :, order], value[:, :, order], num_landmarks=8)
    assert relative(keys_moved, out) < 1e-12
    queries_moved = nystrom_attention(query[:, :, order], key, value, num_landmarks=8)
    assert relative(queries_moved, out[:, :, order]) < 1e-12


@pytest.mark.parametrize("side", ["key", "query"])
def test_a_sample_with_nothing_valid_gives_zeros_and_zero_gradients(side):
    inputs = tuple(x.requires_grad_() for x in qkv(2, 3, 35, 5, s=20))
    key_mask = prefix_mask([20, 0 if side == "key" else 20], 20)
    query_mask = prefix_mask([35, 0 if side == "query" else 35], 35)
    out = nystrom_attention(*inputs, key_mask, query_mask=query_mask, num_landmarks=7)
    assert out[0].abs().min() > 0
    assert (out[1] == 0).all()
    for grad in torch.autograd.grad(out.square().sum() + out.sum(), inputs):
        assert grad.isfinite().all()
        assert (grad[1] == 0).all()


MASK_FORMS = {
    "(b, s)": lambda mask: mask,
    "(b, 1, 1, s)": lambda mask: mask[:, None, None],
    "expanded (b, 1, n, s)": lambda mask: mask[:, None, None].expand(-1, 1, 35, -1),
    "expanded (b, h, n, s)": lambda mask: mask[:, None, None].expand(-1, 3, 35, -1),
    "written out (b, 1, n, s)": lambda mask: mask[:, None, None].repeat(1, 1, 35, 1),
    "float -inf": lambda mask: torch.zeros(mask.shape, dtype=F64).masked_fill(~mask, -torch.inf),
    "float min": lambda mask: torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None, None],
    "float -10000": lambda mask: torch.zeros(mask.shape).masked_fill(~mask, -1e4),
}


def test_meta_tensors_give_the_shape():
    query, key, value = (x.to("meta") for x in qkv(2, 3, 35, 5))
    mask = torch.zeros(2, 35, device="meta")
    assert nystrom_attention(query, key, value, mask, num_landmarks=7).shape == (2, 3, 35, 5)


def test_empty_batch():
    query, key, value = qkv(0, 3, 35, 5)
    assert nystrom_attention(query, key, value).shape == (0, 3, 35, 5)
    assert nystrom_attention(query, key, value, torch.ones(0, 35, dtype=torch.bool)).shape == (0, 3, 35, 5)


@pytest.mark.parametrize("form", MASK_FORMS.values(), ids=MASK_FORMS.keys())
def test_every_form_of_key_padding_mask(form):
    query, key, value = qkv(2, 3, 35, 5)
    mask = prefix_mask([35, 16], 35)
    want = reference.nystrom_attention(query, key, value, mask, num_landmarks=7)
    assert relative(nystrom_attention(query, key, value, form(mask), num_landmarks=7), want) < 1e-12


def test_mask_shared_by_the_batch():
    query, key, value = qkv(2, 3, 35, 5)
    mask = prefix_mask([16], 35)
    want = reference.nystrom_attention(query, key, value, mask.expand(2, 35), num_landmarks=7)
    assert relative(nystrom_attention(query, key, value, mask[:, None, None], num_landmarks=7), want) < 1e-12


def test_dropout_is_obeyed_and_unbiased():
    query, key, value = qkv(1, 2, 40, 4)
    kept = nystrom_attention(query, key, value, num_landmarks=4)
    draws = torch.stack([nystrom_attention(query, key, value, None, 0.3, num_landmarks=4) for _ in range(2000)])
    assert not torch.equal(draws[0], draws[1])
    standard_error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - kept).abs() < 6 * standard_error).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_that_of_exact_attention(dtype):
    query, key, value = (x.float() for x in qkv(2, 4, 512, 32))
    halves = [x.to(dtype) for x in (query, key, value)]
    mask = prefix_mask([512, 300], 512)
    out = nystrom_attention(*halves, mask, num_landmarks=32)
    assert out.dtype == dtype

    def error(got: Tensor, want: Tensor) -> float:
        return (got.double() - want.double())[0].norm().item() / want.double()[0].norm().item()

    wide = [x.double() for x in halves]
    own = error(out, nystrom_attention(*wide, mask, num_landmarks=32))
    plain = error(F.scaled_dot_product_attention(*halves), F.scaled_dot_product_attention(*wide))
    assert own < 2 * plain


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_autocast_changes_nothing(dropout_p):
    inputs = [x.float().requires_grad_() for x in qkv(2, 4, 128, 32)]
    torch.manual_seed(0)
    plain = nystrom_attention(*inputs, dropout_p=dropout_p, num_landmarks=32)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        out = nystrom_attention(*inputs, dropout_p=dropout_p, num_landmarks=32)
        grads_inside = torch.autograd.grad(out.sum(), inputs, retain_graph=True)  # discouraged by torch, and common
    assert torch.equal(out, plain)
    grads, wanted = torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(plain.sum(), inputs)
    for got, inside, want in zip(grads, grads_inside, wanted, strict=True):
        assert torch.equal(got, want)
        assert relative(inside, want) < 0.1  # torch's own products run in bfloat16 there


def test_dropout_drops_a_querys_weights_on_the_landmarks_alone():
    """With one landmark a query has one weight, so its whole output is zero, or the mean value over 1 - p."""
    query, key, value = qkv(2, 3, 4000, 4)
    kept = nystrom_attention(query, key, value, num_landmarks=1)
    out = nystrom_attention(query, key, value, None, 0.3, num_landmarks=1)
    dropped = (out == 0).all(-1)
    torch.testing.assert_close(out[~dropped], kept[~dropped] / 0.7, rtol=1e-10, atol=1e-12)
    assert abs(dropped.double().mean().item() - 0.3) < 5 * (0.3 * 0.7 / dropped.numel()) ** 0.5


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.unhooked
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("form", [None, "(b, s)", "written out (b, 1, n, s)", "float -inf"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(form, dynamic):
    compiled = torch.compile(nystrom_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (35, 42) if form is None else (35,):
        query, key, value = (x.float() for x in qkv(2, 3, n, 5))
        mask = None if form is None else MASK_FORMS[form](prefix_mask([35, 16], 35))
        got = compiled(query, key, value, mask, num_landmarks=7)
        torch.testing.assert_close(got, nystrom_attention(query, key, value, mask, num_landmarks=7))


@pytest.mark.unhooked
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_graph_still_refuses_a_bias():
    compiled = torch.compile(nystrom_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"an additive attn_mask holds only 0"):
        compiled(X, X, X, -torch.rand(2, 35), num_landmarks=7)


def test_segment_means_places_the_longer_segments_last():
    tokens = torch.arange(10, dtype=F64).view(1, 1, 10, 1)
    means, counts = segment_means(tokens, 4)
    assert counts.tolist() == [[2, 2, 3, 3]]
    assert means.flatten().tolist() == [0.5, 2.5, 5.0, 8.0]
    mask = torch.tensor([[True, False, True, True, False, False, True, False, False, True]])  # 0 2 3 6 9
    means, counts = segment_means(tokens, 4, mask)
    assert counts.tolist() == [[1, 1, 1, 2]]
    assert means.flatten().tolist() == [0.0, 2.0, 3.0, 7.5]


def test_segment_means_accumulates_in_float32():
    tokens = (torch.rand(1, 1, 4096, 4) + 10).to(torch.bfloat16)
    for mask in (None, torch.ones(1, 4096, dtype=torch.bool)):
        means, _ = segment_means(tokens, 1, mask)
        assert means.dtype == torch.float32
        torch.testing.assert_close(means, tokens.double().mean(2, keepdim=True).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(9, 9), (2, 9, 6), (2, 3, 6, 9)])
def test_iterative_pinv_converges_to_the_pseudo_inverse(shape):
    matrix = torch.rand(shape, dtype=F64)
    torch.testing.assert_close(iterative_pinv(matrix, 40), torch.linalg.pinv(matrix), rtol=1e-7, atol=1e-8)


def test_iterative_pinv_follows_the_residual_map():
    matrix = torch.softmax(torch.randn(8, 8, dtype=F64), -1)
    eye = torch.eye(8, dtype=F64)
    for k in range(1, 8):
        residual, following = (eye - matrix @ iterative_pinv(matrix, j) for j in (k, k + 1))
        cubed = residual @ residual @ residual
        torch.testing.assert_close(following, (3 * cubed + cubed @ residual) / 4, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e20])
def test_iterative_pinv_at_any_scale(scale):
    torch.testing.assert_close(iterative_pinv(scale * torch.eye(3)) * scale, torch.eye(3))


def test_iterative_pinv_of_halves_and_under_autocast_runs_in_float32():
    matrix = torch.softmax(2 * torch.randn(8, 8), -1)
    want = iterative_pinv(matrix.double(), 12)
    half = iterative_pinv(300 * torch.eye(3).half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), torch.eye(3) / 300, rtol=1e-3, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        got = iterative_pinv(matrix, 12)
    assert got.dtype == torch.float32 and relative(got, want) < 1e-3


def test_iterative_pinv_of_zero_is_zero_with_finite_gradient():
    matrix = torch.zeros(2, 4, 4, requires_grad=True)
    out = iterative_pinv(matrix)
    assert (out == 0).all()
    out.sum().backward()
    assert matrix.grad is not None and matrix.grad.isfinite().all()


X = torch.randn(2, 3, 35, 5)
REFUSED = {
    "causal": (dict(is_causal=True), r"is_causal must be False: got True"),
    "rank": (dict(query=X[0]), r"query must have 4 dimensions .* got 3 in shape \(3, 35, 5\)"),
    "integers": (dict(value=X.long()), r"value must be a floating-point tensor: got torch.int64"),
    "dtypes": (dict(key=X.half()), r"share one dtype: got query torch.float32, key torch.float16"),
    "batch": (dict(query=X[:1]), r"share the batch size: got query \(1, 3, 35, 5\), key \(2, 3, 35, 5\)"),
    "key length": (dict(value=X[:, :, :20]), r"share heads and length: .* value \(2, 3, 20, 5\)"),
    "width": (dict(query=X[..., :4]), r"share the head width: got query \(2, 3, 35, 4\)"),
    "heads": (dict(key=X[:, :1], value=X[:, :1]), r"number of heads: .*key \(2, 1, 35, 5\).*pass enable_gqa=True"),
    "groups": (dict(key=X[:, :2], value=X[:, :2], enable_gqa=True), r"multiple of the key heads: got 3 and 2"),
    "no tokens": (dict(query=X[:, :, :0]), r"length and head width must be at least 1: got query \(2, 3, 0, 5\)"),
    "no heads": (dict(query=X[:, :0], key=X[:, :0], value=X[:, :0]), r"heads, length .* got query \(2, 0, 35, 5\)"),
    "no groups": (dict(key=X[:, :0], value=X[:, :0], enable_gqa=True), r"multiple of the key heads: got 3 and 0"),
    "landmarks": (dict(num_landmarks=0), r"num_landmarks must be an integer of at least 1: got 0"),
    "fractional landmarks": (dict(num_landmarks=8.0), r"num_landmarks must be an integer of at least 1: got 8.0"),
    "iterations": (dict(num_pinv_iters=0), r"num_pinv_iters must be an integer of at least 1: got 0"),
    "dropout": (dict(dropout_p=1.0), r"dropout_p must be in \[0, 1\): got 1.0"),
    "scale": (dict(scale=-1.0), r"scale must be positive: got -1.0"),
    "NaN scale": (dict(scale=float("nan")), r"scale must be positive: got nan"),
    "mask shape": (dict(attn_mask=torch.ones(2, 34) > 0), r"key-padding mask .*: got shape \(2, 34\) .* key length 35"),
    "mask (n, s)": (dict(attn_mask=torch.ones(35, 35) > 0), r"got shape \(35, 35\) with batch 2, query length 35"),
    "mask rank": (dict(attn_mask=torch.ones(2, 1, 35) > 0), r"got shape \(2, 1, 35\)"),
    "mask dtype": (dict(attn_mask=torch.ones(2, 35).long()), r"attn_mask must be bool .* got torch.int64"),
    "mask by query": (dict(attn_mask=torch.ones(2, 1, 35, 35).tril() > 0), r"\(2, 1, 35, 35\).* vary by query"),
    "mask of other heads": (dict(attn_mask=torch.ones(2, 7, 1, 35) > 0), r"got shape \(2, 7, 1, 35\) .* and 3 heads"),
    "mask by head": (dict(attn_mask=torch.rand(2, 3, 1, 35) > 0.5), r"vary by head"),
    "bias": (
        dict(attn_mask=-torch.rand(2, 35)),
        r"only 0 .* and values <= -10000 .*: got 70 other values, the first -0\.\d+",
    ),
    "NaN mask": (dict(attn_mask=torch.full((2, 35), torch.nan)), r"no NaN: got 70 other values, the first nan"),
    "query mask": (
        dict(query_mask=torch.ones(2, 34) > 0),
        r"query_mask must be bool .* \(2, 35\), True = takes part: got",
    ),
}


@pytest.mark.unhooked
@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_with_the_rule_and_the_values(changes, message):
    with pytest.raises(ValueError, match=message):
        nystrom_attention(**(dict(query=X, key=X, value=X) | changes))


@pytest.mark.unhooked
def test_helpers_refuse_with_the_values():
    with pytest.raises(ValueError, match="num_landmarks and the length must be at least 1: got 0 and 35"):
        segment_means(X, 0)
    with pytest.raises(ValueError, match=r"matrix must be a floating-point tensor: got torch\.int64"):
        iterative_pinv(torch.eye(3).long())
    with pytest.raises(ValueError, match=r"^mask must be bool of shape .* got torch.float32 of shape \(2, 35\)"):
        segment_means(X, 4, torch.ones(2, 35))
    with pytest.raises(ValueError, match="num_iters must be at least 1: got 0"):
        iterative_pinv(torch.eye(3), 0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [8, 16])
def test_makes_no_array_that_grows_faster_than_the_output(masked, width):
    """Counted through the dispatcher: no n x m array and no copy of the inputs, with a mask or without."""
    n, m = 65536, 64
    query, key, value = (torch.randn(1, 2, n, width) for _ in range(3))
    mask = prefix_mask([n - 5], n) if masked else None
    made: list[int] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, Tensor) and x.numel() and x.untyped_storage().data_ptr() not in known:
                    made.append(x.numel())
            return out

    with Count(), torch.no_grad():
        out = nystrom_attention(query, key, value, mask, num_landmarks=m)
    assert max(made) == out.numel() < 2 * n * m
    assert sum(x > _cpu.BLOCK for x in made) == (out.numel() > _cpu.BLOCK)  # the output


def test_plain_form_would_fail_that_count():
    """The count above sees what it is there to see."""
    query, key, value = (torch.randn(1, 2, 2048, 8) for _ in range(3))
    largest = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            return out

    with Count(), torch.no_grad():
        three_factor(query, key, value, 64)
    assert largest == 2 * 2048 * 64


def test_plain_form_agrees():
    query, key, value = qkv(2, 3, 64, 8)
    want = nystrom_attention(query, key, value, num_landmarks=8)
    torch.testing.assert_close(three_factor(query, key, value, 8), want, rtol=1e-10, atol=1e-12)
