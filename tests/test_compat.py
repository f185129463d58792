"""The stand-ins for other libraries: equal to the originals where those are right, right where those are wrong."""

import doctest
import importlib
import warnings

import nystrom_attention as original
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nystrom.compat.lucidrains
import nystrom.compat.xformers
import reference
from nystrom.compat.lucidrains import NystromAttention as Lucidrains
from nystrom.compat.xformers import NystromAttention as XFormers

F64 = torch.float64
SIZES = dict(dim=12, dim_head=5, heads=3, num_landmarks=7, residual_conv_kernel=5)


def lucidrains_pair(gain: float = 1.0, **options):
    """Ours and the installed original, with the original's weights."""
    theirs = original.NystromAttention(**(SIZES | options)).double().eval()
    with torch.no_grad():
        theirs.to_qkv.weight.mul_(gain)
    ours = Lucidrains(**(SIZES | options)).double().eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64)


def keep_first(lengths: list[int], n: int) -> torch.Tensor:
    return torch.arange(n) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("residual", [True, False])
def test_lucidrains_parameters_are_the_originals(residual):
    torch.manual_seed(3)
    theirs = original.NystromAttention(residual=residual, **SIZES)
    torch.manual_seed(3)
    ours = Lucidrains(residual=residual, **SIZES)
    mine, wanted = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(wanted)
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
    ours.load_state_dict(wanted)
    theirs.load_state_dict(mine)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("steps", [4, 6])
