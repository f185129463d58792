"""On a GPU: every attention gives what it gives on a CPU, in every precision, with gradients; a run trains."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nystrom import (
    NystromAttention,
    additive_shift_attention,
    nystrom_attention,
    residual_nystrom_attention,
    spectral_shift_attention,
)
from nystrom.baselines import (
    BigBirdAttention,
    LinformerAttention,
    PerformerAttention,
    ReformerAttention,
    SkyformerAttention,
    linear_attention,
    window_attention,
)
from nystrom.convolution import TokenConvolution
from nystrom.recipes import lra

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # torch's own, of the first product of a process
]

H, D = 3, 16
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "nystrom": partial(nystrom_attention, num_landmarks=16),
    "chebyshev": partial(nystrom_attention, num_landmarks=16, pinv="chebyshev"),
    "ridge": partial(nystrom_attention, num_landmarks=16, pinv="ridge"),
    "strided": partial(nystrom_attention, num_landmarks=16, landmarks="strided"),
    "kmeans": partial(nystrom_attention, num_landmarks=16, landmarks="kmeans"),
    "shift": partial(spectral_shift_attention, num_landmarks=16),
    "additive-shift": partial(additive_shift_attention, num_landmarks=16),
    "residual": partial(residual_nystrom_attention, num_landmarks=16, top_k=32, window=16, block=16),
    "bigbird": BigBirdAttention(16, 2).eval(),
    "linear": linear_attention,
    "linformer": LinformerAttention(H, 256, 32).eval(),
    "performer": PerformerAttention(D, 64).eval(),
    "skyformer": SkyformerAttention(32).eval(),
    "window": partial(window_attention, window=32, num_global=2),
}


@pytest.fixture(params=FUNCTIONS)
def attend(request) -> Callable[..., Tensor]:
    return FUNCTIONS[request.param]


def on(attend: Callable[..., Tensor], device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The attention there; in half precision with float32 parameters, as autocast has it."""
    if isinstance(attend, nn.Module):
        return attend.to(device, dtype if dtype == torch.float64 else torch.float32)
    return attend


