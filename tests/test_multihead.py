"""The drop-in for torch.nn.MultiheadAttention: against torch's own module, and inside torch's own layers."""

import doctest

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nystrom.multihead
import reference
from nystrom.multihead import MultiheadAttention

F64 = torch.float64
KINDS = {
    "packed": dict(),
    "separate": dict(kdim=10, vdim=7),
    "without bias": dict(bias=False),
    "separate without bias": dict(kdim=10, bias=False),
}
NESTED_WARNING = "ignore:The PyTorch API of nested tensors:UserWarning"  # torch's, from its own conversion


def pair(**options) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Ours and torch's, with the same weights, large enough that attention is uneven and well-conditioned."""
    ours_only = {name: options.pop(name) for name in ("num_landmarks", "num_pinv_iters") if name in options}
    theirs = nn.MultiheadAttention(12, 3, dtype=F64, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    ours = MultiheadAttention(12, 3, dtype=F64, **options, **ours_only)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


def states(b: int, n: int, s: int, kdim: int = 12, vdim: int = 12) -> tuple[torch.Tensor, ...]:
    return torch.randn(b, n, 12, dtype=F64), torch.randn(b, s, kdim, dtype=F64), torch.randn(b, s, vdim, dtype=F64)


def padding(lengths: list[int], n: int) -> torch.Tensor:
    """True = IGNORE, as torch has it."""
    return torch.arange(n) >= torch.tensor(lengths)[:, None]


def additive(ignore: torch.Tensor, low: float = float("-inf")) -> torch.Tensor:
    return torch.zeros_like(ignore, dtype=F64).masked_fill(ignore, low)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_parameters_are_torchs(options):
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(12, 3, **options)
    torch.manual_seed(3)
    ours = MultiheadAttention(12, 3, **options)
    mine, wanted = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(wanted)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
    nn.MultiheadAttention(12, 3, **options).load_state_dict(mine)
    ours.load_state_dict(wanted)


# With every token a landmark and a converged inverse the approximation is exact, so torch's module is the oracle.
EXACT = dict(num_landmarks=64, num_pinv_iters=60)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masked", [None, "bool", "float", "finite"])
@pytest.mark.parametrize("average", [False, True])
def test_equals_torch_where_landmarks_are_tokens(options, batch_first, masked, average):
    ours, theirs = pair(batch_first=batch_first, **options, **EXACT)
    query, key, value = states(2, 9, 13, options.get("kdim", 12), options.get("vdim", 12))
    ignore = padding([13, 6], 13)
    mask = {None: None, "bool": ignore, "float": additive(ignore), "finite": additive(ignore, -1e9)}[masked]
    if not batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    got, weights = ours(query, key, value, mask, average_attn_weights=average)
    want, wanted_weights = theirs(query, key, value, mask, average_attn_weights=average)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-6, atol=1e-6)
    assert ours(query, key, value, mask, need_weights=False)[1] is None


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_unbatched_equals_torch(average, masked):
    ours, theirs = pair(**EXACT)
    query, key, value = (x[0] for x in states(1, 9, 13))
    mask = padding([6], 13)[0] if masked else None
    got, weights = ours(query, key, value, mask, average_attn_weights=average)
    want, wanted_weights = theirs(query, key, value, mask, average_attn_weights=average)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["(n, s)", "(b h, n, s)", "additive (n, s)"])
@pytest.mark.parametrize("padded", [False, True])
def test_attn_mask_that_is_a_key_mask_is_obeyed_as_in_torch(form, padded):
    ours, theirs = pair(batch_first=True, **EXACT)
    query, key, value = states(2, 9, 13)
    ignore = torch.zeros(9, 13, dtype=torch.bool)
    ignore[:, 3:5] = True
    mask = {"(n, s)": ignore, "(b h, n, s)": ignore.repeat(6, 1, 1), "additive (n, s)": additive(ignore)}[form]
    pad = padding([13, 6], 13) if padded else None
    if pad is not None and mask.is_floating_point():
        pad = additive(pad)
    got, weights = ours(query, key, value, pad, attn_mask=mask)
    want, wanted_weights = theirs(query, key, value, pad, attn_mask=mask)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-6, atol=1e-6)


def heads_of(module: nn.MultiheadAttention, x: torch.Tensor, part: int) -> torch.Tensor:
    """(b, n, 12) -> (b, 3, n, 4): queries (part 0), keys or values of a packed module."""
    rows = slice(12 * part, 12 * (part + 1))
    projected = torch.einsum("bnc,kc->bnk", x, module.in_proj_weight[rows]) + module.in_proj_bias[rows]
    return projected.view(*x.shape[:2], 3, 4).permute(0, 2, 1, 3)