def test_lucidrains_one_head_equals_the_original(residual, steps):
    """Alone in its batch, a head's own norms are the batch's."""
    ours, theirs = lucidrains_pair(4.0, heads=1, residual=residual, pinv_iterations=steps)
    x = states(1, 42, 12)
    got, wanted = ours(x, return_attn=True), theirs(x, return_attn=True)
    for mine, their in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-9, atol=1e-9)
    for mine, their in zip(ours(x, return_attn_matrices=True)[1], theirs(x, return_attn_matrices=True)[1], strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_lucidrains_converged_equals_the_original(masked):
    """After enough steps the start no longer shows, so batches and heads can be compared."""
    ours, theirs = lucidrains_pair(6.0, pinv_iterations=60)
    x = states(2, 42, 12)
    # The original cuts segments by position: every segment loses as many tokens, so both cut alike.
    mask = (torch.arange(42) % 6 < torch.tensor([4, 3])[:, None]) if masked else None
    real = torch.ones(2, 42, dtype=torch.bool) if mask is None else mask
    # Its eps in the counts is 1e-8 of 3 or 4 tokens, magnified by the inverse.
    torch.testing.assert_close(ours(x, mask)[real], theirs(x, mask)[real], rtol=1e-5, atol=1e-5)


def lucidrains_by_formula(module: nn.Module, x: torch.Tensor, mask: torch.Tensor | None, m: int, steps: int):
    """The method by the independent reference, and the convolution as a sum over the tokens in reach."""
    b, n, _ = x.shape
    query, key, value = torch.einsum("bnc,kc->bnk", x, module.to_qkv.weight).view(b, n, 3, 3, 5).permute(2, 0, 3, 1, 4)
    out = reference.nystrom_attention(query, key, value, mask, num_landmarks=m, num_iters=steps)
    visible = value if mask is None else value * mask[:, None, :, None]
    for i in range(n):
        for j in range(max(0, i - 2), min(n, i + 3)):
            out[:, :, i] += module.res_conv.weight[:, 0, j - i + 2, 0][:, None] * visible[:, :, j]
    return module.to_out(out.permute(0, 2, 1, 3).reshape(b, n, 15))


@pytest.mark.parametrize("n", [42, 45, 5, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_lucidrains_is_right_at_any_length(n, masked):
    ours, _ = lucidrains_pair(4.0)
    x = states(2, n, 12)
    mask = keep_first([n, (n + 1) // 2], n) if masked else None
    real = torch.ones(2, n, dtype=torch.bool) if mask is None else mask
    want = lucidrains_by_formula(ours, x, mask, 7, 6)
    torch.testing.assert_close(ours(x, mask)[real], want[real], rtol=1e-8, atol=1e-8)


def test_lucidrains_original_attends_to_its_own_padding_and_we_do_not():
    ours, theirs = lucidrains_pair(4.0, heads=1, pinv_iterations=60, residual=False)
    x = states(1, 45, 12)
    zeros_in_front = torch.cat([torch.zeros(1, 4, 12, dtype=F64), x], dim=1)  # to 49 = 7 x 7
    as_real_tokens = ours(zeros_in_front)[:, 4:]
    torch.testing.assert_close(theirs(x), as_real_tokens, rtol=1e-6, atol=1e-6)
    assert (ours(x) - as_real_tokens).abs().max() > 1e-2


def test_lucidrains_original_depends_on_batch_mates_and_we_do_not():
    ours, theirs = lucidrains_pair(4.0)
    x = states(2, 42, 12)
    torch.testing.assert_close(ours(x)[:1], ours(x[:1]), rtol=1e-9, atol=1e-9)
    x[1] *= 5
    torch.testing.assert_close(ours(x)[:1], ours(x[:1]), rtol=1e-9, atol=1e-9)
    assert (theirs(x)[:1] - theirs(x[:1])).abs().max() > 1e-3


@pytest.mark.parametrize("n", [42, 45])
def test_lucidrains_matrix_is_in_token_order(n):
    ours, _ = lucidrains_pair(4.0, residual=False)
    x = states(2, n, 12)
    mask = keep_first([n, 20], n)
    output, matrix = ours(x, mask, return_attn=True)
    left, core_pinv, right = ours(x, mask, return_attn_matrices=True)[1]
    assert matrix.shape == (2, 3, n, n)
    assert (left.shape, core_pinv.shape, right.shape) == ((2, 3, n, 7), (2, 3, 7, 7), (2, 3, 7, n))
    torch.testing.assert_close(left @ core_pinv @ right, matrix)
    value = ours.to_qkv(x).chunk(3, dim=-1)[2].view(2, n, 3, 5).transpose(1, 2)
    rebuilt = ours.to_out((matrix @ value).transpose(1, 2).reshape(2, n, 15))
    torch.testing.assert_close(rebuilt[mask], output[mask], rtol=1e-9, atol=1e-9)
    assert matrix[1, :, :, 20:].abs().max() == 0


def test_lucidrains_padding_reaches_no_valid_output():
    ours, _ = lucidrains_pair(4.0)
    x = states(2, 45, 12)
    mask = keep_first([45, 20], 45)
    before = ours(x, mask)
    x[1, 20:] = 1e3
    assert torch.equal(ours(x, mask)[mask], before[mask])
    torch.testing.assert_close(ours(x[1:, :20])[0], before[1, :20], rtol=1e-9, atol=1e-9)


def test_lucidrains_drops_outputs_while_training():
    ours, _ = lucidrains_pair(dropout=0.5)
    x = states(2, 42, 12)
    whole = ours(x)
    assert torch.equal(ours(x), whole)
    dropped = ours.train()(x)
    zero = dropped == 0
    assert 0.4 < zero.double().mean() < 0.6
    torch.testing.assert_close(dropped[~zero], 2 * whole[~zero])  # after to_out, so entries of the output are zeroed


def test_the_call_of_transmil_runs_with_its_checkpoint():
    dim = 64
    call = dict(
        dim=dim,
        dim_head=dim // 8,
        heads=8,
        num_landmarks=dim // 2,
        pinv_iterations=6,
        residual=True,
        dropout=0.1,
    )

    class Layer(nn.Module):
        """TransMIL's: the attention of normalised bags, added to them."""

        def __init__(self, kind: type[nn.Module]) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(dim)
            self.attn = kind(**call)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.attn(self.norm(x))

    theirs, ours = Layer(original.NystromAttention).double().eval(), Layer(Lucidrains).double().eval()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    bag = states(1, 1 + 16**2, dim)  # a class token and a square of patches
    assert ours(bag).shape == bag.shape
    even = bag[:, :256]  # 8 tokens a landmark; at initial weights the cores are so alike that starts hardly differ
    torch.testing.assert_close(ours(even), theirs(even), rtol=1e-4, atol=1e-4)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dim=0), "dim must be at least 1: got 0"),
        (dict(dim_head=0), "dim_head must be at least 1: got 0"),
        (dict(heads=0), "heads must be at least 1: got 0"),
        (dict(num_landmarks=0), "num_landmarks must be at least 1: got 0"),
        (dict(pinv_iterations=0), "pinv_iterations must be at least 1: got 0"),
        (dict(residual_conv_kernel=4), "residual_conv_kernel must be odd, .* got 4"),
        (dict(eps=1e-6), "eps must be 1e-08: got 1e-06"),
        (dict(dropout=1.5), "dropout probability has to be between 0 and 1, but got 1.5"),
    ],
)
def test_lucidrains_refuses_settings_with_the_values(changes, message):
    with pytest.raises(ValueError, match=message):
        Lucidrains(**(SIZES | changes))


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=torch.zeros(9, 12)), r"x must be \(batch, length, 12\): got shape \(9, 12\)"),
        (dict(x=torch.zeros(2, 9, 5)), r"x must be \(batch, length, 12\): got shape \(2, 9, 5\)"),
        (dict(mask=torch.ones(2, 9)), r"mask must be bool of shape \(b, n\) = \(2, 9\), .* got torch.float32"),
        (dict(mask=torch.ones(9, 2).bool()), r"mask must be bool .* \(2, 9\), .* of shape \(9, 2\)"),
        (dict(return_attn=True, return_attn_matrices=True), "must not both be set: got True and True"),
    ],
)
def test_lucidrains_refuses_calls_with_the_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        Lucidrains(**SIZES)(**(dict(x=torch.zeros(2, 9, 12)) | arguments))