def inputs(n: int = 200, dtype: torch.dtype = torch.float64) -> tuple[tuple[Tensor, ...], Tensor]:
    """query, key, value, rounded to the dtype, and a mask: whole, padded, with a gap."""
    qkv = tuple(torch.randn(3, H, n, D).to(dtype) for _ in range(3))
    mask = torch.arange(n) < torch.tensor([n, n // 2, n - 7])[:, None]
    mask[2, 20:31] = False
    return qkv, mask


def run(attend: Callable[..., Tensor], qkv: tuple[Tensor, ...], mask: Tensor | None, weight: Tensor) -> list[Tensor]:
    """The output at real tokens, and the gradients."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attend(*leaves, mask)
    if mask is not None:
        out = out * mask[:, None, :, None]
    return [out, *torch.autograd.grad(out, leaves, weight)]


@pytest.mark.parametrize("masked", [False, True])
def test_the_cpus_numbers_and_gradients(attend, masked):
    qkv, mask = inputs()
    given, weight = mask if masked else None, torch.randn_like(qkv[2])
    want = run(on(attend, "cpu", torch.float64), qkv, given, weight)
    got = run(
        on(attend, "cuda", torch.float64),
        tuple(x.cuda() for x in qkv),
        given if given is None else given.cuda(),
        weight.cuda(),
    )
    for one, other in zip(got, want, strict=True):
        assert one.device.type == "cuda"
        torch.testing.assert_close(one.cpu(), other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("n", [200, 203])  # a multiple of eight, which the fused kernels' masks ask for, and not
def test_gradients_of_the_fused_kernels(attend, n):
    """float64 runs torch's plain kernel; float32, what models train in, runs its fused ones."""
    qkv, mask = inputs(n, dtype=torch.float32)
    weight = torch.randn_like(qkv[2])
    want = run(on(attend, "cpu", torch.float64), tuple(x.double() for x in qkv), mask, weight.double())
    got = run(on(attend, "cuda", torch.float32), tuple(x.cuda() for x in qkv), mask.cuda(), weight.cuda())
    for one, other in zip(got, want, strict=True):
        assert (one.cpu() - other).norm() / other.norm() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions(attend, dtype):
    """Computed in float32 from the rounded inputs, and rounded once at the end."""
    qkv, mask = inputs(dtype=dtype)
    want = on(attend, "cpu", torch.float32)(*(x.float() for x in qkv), mask)
    got = on(attend, "cuda", dtype)(*(x.cuda() for x in qkv), mask.cuda())
    assert got.dtype == dtype
    mine, theirs = (x.float().cpu()[mask[:, None].expand(-1, H, -1)] for x in (got, want))
    assert (mine - theirs).norm() / theirs.norm() < max(1e-4, torch.finfo(dtype).eps)


def test_autocast_changes_only_the_last_rounding(attend):
    qkv, mask = inputs(dtype=torch.bfloat16)
    here, qkv, mask = on(attend, "cuda", torch.bfloat16), tuple(x.cuda() for x in qkv), mask.cuda()
    want = here(*qkv, mask)
    with torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(here(*qkv, mask), want)


def test_reformer_runs():
    """Sorting may break ties otherwise on a GPU, so that its choice of keys is checked on a CPU alone."""
    attend, (qkv, mask) = ReformerAttention(2, 16).cuda(), inputs(dtype=torch.float32)
    query, _, value = (x.cuda() for x in qkv)
    assert attend(query, query, value, mask.cuda()).isfinite().all()


@pytest.mark.parametrize("kernel", [1, 3, 35])
def test_convolution(kernel):
    conv = TokenConvolution(H, kernel).double()
    value, weight = (torch.randn(2, H, 150, D, dtype=torch.float64) for _ in range(2))
    results = []
    for device in ("cpu", "cuda"):
        conv, leaf = conv.to(device), value.to(device).requires_grad_()
        out = conv(leaf)
        results.append([out, *torch.autograd.grad(out, [leaf, conv.weight], weight.to(device))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other.cpu(), one)


@pytest.mark.unhooked
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32")  # of torch's own compiler
@pytest.mark.parametrize("kind", ["nystrom", "shift", "residual", "softmax"])
def test_compiled_layer(kind):
    layer = NystromAttention(48, 3, kind=kind, num_landmarks=16).cuda()
    x, mask = torch.randn(2, 300, 48, device="cuda"), (torch.arange(300) < torch.tensor([[300], [211]])).cuda()
    want = layer(x, mask)
    got = torch.compile(layer, fullgraph=True)(x, mask)
    torch.testing.assert_close(got[mask], want[mask], rtol=1e-3, atol=1e-4)
    got[mask].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_no_form_keeps_the_matrix():
    """At 32768 tokens one head's matrix would take 4 GiB."""
    qkv = tuple(torch.randn(1, 2, 32768, 32, device="cuda", requires_grad=True) for _ in range(3))
    for attend in (nystrom_attention, spectral_shift_attention, residual_nystrom_attention):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend(*qkv).sum().backward()
        assert torch.cuda.max_memory_allocated() - before < 2**31


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["nystrom", "nystrom_residual", "linformer"])
def test_a_run_trains(kind, precision, tmp_path: Path):
    table = "".join(f"[MAX {i % 7} {i % 10} ]\t{max(i % 7, i % 10)}\n" for i in range(64))
    for split in ("train", "val", "test"):
        (tmp_path / f"basic_{split}.tsv").write_text("Source\tTarget\n" + table)
    config = lra.ListOps(
        attention=kind, data=tmp_path, out=tmp_path / "out", steps=8, batch_size=8, precision=precision
    )
    found = lra.train(config)
    assert found["steps"] == 8
    assert found["peak_memory"] > 0
    assert lra.train(replace(config, resume=True)) == found