def by_formula(theirs: nn.MultiheadAttention, x: torch.Tensor, keep: torch.Tensor | None, m: int, iters: int):
    """Self-attention through the independent reference."""
    query, key, value = (heads_of(theirs, x, part) for part in range(3))
    attended = reference.nystrom_attention(query, key, value, keep, num_landmarks=m, num_iters=iters)
    return theirs.out_proj(attended.permute(0, 2, 1, 3).reshape(x.shape))


@pytest.mark.parametrize("iters", [4, 6])
def test_few_landmarks_equal_the_formula(iters):
    ours, theirs = pair(batch_first=True, num_landmarks=5, num_pinv_iters=iters)
    x = torch.randn(2, 29, 12, dtype=F64)
    ignore = padding([29, 11], 29)
    want = by_formula(theirs, x, ~ignore, 5, iters)
    got, weights = ours(x, x, x, ignore, average_attn_weights=False)
    torch.testing.assert_close(got[~ignore], want[~ignore], rtol=1e-8, atol=1e-8)
    assert weights is not None and weights.shape == (2, 3, 29, 29)
    rebuilt = (weights @ heads_of(theirs, x, 2)).permute(0, 2, 1, 3).reshape(x.shape)
    torch.testing.assert_close(theirs.out_proj(rebuilt)[~ignore], want[~ignore], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ours(x, x, x, ignore)[1], weights.mean(1))
    assert not torch.allclose(got, theirs(x, x, x, ignore)[0], atol=1e-2)  # so the approximation is what ran


def test_padding_reaches_no_valid_output():
    ours, _ = pair(batch_first=True, num_landmarks=5)
    x = torch.randn(2, 29, 12, dtype=F64)
    ignore = padding([29, 11], 29)
    before = ours(x, x, x, ignore, need_weights=False)[0]
    x[1, 11:] = 1e3
    assert torch.equal(ours(x, x, x, ignore, need_weights=False)[0][~ignore], before[~ignore])
    alone = ours(*[x[1:, :11]] * 3, need_weights=False)[0]
    torch.testing.assert_close(alone[0], before[1, :11], rtol=1e-9, atol=1e-9)


def test_query_padding_mask_keeps_queries_out_of_the_landmarks():
    ours, _ = pair(batch_first=True, num_landmarks=5)
    query, key, value = states(2, 29, 17)
    ignore = padding([29, 11], 29)
    got = ours(query, key, value, need_weights=False, query_padding_mask=ignore)[0]
    alone = ours(query[1:, :11], key[1:], value[1:], need_weights=False)[0]
    torch.testing.assert_close(got[1, :11], alone[0], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ours(query, key, value, need_weights=False)[0][1, :11], alone[0], atol=1e-3)
    additive_mask = ours(query, key, value, need_weights=False, query_padding_mask=additive(ignore))[0]
    assert torch.equal(additive_mask, got)
    key, value = key[:, :13].repeat(1, 3, 1)[:, :29], value.repeat(1, 2, 1)[:, :29]  # as long as query, yet others
    default = ours(query, key, value, ignore)
    every = ours(query, key, value, ignore, query_padding_mask=torch.zeros_like(ignore))
    assert all(map(torch.equal, default, every))
    some = ours(query, key, value, ignore, need_weights=False, query_padding_mask=ignore)[0]
    assert not torch.allclose(some[1], default[0][1], atol=1e-3)
    itself = ours(query, query, query, ignore, need_weights=False)[0]
    some = ours(query, query, query, ignore, need_weights=False, query_padding_mask=ignore)[0]
    assert torch.equal(itself, some)


def test_a_memory_as_long_as_the_input_is_no_self_attention():
    """A decoder's padded memory: whether the lengths happen to be equal changes little."""
    decoder = nn.TransformerDecoderLayer(16, 4, 24, 0.0, batch_first=True, dtype=F64).eval()
    decoder.multihead_attn = MultiheadAttention.from_torch(decoder.multihead_attn, num_landmarks=9)
    x, memory = torch.randn(1, 9, 16, dtype=F64), torch.randn(1, 9, 16, dtype=F64)
    ignore = padding([4], 9)
    whole = decoder(x, memory, memory_key_padding_mask=ignore)
    longer = decoder(x, F.pad(memory, (0, 0, 0, 1)), memory_key_padding_mask=F.pad(ignore, (0, 1), value=True))
    torch.testing.assert_close(whole, longer, rtol=1e-9, atol=1e-9)


