"""The convolution skip: torch's own by another way, for any length, type and derivative."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nystrom.convolution import TokenConvolution


def torchs(conv: TokenConvolution) -> nn.Conv2d:
    """The same with torch's own forward."""
    window = conv.kernel_size
    made = nn.Conv2d(conv.groups, conv.groups, window, padding="same", groups=conv.groups, bias=False)
    made = made.to(conv.weight)
    made.load_state_dict(conv.state_dict())
    return made


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("kernel", [1, 3, 35, 151])
def test_it_is_torchs_convolution(n, kernel):
    conv = TokenConvolution(3, kernel).double()
    value = torch.randn(2, 3, n, 5, dtype=torch.float64)
    for given in (value, torch.randn(2, n, 3, 5, dtype=torch.float64).transpose(1, 2), value.expand(2, 3, n, 5)):
        one, two = (given.clone().requires_grad_() for _ in range(2))
        other = torchs(conv)
        got, want = conv(one), other(two)
        torch.testing.assert_close(got, want)
        grad = torch.randn_like(want)
        got.backward(grad)
        want.backward(grad)
        torch.testing.assert_close(one.grad, two.grad)
        torch.testing.assert_close(conv.weight.grad, other.weight.grad)
        conv.zero_grad()


def test_second_derivatives():
    conv = TokenConvolution(2, 3).double()
    value = torch.randn(1, 2, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(conv, {"weight": w}, x), (value, conv.weight)
    )
    assert torch.autograd.gradgradcheck(
        lambda x, w: torch.func.functional_call(conv, {"weight": w}, x), (value, conv.weight)
    )


def test_the_products_run_where_they_can(monkeypatch):
    conv, value = TokenConvolution(2, 35), torch.randn(1, 2, 70, 4)
    want = conv(value)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Conv2d, "forward", lambda *_: pytest.fail("torch's convolution ran"))
        torch.testing.assert_close(conv(value), want)
    mapped = torch.func.vmap(conv)(value.expand(3, -1, -1, -1, -1))  # not there
    torch.testing.assert_close(mapped, want.expand(3, -1, -1, -1, -1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    conv, value = TokenConvolution(2, 35), torch.randn(2, 2, 100, 8)
    exact = conv(value)
    half = copy.deepcopy(conv).to(dtype)(value.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, atol=0.02, rtol=0.02)
    with torch.autocast("cpu", dtype):
        mixed = conv(value)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.float(), exact, atol=0.02, rtol=0.02)


def test_hooks_and_the_state_dict_are_those_of_any_module():
    conv, seen = TokenConvolution(2, 3), []
    conv.register_forward_hook(lambda *_: seen.append(1))
    conv(torch.randn(1, 2, 4, 3))
    assert seen == [1] and {name: tuple(x.shape) for name, x in conv.state_dict().items()} == {"weight": (2, 1, 3, 1)}
    with pytest.raises(ValueError, match="conv_kernel_size must be odd, so that it has a centre, or None: got 4"):
        TokenConvolution(2, 4)


def test_ends_read_zeros():
    conv = TokenConvolution(1, 5)
    with torch.no_grad():
        conv.weight.fill_(1.0)
    out = conv(torch.ones(1, 1, 70, 1)).flatten()
    want = F.conv1d(torch.ones(1, 1, 70), torch.ones(1, 1, 5), padding=2).flatten()
    torch.testing.assert_close(out, want)
    assert out[:3].tolist() == [3, 4, 5] and out[-2:].tolist() == [4, 3]
