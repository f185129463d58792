"""What all the attention kinds we compare with promise alike: masks, batch mates, lengths, precision, memory, seeds."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nystrom.baselines import (
    BigBirdAttention,
    LinformerAttention,
    PerformerAttention,
    PerformerReLUAttention,
    ReformerAttention,
    SkyformerAttention,
    linear_attention,
    window_attention,
)

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
H, D, V = 3, 5, 7
MAKE: dict[str, Callable[[], Attend]] = {  # all small, so that even short inputs are approximated
    "bigbird": lambda: BigBirdAttention(4, 2).eval(),
    "linear": lambda: linear_attention,
    "linformer": lambda: LinformerAttention(H, 70, 6).eval(),
    "performer": lambda: PerformerAttention(D, 11).eval(),
    "performer-relu": lambda: PerformerReLUAttention(D, 11).eval(),
    "reformer": lambda: own_keys(ReformerAttention(2, 4).eval()),
    "skyformer": lambda: SkyformerAttention(9).eval(),
    "window": lambda: partial(window_attention, window=6, num_global=2),
}
NORMALISED = sorted(MAKE.keys() - {"linformer", "skyformer"})  # weights that sum to one over the tokens
WITHOUT_PLACES = sorted(MAKE.keys() - {"bigbird", "linformer", "window"})  # only the order of the tokens counts
MODULES = {
    "linformer": lambda: LinformerAttention(H, 70, 6),
    "performer": lambda: PerformerAttention(D, 11),
    "performer-relu": lambda: PerformerReLUAttention(D, 11),
}


def own_keys(attend: ReformerAttention) -> Attend:
    return lambda query, key, value, mask: attend(query, query, value, mask)


@pytest.fixture(params=MAKE)
def attend(request) -> Attend:
    return MAKE[request.param]()


def tokens(b: int, n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.randn(b, H, n, width, dtype=dtype) for width in (D, D, V))
    return query, key, value


def padded(x: Tensor, n: int, fill: float) -> Tensor:
    return torch.cat([x, x.new_full((*x.shape[:2], n - x.shape[2], x.shape[3]), fill)], 2)


@pytest.mark.parametrize("fill", [torch.nan, 1e4])
def test_padding_and_batch_mates_change_nothing(attend, fill):
    """Samples of 37 and 22 tokens, alone and then together, padded to 53 with what must not be read."""
    alone = [[x.requires_grad_() for x in tokens(1, n)] for n in (37, 22)]
    outs = [attend(*sample, None) for sample in alone]
    upstream = torch.randn(2, H, 53, V, dtype=torch.float64)
    for i, out in enumerate(outs):
        out.backward(upstream[i : i + 1, :, : out.shape[2]])
    together = [
        torch.cat([padded(sample[i].detach(), 53, fill) for sample in alone]).requires_grad_() for i in range(3)
    ]
    mask = torch.arange(53) < torch.tensor([[37], [22]])
    out = attend(*together, mask)
    out.backward(upstream)
    for i, sample in enumerate(alone):
        n = sample[0].shape[2]
        torch.testing.assert_close(out[i : i + 1, :, :n], outs[i], rtol=0, atol=1e-11)
        assert (out[i, :, n:] == 0).all()
        for x, whole in zip(sample, together, strict=True):
            if x.grad is None:  # Reformer's key
                continue
            assert whole.grad is not None
            torch.testing.assert_close(whole.grad[i : i + 1, :, :n], x.grad, rtol=0, atol=1e-10)
            assert (whole.grad[i, :, n:] == 0).all()


@pytest.mark.parametrize("name", WITHOUT_PLACES)
def test_masked_tokens_anywhere_are_as_if_left_out(name):
    query, key, value = tokens(1, 31)
    mask = torch.rand(1, 31) < 0.6
    left = (x[:, :, mask[0]] for x in (query, key, value))
    attend = MAKE[name]()
    torch.testing.assert_close(attend(query, key, value, mask)[:, :, mask[0]], attend(*left, None))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_sample_without_tokens_is_zero(attend, monkeypatch):
    """Without a NaN on the way, and without asking a fused kernel what a query reads that may read nothing."""
    kernel = F.scaled_dot_product_attention

    def asked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is None or mask.any(-1).all()
        return kernel(query, key, value, mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", asked)
    inputs = [x.requires_grad_() for x in tokens(2, 13)]
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[1, :9] = True
    with torch.autograd.set_detect_anomaly(True):
        out = attend(*inputs, mask)
        out.square().sum().backward()
    assert (out[0] == 0).all() and out[1, :, :9].abs().amin() > 0
    for x in inputs:
        assert x.grad is None or (x.grad.isfinite().all() and (x.grad[0] == 0).all())


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 12, 13, 31])
def test_any_length(attend, n):
    query, key, value = tokens(1, n)
    out = attend(query, key, value, None)
    torch.testing.assert_close(attend(query, key, value, torch.ones(1, n, dtype=torch.bool)), out)
    assert out.shape == value.shape and out.isfinite().all() and out.abs().amin() > 0


@pytest.mark.parametrize("name", NORMALISED)
@pytest.mark.parametrize("n", [1, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_sum_to_one(name, n, dtype):
    query, key, value = tokens(2, n, dtype)
    mask = torch.rand(2, n) < 0.7
    mask[:, 0] = True
    out = MAKE[name]()(query, key, torch.ones_like(value), mask)
    torch.testing.assert_close(out, mask[:, None, :, None].expand_as(out).to(out))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_single_precision(attend, dtype):
    inputs = tokens(2, 29, dtype)
    mask = torch.arange(29) < torch.tensor([[29], [20]])
    out = attend(*inputs, mask)
    assert out.dtype == dtype
    assert torch.equal(out, attend(*(x.float() for x in inputs), mask).to(dtype))
    with torch.autocast("cpu", dtype):
        assert torch.equal(attend(*inputs, mask), out)


def test_any_device(attend):
    """Random numbers are drawn on the CPU: none may stay there."""
    if isinstance(attend, nn.Module):
        attend.to("meta")
    query, key, value = (x.to("meta") for x in tokens(2, 29))
    for mask in (None, torch.ones(2, 29, dtype=torch.bool, device="meta")):
        out = attend(query, key, value, mask)
        assert out.shape == value.shape and out.device.type == "meta"


@pytest.mark.parametrize("name", [*MAKE, "exact"])
def test_memory_saved_for_the_backward_pass_is_linear(name):
    def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return (query @ key.mT).softmax(-1) @ value

    make = MAKE | {"linformer": lambda: LinformerAttention(H, 1024, 6), "exact": lambda: exact}
    sizes = []
    for n in (512, 1024):
        kept: dict[int, int] = {}

        def pack(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        attend = make[name]()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = attend(*(x.requires_grad_() for x in tokens(1, n, torch.float32)), torch.ones(1, n, dtype=torch.bool))
        sizes.append(sum(kept.values()))
        assert out.requires_grad
    ratio = sizes[1] / sizes[0]
    assert 3.5 < ratio < 4 if name == "exact" else 1.5 < ratio < 2.1


@pytest.mark.unhooked
def test_gradients(attend):
    query, key, value = (x.requires_grad_() for x in tokens(1, 19))
    mask = torch.arange(19)[None] != 11
    assert torch.autograd.gradcheck(lambda *inputs: attend(*inputs, mask), (query, key, value), fast_mode=True)


@pytest.mark.parametrize("make", [partial(ReformerAttention, 1, 4), partial(SkyformerAttention, 9)])
def test_chance_is_fixed_in_evaluation_and_new_in_training(make):
    """And in training it follows torch's global generator."""
    query, _, value = tokens(1, 40)
    same, other, module = make().eval(), make(seed=1).eval(), make().eval()
    first = module(query, query, value)
    assert torch.equal(first, module(query, query, value)) and torch.equal(first, same(query, query, value))
    assert not torch.equal(first, other(query, query, value))
    module.train()
    torch.manual_seed(3)
    outs = [module(query, query, value) for _ in range(2)]
    torch.manual_seed(3)
    assert torch.equal(outs[0], module(query, query, value))
    assert not torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("name", MODULES)