def test_sample_without_keys_gives_the_bias():
    ours, _ = pair(batch_first=True, num_landmarks=5)
    query, key, value = states(2, 9, 13)
    got, weights = ours(query, key, value, padding([13, 0], 13))
    torch.testing.assert_close(got[1], ours.out_proj.bias.expand(9, 12))
    assert weights[1].abs().max() == 0 and got.isfinite().all()


@pytest.mark.parametrize("average", [False, True])
def test_weights_have_the_inputs_dtype_and_the_precision_of_the_inverse(average):
    ours, _ = pair(batch_first=True, num_landmarks=29, num_pinv_iters=12)
    x = torch.randn(2, 29, 12, dtype=F64)
    want = ours(x, x, x, average_attn_weights=average)[1]
    ours = ours.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(x.float(), x.float(), x.float(), average_attn_weights=average)[1]
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() < 0.015 * want.norm()  # 0.008 measured; 0.023 with the products in bfloat16
    assert ours.half()(*[x.half()] * 3)[1].dtype == torch.float16


def test_dropout_only_while_training():
    ours, _ = pair(batch_first=True, num_landmarks=5, dropout=0.5)
    x = torch.randn(2, 29, 12, dtype=F64)
    assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])
    ours.train()
    assert not torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_from_torch_copies_everything(options):
    theirs = nn.MultiheadAttention(12, 3, 0.25, batch_first=True, dtype=F64, **options).eval()
    theirs.out_proj.weight.requires_grad_(False)
    ours = MultiheadAttention.from_torch(theirs, num_landmarks=7, num_pinv_iters=5)
    assert all(torch.equal(ours.state_dict()[name], weight) for name, weight in theirs.state_dict().items())
    assert (ours.num_landmarks, ours.num_pinv_iters, ours.dropout, ours.batch_first) == (7, 5, 0.25, True)
    assert not ours.training and ours.out_proj.weight.dtype == F64
    assert {name: p.requires_grad for name, p in ours.named_parameters()} == {
        name: p.requires_grad for name, p in theirs.named_parameters()
    }
    before = ours.out_proj.weight.clone()
    with torch.no_grad():
        theirs.out_proj.weight.add_(1.0)
    assert torch.equal(ours.out_proj.weight, before)


def layer(norm_first: bool = False, batch_first: bool = True, dropout: float = 0.0) -> nn.TransformerEncoderLayer:
    """An even number of heads and biases: all that torch's shortcut asks for."""
    made = nn.TransformerEncoderLayer(
        16, 4, 24, dropout, batch_first=batch_first, norm_first=norm_first, dtype=F64, activation="gelu"
    )
    made.self_attn.in_proj_weight.data.mul_(4.0)
    return made


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_layer_runs_landmarks_in_eval_mode_too(norm_first, batch_first, masked):
    made = layer(norm_first, batch_first)
    x = torch.randn(2, 29, 16, dtype=F64)
    ignore = padding([29, 11], 29)
    mask = ignore if masked else None
    x = x if batch_first else x.transpose(0, 1)
    real = slice(None) if not masked else (~ignore if batch_first else ~ignore.T)
    exact = made(x, src_key_padding_mask=mask)
    made.self_attn = MultiheadAttention.from_torch(made.self_attn, num_landmarks=5)
    training = made(x, src_key_padding_mask=mask)
    assert not torch.allclose(training[real], exact[real], atol=1e-3)
    made.eval()
    for without_grad in (torch.no_grad, torch.inference_mode):
        with without_grad():
            torch.testing.assert_close(made(x, src_key_padding_mask=mask)[real], training[real], rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings(NESTED_WARNING)
@pytest.mark.parametrize("lengths", [None, [29, 11, 3], [17, 11, 0]])
def test_trained_encoder_with_swapped_layers_agrees_in_both_modes(lengths):
    """The encoder was built exact, so its own eval mode makes a nested tensor of padded batches."""
    encoder = nn.TransformerEncoder(layer(), num_layers=2)
    assert encoder.use_nested_tensor
    for one in encoder.layers:
        one.self_attn = MultiheadAttention.from_torch(one.self_attn, num_landmarks=5)
    x = torch.randn(3, 29, 16, dtype=F64)
    ignore = padding([29] * 3, 29) if lengths is None else padding(lengths, 29)
    training = encoder(x, src_key_padding_mask=None if lengths is None else ignore)
    encoder.eval()
    with torch.no_grad():
        got = encoder(x, src_key_padding_mask=None if lengths is None else ignore)
    torch.testing.assert_close(got[~ignore], training[~ignore], rtol=1e-9, atol=1e-9)
    if lengths is not None:
        assert got[ignore].abs().max() == 0  # so it was nested


def test_encoder_built_from_our_layer_never_nests():
    made = layer()
    made.self_attn = MultiheadAttention.from_torch(made.self_attn, num_landmarks=5)
    with pytest.warns(UserWarning, match="self_attn._qkv_same_embed_dim was not True"):
        assert not nn.TransformerEncoder(made, num_layers=2).use_nested_tensor
    encoder = nn.TransformerEncoder(made, num_layers=2, enable_nested_tensor=False)
    x, ignore = torch.randn(2, 29, 16, dtype=F64), padding([29, 11], 29)
    training = encoder(x, src_key_padding_mask=ignore)
    encoder.eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(x, src_key_padding_mask=ignore)[~ignore], training[~ignore])


