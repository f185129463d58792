"""Every way of running the op, with a mask: compiled, exported, ONNX, functorch, meta, deterministic, checkpointed."""

import copy
import pickle

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

from nystrom import NystromAttention, _cpu, nystrom_attention

OPTIONS = {
    "published": {},
    "chebyshev": {"pinv": "chebyshev"},
    "ridge": {"pinv": "ridge"},
    "svd": {"pinv": "svd"},
    "strided": {"landmarks": "strided"},
    "kmeans": {"landmarks": "kmeans"},
}


def inputs(b: int = 2, n: int = 35, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value (b, 3, n, 5) and a mask with a gap and padding."""
    query, key, value = (torch.randn(b, 3, n, 5, dtype=dtype) for _ in range(3))
    lengths = torch.tensor([n, n // 2 + 1])[torch.arange(b) % 2]
    mask = torch.arange(n) < lengths[:, None]
    mask[:, n // 3] &= n < 6
    return query, key, value, mask


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class Op(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return nystrom_attention(query, key, value, mask, num_landmarks=7, **self.options)


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.fixture
def plain(monkeypatch) -> None:
    """Run what other devices, compilers and transforms run."""
    monkeypatch.setattr(_cpu, "usable", lambda *tensors: False)


@pytest.mark.unhooked
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own, tracing an autograd.Function
@pytest.mark.parametrize(
    ("name", "dynamic"), [*((name, False) for name in OPTIONS), ("published", True), ("strided", True)]
)
def test_compiled_with_gradients(name, dynamic):
    options = OPTIONS[name]
    compiled = torch.compile(Op(**options), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (35, 42) if dynamic else (35,):
        *qkv, mask = inputs(n=n, dtype=torch.float64)
        leaves = [x.requires_grad_() for x in qkv]
        got, want = compiled(*leaves, mask), Op(**options)(*leaves, mask)
        close(got, want)
        weight = torch.randn_like(want)
        pairs = zip(torch.autograd.grad(got, leaves, weight), torch.autograd.grad(want, leaves, weight), strict=True)
        for one, other in pairs:
            close(one, other)


@pytest.mark.unhooked
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_exported_with_dynamic_batch_and_length(options, masked):
    b, n = Dim("b"), Dim("n")
    shapes = ({0: b, 2: n},) * 3 + (({0: b, 1: n},) if masked else (None,))
    example = inputs() if masked else (*inputs()[:3], None)
    program = torch.export.export(Op(**options), example, dynamic_shapes=shapes)
    for batch, length in ((2, 35), (3, 50), (1, 4), (2, 1)):
        *qkv, mask = inputs(batch, length)
        arguments = (*qkv, mask if masked else None)
        close(program.module()(*arguments), Op(**options)(*arguments))


@pytest.mark.unhooked
@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("options", [OPTIONS["published"], OPTIONS["chebyshev"]], ids=["published", "chebyshev"])
@pytest.mark.parametrize("module", ["op", "NystromAttention"])
def test_onnx_gives_equal_outputs_at_three_lengths(tmp_path, module, options):
    b, n = Dim("b"), Dim("n")
    if module == "op":
        model, example = Op(**options), inputs()
        shapes = ({0: b, 2: n},) * 3 + ({0: b, 1: n},)
    else:
        model = NystromAttention(12, 3, num_landmarks=7, conv_kernel_size=5, **options).eval()
        example, shapes = (torch.randn(2, 35, 12), inputs()[3]), ({0: b, 1: n}, {0: b, 1: n})
    program = torch.onnx.export(model, example, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [node.name for node in session.get_inputs()]
    for batch, length in ((2, 35), (3, 128), (2, 4)):
        *qkv, mask = inputs(batch, length)
        arguments = (*qkv, mask) if module == "op" else (torch.randn(batch, length, 12), mask)
        feed = dict(zip(names, [x.numpy() for x in arguments], strict=True))
        (got,) = session.run(None, feed)
        assert isinstance(got, np.ndarray)
        with torch.no_grad():
            close(torch.from_numpy(got), model(*arguments))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_vmap(options):
    stacked = [inputs(dtype=torch.float64) for _ in range(3)]
    batched = [torch.stack(x) for x in zip(*stacked, strict=True)]
    got = torch.func.vmap(Op(**options))(*batched)
    for one, arguments in zip(got, stacked, strict=True):
        close(one, Op(**options)(*arguments))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_func_grad_and_per_sample_gradients(options):
    query, key, value, mask = inputs(dtype=torch.float64)

    def loss(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return Op(**options)(query, key, value, mask).square().sum()

    leaves = [x.requires_grad_() for x in (query, key, value)]
    want = torch.autograd.grad(loss(*leaves, mask), leaves)
    for got, wanted in zip(torch.func.grad(loss, (0, 1, 2))(query, key, value, mask), want, strict=True):
        close(got, wanted)
    one_by_one = torch.func.vmap(torch.func.grad(lambda *a: loss(*(x[None] for x in a)), (0, 1, 2)))
    for got, wanted in zip(one_by_one(query, key, value, mask), want, strict=True):
        close(got, wanted)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_meta(options):
    assert Op(**options)(*(x.to("meta") for x in inputs())).shape == (2, 3, 35, 5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_deterministic_mode(options):
    *qkv, mask = inputs()
    leaves = [x.requires_grad_() for x in qkv]

    def run() -> list[Tensor]:
        out = Op(**options)(*leaves, mask)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpoint_gives_the_same_gradients(dropout):
    attention = NystromAttention(12, 3, num_landmarks=7, conv_kernel_size=5, dropout=dropout)
    x, mask = torch.randn(2, 35, 12, requires_grad=True), inputs()[3]
    parameters = [x, *attention.parameters()]
    torch.manual_seed(1)
    want = torch.autograd.grad(attention(x, mask).square().sum(), parameters)
    torch.manual_seed(1)
    out = checkpoint(attention, x, mask, use_reentrant=False)
    assert isinstance(out, Tensor)
    for got, wanted in zip(torch.autograd.grad(out.square().sum(), parameters), want, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kernel", ["cpu", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 3.0, 5.0])
def test_half_precision_is_as_near_as_exact_attention_in_it(kernel, dtype, size, request):
    """Both against their own float64 value; more than the plain rounding of the result is then the method's doing."""
    if kernel == "plain":
        request.getfixturevalue("plain")
    query, key, value = ((scale * torch.randn(2, 4, 256, 32)).to(dtype) for scale in (size, size, 1.0))
    mask = torch.arange(256) < torch.tensor([[256], [100]])
    wide = [x.double() for x in (query, key, value)]
    ours = nystrom_attention(query, key, value, mask, num_landmarks=32)
    exact = F.scaled_dot_product_attention(query, key, value, mask[:, None, None])
    assert ours.dtype == dtype
    want = nystrom_attention(*wide, mask, num_landmarks=32)
    error = (ours - want).norm() / want.norm()
    want = F.scaled_dot_product_attention(*wide, mask[:, None, None])
    assert error <= 2 * (exact - want).norm() / want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_module_and_its_gradients(dtype):
    attention = NystromAttention(12, 3, num_landmarks=7, conv_kernel_size=5)
    half = copy.deepcopy(attention).to(dtype)
    x, mask = torch.randn(2, 35, 12), inputs()[3]
    out, want = half(x.to(dtype), mask), attention(x, mask)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), want, rtol=0.05, atol=0.01)
    got_grads = torch.autograd.grad(out.float().sum(), list(half.parameters()))
    want_grads = torch.autograd.grad(want.sum(), list(attention.parameters()))
    for got, wanted in zip(got_grads, want_grads, strict=True):
        assert got.dtype == dtype
        assert (got.float() - wanted).norm() <= 0.05 * (1 + wanted.norm())


def test_autocast_module_is_near_float32():
    attention = NystromAttention(12, 3, num_landmarks=7, conv_kernel_size=5)
    x, mask = torch.randn(2, 35, 12), inputs()[3]
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x, mask)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attention(x, mask), rtol=0.05, atol=0.01)


def test_module_is_pickled_and_copied_with_its_options():
    attention = NystromAttention(12, 3, num_landmarks=7, pinv="ridge", landmarks="kmeans")
    x = torch.randn(2, 35, 12)
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(other(x), attention(x))
