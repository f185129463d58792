"""Defects found in other Nyström implementations, each a test that ours does not have it.

What a defect does to a layer is a function from ``attend(x, mask) -> output`` to whether the layer is right, so that it
can be turned on the peer as well; that of the padded batch, say, is False for transformers' Nyströmformer.
"""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nystrom import (
    EncoderConfig,
    MaskedLM,
    MultiheadAttention,
    NystromAttention,
    SequenceClassifier,
    _cpu,
    attention_factors,
    functional,
    iterative_pinv,
    nystrom_attention,
)
from nystrom.functional import INVERSES, LANDMARKS

F64 = torch.float64
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
Attend = Callable[[Tensor, Tensor | None], Tensor]

WIDTH, HEADS, LANDMARKS_PER_HEAD, LENGTH = 16, 4, 8, 64
SIZES = dict(vocab_size=31, embed_dim=WIDTH, num_layers=2, num_heads=HEADS, ffn_dim=20)


@pytest.fixture(autouse=True, params=["cpu", "plain"])
def _implementation(request, monkeypatch) -> None:
    """Everything twice: the code for eager CPU tensors, and that for everything else."""
    if request.param == "plain":
        monkeypatch.setattr(_cpu, "usable", lambda *tensors: False)


def layer(**options) -> NystromAttention:
    """Ours, with weights as large as trained ones: at their initial size many defects do not show."""
    module = NystromAttention(WIDTH, HEADS, **(dict(num_landmarks=LANDMARKS_PER_HEAD, conv_kernel_size=5) | options))
    return trained(module).double().eval()