@pytest.mark.filterwarnings(NESTED_WARNING)
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_input_equals_padded(layout):
    ours, _ = pair(batch_first=True, num_landmarks=5)
    x = torch.randn(2, 29, 12, dtype=F64)
    ignore = padding([29, 11], 29)
    nested = torch.nested.nested_tensor([x[0], x[1, :11]], layout=layout)
    got, weights = ours(nested, nested, nested, need_weights=False)
    padded = ours(x, x, x, ignore, need_weights=False)[0]
    assert got.is_nested and got.layout == layout and weights is None
    for sample, row, length in zip(got.unbind(), padded, (29, 11), strict=True):
        torch.testing.assert_close(sample, row[:length], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_decoder_layer_attends_across(training):
    decoder = nn.TransformerDecoderLayer(16, 4, 24, 0.0, batch_first=True, dtype=F64).train(training)
    decoder.multihead_attn.in_proj_weight.data.mul_(4.0)
    x, memory = torch.randn(2, 9, 16, dtype=F64), torch.randn(2, 13, 16, dtype=F64)
    causal = torch.ones(9, 9, dtype=torch.bool).triu(1)
    settings = dict(tgt_mask=causal, memory_key_padding_mask=padding([13, 6], 13))
    exact = decoder(x, memory, **settings)
    decoder.multihead_attn = MultiheadAttention.from_torch(decoder.multihead_attn, **EXACT)
    torch.testing.assert_close(decoder(x, memory, **settings), exact, rtol=1e-5, atol=1e-5)
    decoder.multihead_attn.num_landmarks = 3
    with torch.no_grad():
        assert not torch.allclose(decoder(x, memory, **settings), exact, atol=1e-3)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_every_weight_gets_a_gradient(options):
    ours, _ = pair(batch_first=True, num_landmarks=5, **options)
    query, key, value = states(2, 29, 17, options.get("kdim", 12), options.get("vdim", 12))
    ours(query, key, value, need_weights=False)[0].square().sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        grads = parameter.grad.unflatten(0, (3, 12)) if name.startswith("in_proj") else parameter.grad[None]
        for i, grad in enumerate(grads):  # a shift of all keys changes nothing, so their bias has no gradient
            assert (grad.abs().max() > 1e-6) != (name == "in_proj_bias" and i == 1), (name, i)


@pytest.mark.unhooked
@pytest.mark.parametrize(("masked", "dynamic"), [(False, False), (True, True)])
def test_compiles_as_one_graph(masked, dynamic):
    torch._dynamo.reset()
    ours, _ = pair(batch_first=True, num_landmarks=5)
    query, key, value = states(2, 29, 17)
    mask = padding([17, 6], 17) if masked else None
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got = compiled(query, key, value, mask, need_weights=False)[0]
    torch.testing.assert_close(got, ours(query, key, value, mask, need_weights=False)[0])


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_heads=5), "embed_dim must be a positive multiple of num_heads: got 12 and 5"),
        (dict(add_bias_kv=True), "add_bias_kv and add_zero_attn must be False: got True and False"),
        (dict(add_zero_attn=True), "add_bias_kv and add_zero_attn must be False: got False and True"),
        (dict(dropout=1.5), r"dropout_p must be in \[0, 1\): got 1.5"),
        (dict(num_landmarks=0), "num_landmarks must be an integer of at least 1: got 0"),
        (dict(num_pinv_iters=0), "num_pinv_iters must be an integer of at least 1: got 0"),
    ],
)
def test_refuses_settings_with_the_values(changes, message):
    with pytest.raises(ValueError, match=message):
        MultiheadAttention(**(dict(embed_dim=12, num_heads=3) | changes))


@pytest.mark.unhooked
def test_from_torch_refuses_added_keys():
    with pytest.raises(ValueError, match="add_bias_kv and add_zero_attn must be False: got True and False"):
        MultiheadAttention.from_torch(nn.MultiheadAttention(12, 3, add_bias_kv=True))
    with pytest.raises(ValueError, match="add_bias_kv and add_zero_attn must be False: got False and True"):
        MultiheadAttention.from_torch(nn.MultiheadAttention(12, 3, add_zero_attn=True))