def test_what_is_learned_or_drawn_is_in_the_state_dict(name):
    module, copy = MODULES[name](), MODULES[name]()
    kept = "projection" if name == "linformer" else "features"
    assert list(module.state_dict()) == [kept]
    assert [x.requires_grad for x in module.parameters()] == [True] * (name == "linformer")
    with torch.no_grad():
        getattr(module, kept).normal_()
    inputs = tokens(1, 20)
    assert not torch.equal(copy(*inputs), module(*inputs))
    copy.load_state_dict(module.state_dict())
    assert torch.equal(copy(*inputs), module(*inputs))


@pytest.mark.parametrize("make", [PerformerAttention, PerformerReLUAttention])
def test_performers_features_come_from_a_seed(make):
    first, same, other = make(D, 11), make(D, 11), make(D, 11, seed=1)
    assert torch.equal(first.features, same.features) and not torch.equal(first.features, other.features)
    held = first.features
    first.redraw(torch.Generator().manual_seed(1))
    assert torch.equal(first.features, other.features) and first.features is held


@pytest.mark.unhooked
def test_wrong_inputs_are_refused(attend):
    query, key, value = tokens(2, 13)
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(b, n\) = \(2, 13\).*got torch.int64"):
        attend(query, key, value, torch.ones(2, 13, dtype=torch.long))
    with pytest.raises(ValueError, match=r"must share heads and length: .*value \(2, 3, 12, 7\)"):
        attend(query, key, value[:, :, 1:], None)