def xformers_original(needs_masks: bool = False, **options) -> nn.Module:
    """The real module, where an xFormers that still has it can be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            package = importlib.import_module("xformers")
            attention = importlib.import_module("xformers.components.attention")
        except ImportError:
            pytest.skip("needs xFormers < 0.0.29")
        if needs_masks and not package._has_cpp_library:
            pytest.skip("xFormers takes masks only where its C++ extension loads")
        return attention.NystromAttention(**(dict(dropout=0.0, num_heads=3, num_landmarks=7) | options)).double().eval()


def xformers_by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: int, steps: int) -> torch.Tensor:
    """What xFormers 0.0.28 computes without a mask, for more than m keys, one matrix at a time."""
    out = torch.empty(len(q), q.shape[1], v.shape[2], dtype=F64)
    for i in range(len(q)):
        pooled = []
        for x in (q[i], k[i]):
            short, extra = divmod(len(x), m)
            lengths = [short] * (m - extra) + [short + 1] * extra
            pooled.append(torch.stack([part.mean(0) for part in x.split(lengths)]))
        scores = [a @ b.T / q.shape[2] ** 0.5 for a, b in ((q[i], pooled[1]), pooled, (pooled[0], k[i]))]
        kernel_1, kernel_2, kernel_3 = (score.softmax(-1) for score in scores)
        inverse = kernel_2.T / kernel_2.sum(0).max()
        eye = torch.eye(m, dtype=F64)
        for _ in range(steps):
            product = kernel_2 @ inverse
            inverse = inverse @ (13 * eye - 15 * product + 7 * product @ product - product @ product @ product) / 4
        out[i] = kernel_1 @ inverse @ kernel_3 @ v[i]
    return out


def xformers_module(**options) -> XFormers:
    return XFormers(**(dict(dropout=0.0, num_heads=3, num_landmarks=7) | options)).double().eval()


def qkv(n: int = 45, s: int = 45, batch_heads: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return states(batch_heads, n, 5) * 2, states(batch_heads, s, 5) * 2, states(batch_heads, s, 5)


@pytest.mark.parametrize(("n", "s"), [(42, 42), (45, 45), (8, 8), (30, 45)])
@pytest.mark.parametrize("steps", [4, 6])
def test_xformers_equals_its_formula(n, s, steps):
    q, k, v = qkv(n, s)
    got = xformers_module(inv_iterations=steps)(q, k, v)
    torch.testing.assert_close(got, xformers_by_formula(q, k, v, 7, steps), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("n", "s", "conv_kernel_size"), [(42, 42, None), (45, 45, None), (45, 45, 5), (8, 8, 5), (30, 45, None)]
)
def test_xformers_equals_the_original(n, s, conv_kernel_size):
    theirs = xformers_original(conv_kernel_size=conv_kernel_size)
    ours = xformers_module(conv_kernel_size=conv_kernel_size)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    q, k, v = qkv(n, s)
    torch.testing.assert_close(ours(q, k, v), theirs(q, k, v), rtol=1e-9, atol=1e-9)


def test_xformers_equals_the_original_for_few_keys():
    q, k, v = qkv(7, 7)
    torch.testing.assert_close(xformers_module(exact_below=8)(q, k, v), xformers_original()(q, k, v))


def test_xformers_masks_mean_what_the_originals_do():
    """For few keys, where the original treats masked tokens rightly; in every form it takes."""
    theirs, ours = xformers_original(needs_masks=True), xformers_module(exact_below=8)
    q, k, v = qkv(7, 7)
    keep = keep_first([7, 3], 7)
    real = keep.repeat_interleave(3, 0)
    for form in ("bool (b, s)", "-inf (b, s)", "bool (b h, 1, s)"):
        mask = MASKS[form](keep)
        torch.testing.assert_close(ours(q, k, v, mask)[real], theirs(q, k, v, key_padding_mask=mask)[real])


def test_xformers_original_attends_over_heads_of_a_4d_input():
    q, k, v = states(2, 45, 3, 5), states(2, 45, 3, 5), states(2, 45, 3, 5)
    torch.testing.assert_close(xformers_original()(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_xformers_switches_to_exact_attention_only_when_asked():
    q, k, v = qkv(7, 7)
    exact = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(xformers_module(exact_below=8)(q, k, v), exact)
    by_method = xformers_module(exact_below=7)(q, k, v)
    assert (by_method - exact).abs().max() > 1e-6
    torch.testing.assert_close(by_method, xformers_module()(q, k, v))
    torch.testing.assert_close(by_method, xformers_by_formula(q, k, v, 7, 6), rtol=1e-9, atol=1e-9)


MASKS = {
    "bool (b, s)": lambda mask: mask,
    "bool (b h, 1, s)": lambda mask: mask.repeat_interleave(3, 0)[:, None],
    "-inf (b, s)": lambda mask: torch.zeros(mask.shape, dtype=F64).masked_fill(~mask, float("-inf")),
    "-1e9 (b h, 1, s)": lambda mask: (-1e9 * ~mask).repeat_interleave(3, 0)[:, None],
}


@pytest.mark.parametrize("form", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("n", "s"), [(45, 45), (30, 45)])
@pytest.mark.parametrize("exact_below", [0, 100])
def test_xformers_is_right_with_a_mask(form, n, s, exact_below):
    q, k, v = qkv(n, s)
    mask = keep_first([s, 11], s)
    got = xformers_module(exact_below=exact_below)(q, k, v, key_padding_mask=form(mask)).unflatten(0, (2, 3))
    heads = [x.unflatten(0, (2, 3)) for x in (q, k, v)]
    if exact_below:
        want = F.scaled_dot_product_attention(*heads, mask[:, None, None])
    else:
        want = reference.nystrom_attention(*heads, mask, num_landmarks=7)
    real = mask if n == s else torch.ones(2, n, dtype=torch.bool)
    torch.testing.assert_close(got.transpose(1, 2)[real], want.transpose(1, 2)[real], rtol=1e-8, atol=1e-8)


def test_xformers_heads_may_have_masks_of_their_own():
    q, k, v = qkv()
    mask = keep_first([45, 11, 30, 45, 9, 20], 45)
    got = xformers_module()(q, k, v, mask[:, None])
    for i in range(6):
        alone = xformers_module(num_heads=1)(q[i : i + 1], k[i : i + 1], v[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(got[i], alone[0], rtol=1e-9, atol=1e-9)


def test_xformers_skip_connections():
    q, k, v = qkv()
    mask = keep_first([45, 11], 45)
    per_head = mask.repeat_interleave(3, 0)
    with_conv = xformers_module(conv_kernel_size=5)
    weight = with_conv.skip_connection.weight
    without = xformers_module()(q, k, v, mask)
    skip = torch.zeros_like(v)
    for i in range(45):
        for j in range(max(0, i - 2), min(45, i + 3)):
            skip[:, i] += weight[:, 0, j - i + 2, 0].repeat(2)[:, None] * (v * per_head[..., None])[:, j]
    torch.testing.assert_close(with_conv(q, k, v, mask), without + skip)

    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape == (2, 3, 45, 5)
            return 2 * x

    given = xformers_module(v_skip_connection=Double())
    torch.testing.assert_close(given(q, k, v), xformers_module()(q, k, v) + 2 * v)


def test_xformers_drops_outputs_while_training():
    module = xformers_module(dropout=0.5)
    q, k, v = qkv()
    whole = module(q, k, v)
    dropped = module.train()(q, k, v)
    zero = dropped == 0
    assert 0.4 < zero.double().mean() < 0.6
    torch.testing.assert_close(dropped[~zero], 2 * whole[~zero])


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(causal=True), "causal must be False: got True"),
        (dict(landmark_pooling=nn.Identity()), r"landmark_pooling must be None .* got Identity\(\)"),
        (dict(use_razavi_pinverse=False), "use_razavi_pinverse must be True and .* got False and False"),
        (dict(pinverse_original_init=True), "pinverse_original_init False: got True and True"),
        (dict(num_landmarks=0), "num_landmarks must be at least 1: got 0"),
        (dict(inv_iterations=0), "inv_iterations must be at least 1: got 0"),
        (dict(num_heads=0), "num_heads must be at least 1: got 0"),
        (dict(exact_below=-1), "exact_below must be at least 0: got -1"),
        (dict(conv_kernel_size=4), "conv_kernel_size must be odd, .* got 4"),
        (dict(conv_kernel_size=5, v_skip_connection=nn.Identity()), "must be None with conv_kernel_size=5"),
        (dict(dropout=1.5), "dropout probability has to be between 0 and 1, but got 1.5"),
    ],
)
def test_xformers_refuses_settings_with_the_values(changes, message):
    with pytest.raises(ValueError, match=message):
        xformers_module(**changes)


Q = torch.zeros(6, 9, 5, dtype=F64)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(q=Q[None]), r"q must be .* got shape \(1, 6, 9, 5\)\. .* over the heads .* q\.transpose\(1, 2\)"),
        (dict(v=Q[None]), r"v must be .* got shape \(1, 6, 9, 5\)\. .* v\.transpose\(1, 2\)\.flatten\(0, 1\)"),
        (dict(q=Q[0]), r"q must be \(batch \* num_heads, length, width\) with num_heads = 3: got shape \(9, 5\)"),
        (dict(k=Q[:4]), r"k must be .* with num_heads = 3: got shape \(4, 9, 5\)"),
        (dict(k=Q[:3]), r"share the batch size: got query \(6, 1, 9, 5\), key \(3, 1, 9, 5\)"),
        (dict(q=Q[:, :4]), "as many queries as values: got 4 and 9; leave out conv_kernel_size"),
        (
            dict(key_padding_mask=torch.ones(6, 9).bool()),
            r"shape \(2, 9\) or \(6, 1, 9\): got \(6, 9\) with num_heads = 3",
        ),
        (dict(key_padding_mask=torch.full((2, 9), 0.5)), r"key_padding_mask: .* the first 0\.5\. Pass it as bool"),
        (dict(key_padding_mask=torch.ones(2, 9).int()), r"key_padding_mask: .* got torch\.int32"),
    ],
)
def test_xformers_refuses_calls_with_the_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        xformers_module(conv_kernel_size=3)(**(dict(q=Q, k=Q, v=Q) | arguments))


@pytest.mark.unhooked
def test_xformers_refuses_what_the_original_swallowed():
    with pytest.raises(TypeError, match="att_mask"):
        xformers_module()(Q, Q, Q, att_mask=torch.ones(9, 9))
    with pytest.raises(TypeError, match="seq_len"):
        xformers_module(seq_len=9)


@pytest.mark.unhooked
@pytest.mark.parametrize("module", [nystrom.compat.lucidrains, nystrom.compat.xformers])
def test_docstring_examples(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0 and outcome.failed == 0