X = torch.zeros(2, 9, 12)
CAUSAL = torch.ones(9, 9, dtype=torch.bool).triu(1)
PER_HEAD = torch.zeros(6, 9, 9, dtype=torch.bool)
PER_HEAD[1, :, 4] = True


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(is_causal=True), "is_causal must be False: got True"),
        (
            dict(attn_mask=CAUSAL),
            r"attn_mask must be the same for every query .* vary by query\. Pass padding as a bool",
        ),
        (dict(attn_mask=additive(CAUSAL)), "attn_mask must be the same for every query and head, .* vary by query"),
        (dict(attn_mask=PER_HEAD), "attn_mask must be the same for every query and head, .* vary by head"),
        (
            dict(attn_mask=torch.zeros(2, 9, dtype=torch.bool)),
            r"attn_mask .* shape \(9, 9\) or \(6, 9, 9\): got .*\(2, 9\)",
        ),
        (dict(attn_mask=torch.zeros(9, 9).int()), "attn_mask must be bool .*: got torch.int32"),
        (
            dict(key_padding_mask=torch.full((2, 9), 0.5)),
            "key_padding_mask must be .* without a bias, .* the first 0.5",
        ),
        (dict(key_padding_mask=torch.zeros(9, 2).bool()), r"key_padding_mask .* shape \(2, 9\): got .*shape \(9, 2\)"),
        (dict(key_padding_mask=torch.zeros(2, 9).int()), "key_padding_mask must be bool .*: got torch.int32"),
        (dict(query_padding_mask=torch.zeros(2, 8).bool()), r"query_padding_mask .* \(2, 9\): got .*shape \(2, 8\)"),
        (dict(key=X[:1]), r"one batch size, .* query \(2, 9, 12\), key \(1, 9, 12\), value \(2, 9, 12\)"),
        (dict(key=X[0]), r"of widths \(12, 12, 12\) .* key \(9, 12\)"),
        (dict(key=X[:, :, :5]), r"of widths \(12, 12, 12\) .* key \(2, 9, 5\)"),
        (dict(value=X[:, :8]), r"key and value of one length: .* value \(2, 8, 12\)"),
        (dict(query=X[:1]), r"\(batch, length, width\) .* one batch size, .* query \(1, 9, 12\)"),
        (dict(query=X[0, 0], key=X[0, 0], value=X[0, 0]), r"unbatched \(length, width\), .* query \(12,\)"),
    ],
)
def test_refuses_calls_with_the_values(arguments, message):
    module = MultiheadAttention(12, 3, batch_first=True)
    with pytest.raises(ValueError, match=message):
        module(**(dict(query=X, key=X, value=X) | arguments))


@pytest.mark.unhooked
def test_refuses_a_batch_that_does_not_fit_without_batch_first():
    module = MultiheadAttention(12, 3)
    with pytest.raises(ValueError, match=r"\(length, batch, width\) .* query \(2, 9, 12\), key \(2, 8, 12\)"):
        module(X, X[:, :8], X[:, :8])


@pytest.mark.unhooked
@pytest.mark.filterwarnings(NESTED_WARNING)
def test_refuses_nested_calls_that_no_encoder_makes():
    module = MultiheadAttention(12, 3, batch_first=True)
    x = torch.nested.nested_tensor([X[0], X[1, :4]])
    with pytest.raises(ValueError, match="self-attention True, a mask False, need_weights=True"):
        module(x, x, x)
    with pytest.raises(ValueError, match="self-attention True, a mask True, need_weights=False"):
        module(x, x, x, padding([9, 4], 9), need_weights=False)
    with pytest.raises(ValueError, match="self-attention False, a mask False, need_weights=False"):
        module(x, X, X, need_weights=False)


@pytest.mark.unhooked
def test_encoder_refuses_a_causal_mask():
    made = layer()
    made.self_attn = MultiheadAttention.from_torch(made.self_attn)
    x = torch.randn(2, 9, 16, dtype=F64)
    with pytest.raises(ValueError, match=r"attn_mask must be .* got shape \(1, 1, 9, 9\) with batch 2"):
        made.eval()(x, src_mask=CAUSAL)
    with pytest.raises(ValueError, match="is_causal must be False: got True"):
        made(x, src_mask=CAUSAL, is_causal=True)


@pytest.mark.unhooked
def test_docstring_examples():
    outcome = doctest.testmod(nystrom.multihead)
    assert outcome.attempted > 0 and outcome.failed == 0