def trained(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return module


def states(b: int = 3, n: int = LENGTH, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(b, n, WIDTH, dtype=F64).to(dtype)


def heads(n: int = LENGTH, d: int = 5, b: int = 2, h: int = HEADS) -> Tensor:
    return torch.randn(b, h, n, d, dtype=F64)


def prefix_mask(lengths: list[int], n: int = LENGTH) -> Tensor:
    return torch.arange(n) < torch.tensor(lengths)[:, None]


def near(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got.double(), want.double(), rtol=1e-5, atol=1e-6)


def takes_a_padded_batch(attend: Attend) -> bool:
    try:
        return bool(attend(states(), prefix_mask([64, 40, 9])).isfinite().all())
    except (RuntimeError, TypeError):
        return False


def padding_reaches_nothing(attend: Attend) -> bool:
    x, mask = states(), prefix_mask([64, 40, 9])
    before = attend(x, mask)
    return near(attend(x.masked_fill(~mask[..., None], 7.0), mask)[mask], before[mask])


def samples_are_apart(attend: Attend, n: int = LENGTH, gain: float = 3.0) -> bool:
    x = states(4, n)
    before = attend(x, None)[0]
    x[1:] = gain * torch.randn_like(x[1:])
    return near(attend(x, None)[0], before)


def full_mask_is_no_mask(attend: Attend, n: int = 61) -> bool:
    x = states(2, n)
    return near(attend(x, None), attend(x, prefix_mask([n, n], n)))


def runs_in(attend: Attend, dtype: torch.dtype) -> bool:
    try:
        out = attend(states(dtype=dtype), prefix_mask([64, 40, 9]))
    except (RuntimeError, TypeError):
        return False
    return out.dtype == dtype and bool(out.isfinite().all())


def varies_while_training(attend: Attend) -> bool:
    x = states()
    return not torch.equal(attend(x, None), attend(x, None))


# Hugging Face transformers, models/nystromformer


def test_hugging_face_runs_exact_attention_by_default():
    """The branch for exact attention is taken where two settings are equal, as they are in every released config."""
    model = MaskedLM(EncoderConfig(**SIZES)).eval()
    exact = MaskedLM(EncoderConfig(**SIZES, kind="softmax")).eval()
    exact.load_state_dict(trained(model).state_dict())
    for n in (64, 200):  # as many tokens as landmarks, and more
        ids = torch.randint(31, (2, n))
        assert not torch.allclose(model(ids).logits, exact(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [7, 64, 300])
def test_hugging_face_tests_never_reach_the_nystrom_branch(n):
    """The inverse was called 0 times for lengths 7, 64 and 300 in the model that the tests build."""
    inverse = mock.Mock(wraps=iterative_pinv)
    with mock.patch.dict(functional.INVERSES, iterative=inverse):
        MaskedLM(EncoderConfig(**SIZES))(torch.randint(31, (2, n)))
    assert inverse.call_count == SIZES["num_layers"]


def test_hugging_face_padded_batch_crashes():
    """The mask comes as (b, 1, n, n) and is added to scores of shape (b, h, m, n)."""
    assert takes_a_padded_batch(layer())
    x, mask = states(), prefix_mask([64, 40, 9])
    attend = layer()
    assert near(attend(x, mask[:, None, None].expand(3, 1, 64, 64))[mask], attend(x, mask)[mask])


def test_hugging_face_padding_is_averaged_into_landmarks():
    """Masked tokens enter the landmarks, the values and the convolution: their content moved valid outputs."""
    assert padding_reaches_nothing(layer())


@pytest.mark.parametrize("n", [16, 32, 64, 128])
def test_hugging_face_mixes_samples_at_other_lengths(n):
    """At n = seg_len / k a reshape moves tokens between samples wherever k divides the batch."""
    assert samples_are_apart(layer(), n, gain=1.0)


def test_hugging_face_output_depends_on_batch_mates():
    """The inverse starts from the largest column sum of the whole batch."""
    assert samples_are_apart(layer())


@pytest.mark.parametrize("pinv", INVERSES)
@pytest.mark.parametrize("landmarks", LANDMARKS)
def test_hugging_face_option_for_the_inverse_crashes(pinv, landmarks):
    """inv_coeff_init_option=True is a TypeError: a setting that nobody had ever run."""
    assert takes_a_padded_batch(layer(pinv=pinv, landmarks=landmarks))


@HALVES
def test_hugging_face_fails_in_half_precision(dtype):
    """The identity of the inverse iteration is float32 whatever the model is."""
    assert runs_in(layer().to(dtype), dtype)


@pytest.mark.parametrize("conv_kernel_size", [None, 1, 65])
def test_hugging_face_cannot_do_without_the_convolution(conv_kernel_size):
    """The config refuses None, which the code handles."""
    assert takes_a_padded_batch(layer(conv_kernel_size=conv_kernel_size))


@pytest.mark.unhooked
def test_hugging_face_even_convolution_fails_late():
    """An even kernel is an error of shapes in the forward pass."""
    with pytest.raises(ValueError, match=r"conv_kernel_size must be odd, .* got 64"):
        layer(conv_kernel_size=64)


def test_hugging_face_attention_dropout_has_no_effect():
    """The dropout module is built and never called."""
    assert varies_while_training(layer(dropout=0.5).train())
    assert not varies_while_training(layer(dropout=0.0).train())


def test_hugging_face_default_model_refuses_512_tokens():
    """The default number of positions is 510."""
    assert MaskedLM(EncoderConfig(**SIZES))(torch.randint(31, (1, 512))).logits.shape == (1, 512, 31)


@pytest.mark.unhooked
def test_hugging_face_fails_to_compile_and_export():
    """Tracing makes the n x n mask, and fails as the padded batch does."""
    torch._dynamo.reset()
    attend, x, mask = layer(), states(), prefix_mask([64, 40, 9])
    want = attend(x, mask)[mask]
    assert near(torch.compile(attend, fullgraph=True, backend="aot_eager")(x, mask)[mask], want)
    assert near(torch.export.export(attend, (x, mask)).module()(x, mask)[mask], want)


# mlpen, the authors' code


@pytest.mark.parametrize("n", [1, 5, 63, 200])
def test_mlpen_length_is_fixed_by_the_config(n):
    """The layer reads its length from the config, under a key that the benchmark's configs do not have."""
    model = MaskedLM(EncoderConfig(**SIZES, max_length=200, num_landmarks=LANDMARKS_PER_HEAD))
    assert model(torch.randint(31, (2, n))).logits.isfinite().all()


def test_mlpen_config_with_more_landmarks_than_tokens_fails():
    """nystrom-512 ships with 512 landmarks for 64 tokens, which cuts the tokens into segments of 0."""
    model = MaskedLM(EncoderConfig(**SIZES, max_length=64, num_landmarks=512))
    assert model(torch.randint(31, (2, 64)), prefix_mask([64, 9])).logits.isfinite().all()


def test_mlpen_inverse_starts_from_the_largest_norm_of_the_batch():
    """The exact start, each matrix's own norms, is behind a misspelt key."""
    matrices = torch.softmax(4 * torch.randn(3, 2, 8, 8, dtype=F64), -1)
    alone = iterative_pinv(matrices[:1])
    matrices[1:, :, :, 0] *= 50
    assert near(iterative_pinv(matrices)[:1], alone)


def test_mlpen_empty_landmarks_keep_weight():
    """Segments of padding alone drew 37% of the weight of `left`, and were inverted with the rest."""
    query, key = heads(), heads()
    key_mask = prefix_mask([64, 5])
    left, core_pinv, right = attention_factors(query, key, key_mask, num_landmarks=LANDMARKS_PER_HEAD)
    empty = slice(LANDMARKS_PER_HEAD - 5)  # the first ones: longer segments come last
    assert near(left.sum(-1), torch.ones(2, HEADS, LENGTH)) and (left[1, :, :, empty] == 0).all()
    assert (core_pinv[1, :, empty] == 0).all() and (core_pinv[1, :, :, empty] == 0).all()
    assert near(right.sum(-1), torch.ones(2, HEADS, LANDMARKS_PER_HEAD)) and (right[1, :, :, 5:] == 0).all()


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_mlpen_classifier_drops_the_mask(pooling):
    """ModelForSequenceClassification never hands its mask to the encoder."""
    model = trained(SequenceClassifier(EncoderConfig(**SIZES, num_landmarks=8), 3, pooling=pooling)).double().eval()
    ids, mask = torch.randint(31, (3, LENGTH)), prefix_mask([64, 40, 9])
    before = model(ids, mask).logits
    assert near(model(torch.where(mask, ids, 30 - ids), mask).logits, before)
    assert near(model(ids[1:2, :40]).logits, before[1:2])


@pytest.mark.parametrize("pinv", ["svd", "ridge"])
def test_mlpen_linear_attention_has_no_normaliser(pinv):
    """Values of 1 came out as 172, growing with the length."""
    for n in (LENGTH, 10 * LENGTH):
        query, key = heads(n), heads(n)
        ones = torch.ones_like(query)
        out = nystrom_attention(query, key, ones, num_landmarks=LANDMARKS_PER_HEAD, pinv=pinv)
        assert (out - 1).abs().mean() < 0.1


# lucidrains, nystrom-attention


@pytest.mark.parametrize("n", [5, 8, 61, 65])
def test_lucidrains_attends_to_its_own_padding(n):
    """Without a mask, the zeros that make n a multiple of m are landmarks and keys like any other."""
    assert full_mask_is_no_mask(layer(), n)


@pytest.mark.parametrize("n", [1, 5, 8])
def test_lucidrains_short_inputs_are_far_from_exact(n):
    """With a landmark per token or more, the result should be exact attention's as the inverse converges."""
    query, key, value = heads(n), heads(n), heads(n)
    exact = F.scaled_dot_product_attention(query, key, value)
    assert near(nystrom_attention(query, key, value, num_landmarks=8, num_pinv_iters=40), exact)


def test_lucidrains_output_depends_on_batch_mates():
    """As in the authors' code: one start of the inverse for the whole batch."""
    assert samples_are_apart(layer(), gain=5.0)


@HALVES
def test_lucidrains_fails_in_half_precision(dtype):
    """A module converted to half precision fails on the float32 identity."""
    assert runs_in(layer(conv_kernel_size=None).to(dtype), dtype)


def test_lucidrains_float_mask_is_a_type_error():
    """`~mask` on a float mask."""
    attend, x, mask = layer(), states(), prefix_mask([64, 40, 9])
    additive = torch.zeros(3, LENGTH).masked_fill(~mask, -torch.inf)
    assert torch.equal(attend(x, additive)[mask], attend(x, mask)[mask])


def test_lucidrains_empty_landmarks_spoil_the_inverse():
    """The uniform rows of empty landmarks in the core change the inverse of the real ones."""
    query, key, value = heads(b=1), heads(b=1), heads(b=1)
    few = nystrom_attention(query, key, value, prefix_mask([5]), num_landmarks=5)
    many = nystrom_attention(query, key, value, prefix_mask([5]), num_landmarks=40)
    assert near(many, few)


@pytest.mark.unhooked
@pytest.mark.parametrize("masked", [False, True])
def test_lucidrains_fails_to_export_any_length(masked):
    """A question about n % m pins the length."""
    attend = layer(dropout=0.0)
    length = torch.export.Dim("n", min=2, max=4096)
    arguments = (states(2, 61), prefix_mask([61, 20], 61)) if masked else (states(2, 61),)
    exported = torch.export.export(attend, arguments, dynamic_shapes=({1: length},) * len(arguments))
    for n in (5, 8, 300):
        arguments = (states(2, n), prefix_mask([n, 3], n)) if masked else (states(2, n),)
        real = arguments[1] if masked else prefix_mask([n, n], n)
        assert near(exported.module()(*arguments)[real], attend(*arguments)[real])


def test_lucidrains_has_no_cross_attention():
    """Queries, keys and values are projections of one tensor."""
    query, key, value = heads(20), heads(LENGTH), heads(LENGTH, d=3)
    out = nystrom_attention(query, key, value, prefix_mask([64, 30]), num_landmarks=LANDMARKS_PER_HEAD)
    assert out.shape == (2, HEADS, 20, 3) and out.isfinite().all()


def test_lucidrains_trimmed_the_padding_at_the_wrong_end():
    """Outputs, and maps made from them, were shifted against the tokens."""
    query, key, value = heads(61), heads(61), heads(61)
    before = nystrom_attention(query, key, value, num_landmarks=8, landmarks="strided")
    first_segment = F.pad(torch.randn(2, HEADS, 1, 5, dtype=F64), (0, 0, 0, 60))  # its middle token is not the first
    moved = nystrom_attention(query + first_segment, key, value, num_landmarks=8, landmarks="strided") - before
    assert (moved[:, :, 0].abs() > 0).any() and near(moved[:, :, 1:], torch.zeros_like(moved[:, :, 1:]))


# xFormers


@pytest.mark.unhooked
def test_xformers_causal_reads_the_future():
    """Two of three factors were unmasked and landmarks pooled the future: a causal call must be refused."""
    with pytest.raises(ValueError, match="is_causal must be False: got True"):
        nystrom_attention(heads(), heads(), heads(), is_causal=True)
    with pytest.raises(ValueError, match="vary by query"):
        layer()(states(), torch.ones(3, 1, LENGTH, LENGTH).tril().bool())


def test_xformers_reads_the_first_m_keys_alone():
    """The mask of `right` was triu(m, n): replacing every later value changed nothing."""
    query, key, value = heads(), heads(), heads()
    value.requires_grad_()
    out = nystrom_attention(query, key, value, num_landmarks=LANDMARKS_PER_HEAD)
    (gradient,) = torch.autograd.grad(out, value, torch.randn_like(out))
    assert (gradient.abs().amax(-1) > 0).all()


def test_xformers_fully_masked_sample_is_nan():
    """A softmax over nothing."""
    attend, x = layer(), states().requires_grad_()
    out = attend(x, prefix_mask([64, 0, 9]))
    (gradient,) = torch.autograd.grad(out[0].sum() + out[2, :9].sum(), x)
    assert out.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("lowest", [-1e9, -65504.0, torch.finfo(torch.float32).min, -torch.inf])
def test_xformers_finite_additive_mask_lets_padding_into_landmarks(lowest):
    """Only infinities were taken for masked."""
    attend, x, mask = layer(), states(), prefix_mask([64, 40, 9])
    additive = torch.zeros(3, 1, 1, LENGTH).masked_fill(~mask[:, None, None], lowest)
    assert torch.equal(attend(x, additive)[mask], attend(x, mask)[mask])
    assert padding_reaches_nothing(lambda x, mask: attend(x, additive))


def test_xformers_skip_connection_sees_padding():
    """The convolution ran over the values of masked tokens."""
    attend = layer(conv_kernel_size=33)
    nn.init.zeros_(attend.query.weight)  # so that the skip alone is under test
    assert padding_reaches_nothing(attend)


@pytest.mark.unhooked
def test_xformers_4d_input_attends_over_heads():
    """(b, n, h, d) was taken as it came, and attention ran over the heads of each token."""
    with pytest.raises(ValueError, match=r"x must be \(batch, length, 16\): got shape \(2, 4, 64, 4\)"):
        layer()(heads(d=4))
    with pytest.raises(ValueError, match="key length 4"):  # a mask tells the layouts apart
        tokens_first = heads().transpose(1, 2)
        nystrom_attention(tokens_first, tokens_first, tokens_first, prefix_mask([64, 9]))


def test_xformers_heads_are_apart():
    """What attends over heads would mix them."""
    query, key, value = heads(), heads(), heads()
    before = nystrom_attention(query, key, value, num_landmarks=LANDMARKS_PER_HEAD)
    for x in (query, key, value):
        x[:, 1] = 9.0
    after = nystrom_attention(query, key, value, num_landmarks=LANDMARKS_PER_HEAD)
    assert near(after[:, [0, 2, 3]], before[:, [0, 2, 3]]) and not near(after[:, 1], before[:, 1])


# Others


def test_tensorflow_port_masks_the_wrong_cells():
    """True and False were exchanged in two of the masks: masked keys must get nothing, all others something."""
    mask = prefix_mask([64, 40])
    value = heads().requires_grad_()
    out = nystrom_attention(heads(), heads(), value, mask, num_landmarks=LANDMARKS_PER_HEAD)
    (gradient,) = torch.autograd.grad(out, value, torch.randn_like(out))
    read = gradient.abs().amax(-1) > 0
    assert torch.equal(read, mask[:, None].expand_as(read))


@pytest.mark.parametrize(("width", "num_heads"), [(12, 2), (15, 5), (7, 7), (9, 1)])
def test_tensorflow_port_convolution_wants_heads_squared_wide_heads(width, num_heads):
    """The convolution ran over the wrong axis, with heads² filters."""
    attend = NystromAttention(width, num_heads, num_landmarks=8, conv_kernel_size=3)
    assert attend.conv.weight.shape == (num_heads, 1, 3, 1)
    assert attend(torch.randn(2, 61, width)).shape == (2, 61, width)


@pytest.mark.parametrize("num_landmarks", [65, 100])
def test_flash_nystrom_is_another_method_above_64_landmarks(num_landmarks):
    """Its kernel stops at 64 landmarks and at head widths of 64 and 128."""
    query, key, value = heads(300, d=40), heads(300, d=40), heads(300, d=40)
    left, core_pinv, right = attention_factors(query, key, num_landmarks=num_landmarks)
    want = left @ core_pinv @ right @ value
    assert near(nystrom_attention(query, key, value, num_landmarks=num_landmarks), want)


def test_fast_nystrom_attention_ignores_its_arguments():
    """attn_mask, dropout_p and is_causal were accepted and had no effect."""
    query, key, value = heads(), heads(), heads()
    plain = nystrom_attention(query, key, value, num_landmarks=8)
    for arguments in (dict(attn_mask=prefix_mask([40, 40])), dict(dropout_p=0.5), dict(scale=0.1)):
        assert not near(nystrom_attention(query, key, value, **arguments, num_landmarks=8), plain)
    with pytest.raises(ValueError):
        nystrom_attention(query, key, value, is_causal=True)


def test_fast_nystrom_attention_projects_keys_and_values_from_the_query():
    """Its MultiheadAttention never read its second and third argument."""
    attend = trained(MultiheadAttention(WIDTH, HEADS, num_landmarks=8, batch_first=True)).double().eval()
    query, key, value = states().unbind(0)
    before = attend(query[None], key[None], value[None])[0]
    assert not near(attend(query[None], key[None] + value, value[None])[0], before)
    assert not near(attend(query[None], key[None], 2 * value[None])[0], before)
