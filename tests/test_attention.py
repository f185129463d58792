"""The module: projections, the skip, masks, both kinds."""

import pytest
import torch
import torch.nn.functional as F

from nystrom import NystromAttention, nystrom_attention

SIZES = dict(embed_dim=12, num_heads=3)


def test_settings_reach_the_op():
    x = torch.randn(2, 29, 12, dtype=torch.float64)
    base = module()
    for changes in (dict(num_landmarks=9), dict(num_pinv_iters=3)):
        other = module(**changes)
        other.load_state_dict(base.state_dict())
        assert not torch.allclose(other(x), base(x))
    assert [name for name in module(bias=False).state_dict() if "bias" in name] == []
    assert "conv.weight" not in module(conv_kernel_size=None).state_dict()


def module(**options) -> NystromAttention:
    return NystromAttention(**(SIZES | dict(num_landmarks=5) | options)).double().eval()


def prefix_mask(lengths: list[int], n: int) -> torch.Tensor:
    return torch.arange(n) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("kind", ["nystrom", "softmax"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_its_formula(kind, masked):
    attention = module(kind=kind, conv_kernel_size=7)
    x = torch.randn(2, 29, 12, dtype=torch.float64)
    mask = prefix_mask([29, 11], 29) if masked else torch.ones(2, 29, dtype=torch.bool)
    query, key, value = (
        torch.einsum("bnc,kc->bnk", x, p.weight).add(p.bias).view(2, 29, 3, 4).permute(0, 2, 1, 3)
        for p in (attention.query, attention.key, attention.value)
    )
    if kind == "nystrom":
        attended = nystrom_attention(query, key, value, mask, num_landmarks=5)
    else:
        attended = F.scaled_dot_product_attention(query, key, value, mask[:, None, None])
    assert attention.conv is not None
    for i in range(29):  # the skip, written as a sum over the tokens in reach
        for j in range(max(0, i - 3), min(29, i + 4)):
            weight = attention.conv.weight[:, 0, j - i + 3, 0]
            attended[:, :, i] += weight[:, None] * value[:, :, j] * mask[:, None, j, None]
    want = attention.out(attended.permute(0, 2, 1, 3).reshape(2, 29, 12))
    torch.testing.assert_close(attention(x, mask if masked else None)[mask], want[mask], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["nystrom", "softmax"])
def test_padding_reaches_no_valid_output(kind):
    attention = module(kind=kind, conv_kernel_size=9)
    x = torch.randn(2, 29, 12, dtype=torch.float64)
    mask = prefix_mask([29, 11], 29)
    before = attention(x, mask)
    x[1, 11:] = 1e6
    assert torch.equal(attention(x, mask)[mask], before[mask])
    torch.testing.assert_close(attention(x[1:, :11])[0], before[1, :11], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["nystrom", "softmax"])
def test_dropout_only_while_training(kind):
    attention = module(dropout=0.5, kind=kind)
    x = torch.randn(2, 29, 12, dtype=torch.float64)
    assert torch.equal(attention(x), attention(x))
    attention.train()
    assert not torch.equal(attention(x), attention(x))


def test_both_kinds_share_their_weights():
    nystrom, softmax = module(kind="nystrom"), module(kind="softmax")
    softmax.load_state_dict(nystrom.state_dict())
    assert sorted(nystrom.state_dict()) == sorted(
        ["conv.weight"] + [f"{name}.{part}" for name in ("query", "key", "value", "out") for part in ("weight", "bias")]
    )


def test_every_weight_gets_a_gradient():
    attention = module()
    attention(torch.randn(2, 29, 12, dtype=torch.float64)).square().sum().backward()
    for name, parameter in attention.named_parameters():
        # A shift of all keys changes nothing, so key.bias has no gradient: its rounding is all there is.
        assert parameter.grad is not None and (parameter.grad.abs().max() > 1e-9) == (name != "key.bias"), name


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_heads=5), "embed_dim must be a positive multiple of num_heads: got 12 and 5"),
        (dict(num_heads=0), "embed_dim must be a positive multiple of num_heads: got 12 and 0"),
        (dict(conv_kernel_size=-1), "conv_kernel_size must be odd, .* got -1"),
        (dict(num_landmarks=0), "num_landmarks must be an integer of at least 1: got 0"),
        (dict(dropout=1.0), r"dropout_p must be in \[0, 1\): got 1.0"),
        (dict(conv_kernel_size=4), "conv_kernel_size must be odd, .* got 4"),
        (dict(kind="linear"), "kind must be 'nystrom', 'softmax', 'shift' or 'residual': got 'linear'"),
    ],
)
def test_refuses_with_the_values(changes, message):
    with pytest.raises(ValueError, match=message):
        module(**changes)


@pytest.mark.unhooked
def test_refuses_states_of_another_shape():
    with pytest.raises(ValueError, match=r"x must be \(batch, length, 12\): got shape \(2, 29\)"):
        module()(torch.randn(2, 29).double())


@pytest.mark.unhooked
def test_refuses_a_mask_that_varies_by_query():
    with pytest.raises(ValueError, match=r"got shape \(2, 1, 29, 29\) .* vary by query"):
        module()(torch.randn(2, 29, 12).double(), torch.ones(2, 1, 29, 29).tril().bool())