@pytest.mark.unhooked
def test_a_key_of_another_length_is_refused():
    query, key, value = tokens(2, 13)
    with pytest.raises(ValueError, match="as many keys as queries: got 12 and 13"):
        linear_attention(query, key[:, :, 1:], value[:, :, 1:])


@pytest.mark.unhooked
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: BigBirdAttention(0), "block must be at least 1 and num_random at least 0: got 0 and 3"),
        (lambda: BigBirdAttention(4, -1), "got 4 and -1"),
        (lambda: LinformerAttention(2, 0), "must be at least 1: got 2, 0 and 256"),
        (lambda: PerformerAttention(0), "head_dim and num_features must be at least 1: got 0 and 256"),
        (lambda: PerformerReLUAttention(4, 0), "got 4 and 0"),
        (lambda: ReformerAttention(0), "num_hashes and chunk_length must be at least 1: got 0 and 64"),
        (lambda: SkyformerAttention(0), "ridge positive: got 0, 6 and 0.1"),
        (lambda: SkyformerAttention(ridge=0.0), "got 128, 6 and 0.0"),
        (lambda: window_attention(*tokens(1, 4), window=7), "window must be even and at least 2.*got 7 and 1"),
        (lambda: window_attention(*tokens(1, 4), window=0), "got 0 and 1"),
        (lambda: window_attention(*tokens(1, 4), num_global=-1), "got 512 and -1"),
        (lambda: LinformerAttention(H, 3)(*tokens(1, 4)), "3 heads and up to 3 tokens: got 3 heads, 4 tokens"),
        (lambda: LinformerAttention(2, 9)(*tokens(1, 4)), "2 heads and up to 9 tokens: got 3 heads"),
        (lambda: PerformerAttention(4)(*tokens(1, 4)), "heads of width 4: got 5"),
        (lambda: PerformerReLUAttention(4)(*tokens(1, 4)), "heads of width 4: got 5"),
        (lambda: ReformerAttention()(*tokens(1, 4)), "no keys of its own"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_modules_have_no_other_state():
    for make in (BigBirdAttention, ReformerAttention, SkyformerAttention):
        module = make()
        assert isinstance(module, nn.Module) and not module.state_dict()
