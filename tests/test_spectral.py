"""The two shifted attentions against a float64 reference, the closed forms they come from, and their laws."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from nystrom import attention_factors, iterative_pinv, nystrom_attention, segment_means
from nystrom.spectral import additive_shift_attention, spectral_shift_attention

F64 = torch.float64
BOTH = pytest.mark.parametrize("shifted", [spectral_shift_attention, additive_shift_attention])


def qkv(b: int, h: int, n: int, d: int, *, g: int | None = None, v: int | None = None, own: float = 0.0):
    """Random float64 query (b, h, n, d), key (b, g, n, d), value (b, g, n, v).

    With `own`, a query is that multiple of its key, plus noise: tokens read themselves.
    """
    g, v = g or h, v or d
    key = torch.randn(b, g, n, d, dtype=F64)
    query = torch.randn(b, h, n, d, dtype=F64)
    if own:
        query = own * key.repeat_interleave(h // g, 1) + 0.3 * query
    return query, key, torch.randn(b, g, n, v, dtype=F64)


def prefix_mask(lengths: list[int], n: int) -> Tensor:
    return torch.arange(n) < torch.tensor(lengths)[:, None]


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def whole(n: int, b: int = 1, h: int = 1) -> Tensor:
    """Values whose attended form is the attention matrix itself."""
    return torch.eye(n, dtype=F64).expand(b, h, n, n)


def few(num: int):
    """Landmarks that ignore num_landmarks, which then only says from how many tokens the trace of S is estimated."""
    return lambda tokens, _, mask: segment_means(tokens, num, mask)


def softmax_matrix(query: Tensor, key: Tensor) -> Tensor:
    return torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, -1)


def mean_diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1)


# The closed forms that shifting comes from: they need the whole matrix, so they are no part of the library.


def trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal().sum()


def joint_least_squares(target: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The U and δ with the smallest ‖target - left U right - δ I‖, by one dense least-squares problem."""
    n, c, r = len(target), left.shape[1], right.shape[0]
    columns = torch.cat([torch.kron(left, right.mT.contiguous()), torch.eye(n, dtype=F64).reshape(n * n, 1)], 1)
    solution = torch.linalg.lstsq(columns, target.reshape(-1, 1), driver="gelsd").solution[:, 0]
    return solution[:-1].view(c, r), solution[-1]


def symmetric_shift(kernel: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """SS-Nyström: δ = (tr K - tr(C⁺ K C)) / (n - rank C), U = C⁺ K (C⁺)ᵀ - δ (Cᵀ C)⁺."""
    pinv = torch.linalg.pinv(columns)
    rank = torch.linalg.matrix_rank(columns)
    delta = (trace(kernel) - trace(pinv @ kernel @ columns)) / (len(kernel) - rank)
    return pinv @ kernel @ pinv.T - delta * torch.linalg.pinv(columns.T @ columns), delta


def two_sided_shift(matrix: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """With P = C C⁺ and Q = R⁺ R: δ = (tr S - <S, P Q>) / (n - tr(P Q)), U = C⁺ (S - δ I) R⁺."""
    eye = torch.eye(len(matrix), dtype=F64)
    both = left @ torch.linalg.pinv(left) @ torch.linalg.pinv(right) @ right
    # <S, P Q> as P S Q meets I; P and Q are symmetric
    delta = (trace(matrix) - (matrix * both).sum()) / (len(matrix) - trace(both))
    return torch.linalg.pinv(left) @ (matrix - delta * eye) @ torch.linalg.pinv(right), delta


def kernel_and_columns(decay: float, n: int = 24, c: int = 5) -> tuple[Tensor, Tensor]:
    """A symmetric positive definite matrix with a spectrum that decays slowly or fast, and c of its columns."""
    basis = torch.linalg.qr(torch.randn(n, n, dtype=F64)).Q
    kernel = basis * (1 + torch.arange(n, dtype=F64)) ** -decay @ basis.T + 0.5 * torch.eye(n, dtype=F64)
    return kernel, kernel[:, torch.randperm(n)[:c]]


@pytest.mark.parametrize("decay", [0.2, 3.0])
def test_symmetric_closed_form_is_the_joint_least_squares_solution(decay):
    kernel, columns = kernel_and_columns(decay)
    u, delta = symmetric_shift(kernel, columns)
    want_u, want_delta = joint_least_squares(kernel, columns, columns.T)
    assert abs(delta - want_delta) < 1e-10
    assert relative(columns @ u @ columns.T, columns @ want_u @ columns.T) < 1e-9


@pytest.mark.parametrize("decay", [0.2, 3.0])
def test_symmetric_shift_never_loses_and_its_gain_is_known(decay):
    kernel, columns = kernel_and_columns(decay)
    u, delta = symmetric_shift(kernel, columns)
    project = columns @ torch.linalg.pinv(columns)
    shifted = (kernel - columns @ u @ columns.T - delta * torch.eye(24, dtype=F64)).square().sum()
    prototype = (kernel - project @ kernel @ project).square().sum()
    assert abs(shifted - (prototype - delta**2 * (24 - 5))) < 1e-10 * prototype
    assert shifted < prototype


def test_two_sided_closed_form_is_the_joint_least_squares_solution():
    matrix = softmax_matrix(*torch.randn(2, 24, 8, dtype=F64).unbind())
    left, right = matrix[:, :5], matrix[3:9]
    u, delta = two_sided_shift(matrix, left, right)
    want_u, want_delta = joint_least_squares(matrix, left, right)
    assert abs(delta - want_delta) < 1e-11
    assert relative(left @ u @ right, left @ want_u @ right) < 1e-9


def test_two_sided_form_of_a_symmetric_matrix_is_the_symmetric_form():
    kernel, columns = kernel_and_columns(0.2)
    for got, want in zip(two_sided_shift(kernel, columns, columns.T), symmetric_shift(kernel, columns), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rank", [7, 4])
def test_shift_from_the_core_alone_is_vacuous(rank):
    """tr A - tr(A⁺ A A) is zero for every A: at full rank δ is 0 / 0, below it 0. So the library does not use it."""
    core = softmax_matrix(*torch.randn(2, 7, 5, dtype=F64).unbind())
    u, sigma, vh = torch.linalg.svd(core)
    core = u[:, :rank] * sigma[:rank] @ vh[:rank]
    numerator = trace(core) - trace(torch.linalg.pinv(core) @ core @ core)
    assert torch.linalg.matrix_rank(core) == rank
    assert abs(numerator) < 1e-12
    inexact = iterative_pinv(core, 2)
    assert abs(trace(core) - trace(inexact @ core @ core)) > 1e-3  # the one way in which it is not


# The library against the closed forms, where its estimate of tr S is exact: one token a segment.


def test_additive_shift_is_the_least_squares_shift():
    query, key, _ = qkv(2, 3, 24, 8, own=1.0)
    options = dict(num_landmarks=24, landmarks=few(5))
    exact, eye = softmax_matrix(query, key), torch.eye(24, dtype=F64)
    plain = nystrom_attention(query, key, whole(24, 2, 3), **options)
    shift = additive_shift_attention(query, key, whole(24, 2, 3), **options) - plain
    for i in range(2):
        for j in range(3):
            difference = (exact - plain)[i, j].reshape(-1, 1)
            want = torch.linalg.lstsq(eye.reshape(-1, 1), difference).solution.squeeze()
            torch.testing.assert_close(shift[i, j], want * eye, rtol=1e-10, atol=1e-12)
            assert abs(want) > 0.01


def test_additive_shift_may_be_negative():
    query, key, _ = qkv(1, 1, 24, 8, own=-3.0)
    options = dict(num_landmarks=24, landmarks=few(1))
    shift = mean_diagonal(additive_shift_attention(query, key, whole(24), **options))
    shift -= mean_diagonal(nystrom_attention(query, key, whole(24), **options))
    assert shift < -1e-3


@BOTH
def test_the_trace_is_that_of_exact_attention(shifted):
    query, key, _ = qkv(2, 3, 24, 8, own=1.0)
    got = shifted(query, key, whole(24, 2, 3), num_landmarks=24, landmarks=few(5))
    torch.testing.assert_close(mean_diagonal(got), mean_diagonal(softmax_matrix(query, key)), rtol=1e-12, atol=0)


def test_shifted_matrix_lies_between_that_of_nystrom_attention_and_the_identity():
    query, key, _ = qkv(2, 3, 24, 8, own=1.0)
    got = spectral_shift_attention(query, key, whole(24, 2, 3), num_landmarks=5)
    plain = nystrom_attention(query, key, whole(24, 2, 3), num_landmarks=5)
    way, far = got - plain, torch.eye(24, dtype=F64) - plain
    delta = (way * far).sum((-2, -1)) / far.square().sum((-2, -1))
    torch.testing.assert_close(way, delta[..., None, None] * far, rtol=1e-10, atol=1e-12)
    assert (0 < delta).all() and (delta < 1).all() and delta.std() > 1e-3


def test_rows_keep_their_sum_or_gain_the_shift():
    query, key, _ = qkv(2, 3, 35, 5, own=1.0)
    ones = torch.ones(2, 3, 35, 1, dtype=F64)
    options = dict(num_landmarks=7, pinv=torch.linalg.pinv)
    assert (spectral_shift_attention(query, key, ones, **options) - 1).abs().max() < 1e-9
    matrix, plain = (f(query, key, whole(35, 2, 3), **options) for f in (additive_shift_attention, nystrom_attention))
    shift = mean_diagonal(matrix - plain)
    assert shift.min() > 0.01
    sums = additive_shift_attention(query, key, ones, **options)
    torch.testing.assert_close(sums, (1 + shift)[..., None, None].expand_as(sums), rtol=1e-9, atol=1e-9)


# The library against the reference.


def reference_shift(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    *,
    additive: bool,
    num_landmarks: int,
    scale: float | None = None,
) -> Tensor:
    """(b, h, n, d), (b, g, n, d), (b, g, n, v) -> (b, h, n, v): matrices of one head at a time, six steps."""
    b, h, n, d = query.shape
    scale = d**-0.5 if scale is None else scale
    everywhere = torch.ones(b, n, dtype=torch.bool)
    key_mask = everywhere if key_mask is None else key_mask
    query_mask = key_mask if query_mask is None else query_mask
    out = []
    for i in range(b):
        key_tokens, query_tokens = (mask[i].nonzero().flatten().tolist() for mask in (key_mask, query_mask))
        tokens = [t for t in key_tokens if t in query_tokens]
        for j in range(h):
            q, k = query[i, j], key[i, j // (h // key.shape[1])]
            matrix = reference.nystrom_matrix(
                q,
                k,
                num_landmarks=num_landmarks,
                num_iters=6,
                scale=scale,
                query_tokens=query_tokens,
                key_tokens=key_tokens,
            )
            own, nystrom_own = q.new_zeros(()), q.new_zeros(())
            for segment in reference.segments(tokens, num_landmarks):
                middle = segment[(len(segment) - 1) // 2]
                row = torch.softmax(scale * k[key_tokens] @ q[middle], 0)
                own = own + len(segment) * row[key_tokens.index(middle)] / len(tokens)
            for token in tokens:
                nystrom_own = nystrom_own + matrix[token, token] / len(tokens)
            identity = torch.zeros(n, n, dtype=F64)
            identity[tokens, tokens] = 1.0
            if additive:
                matrix = matrix + (own - nystrom_own) * identity
            elif own > nystrom_own:
                delta = (own - nystrom_own) / (1 - nystrom_own)
                matrix = matrix + delta * (identity - identity @ matrix)
            out.append(matrix @ value[i, j // (h // key.shape[1])])
    return torch.stack(out).unflatten(0, (b, h))


# Every size a different number, so that a swapped axis cannot pass.
SELF = dict(b=2, h=3, n=35, d=5)
GROUPED = dict(b=2, h=6, n=35, d=5, g=3, v=4)
CASES = {
    "every segment of one length": (SELF, 7, None),
    "uneven segments": (SELF, 8, None),
    "wide values": (dict(b=2, h=3, n=35, d=5, v=11), 8, None),
    "masked": (SELF, 7, [35, 16]),
    "fewer valid than landmarks": (SELF, 7, [35, 4]),
    "one valid": (SELF, 7, [1, 35]),
    "more landmarks than tokens": (SELF, 50, None),
    "one landmark": (SELF, 1, None),
    "one token": (dict(b=2, h=3, n=1, d=5), 7, None),
    "grouped": (GROUPED, 7, None),
    "grouped masked": (GROUPED, 7, [35, 16]),
}


@BOTH
@pytest.mark.parametrize("own", [0.0, 1.5])
@pytest.mark.parametrize(("sizes", "m", "lengths"), CASES.values(), ids=CASES.keys())
def test_equals_reference_output_and_gradients(shifted, own, sizes, m, lengths):
    inputs = tuple(x.requires_grad_() for x in qkv(**sizes, own=own))
    mask = None if lengths is None else prefix_mask(lengths, sizes["n"])
    additive = shifted is additive_shift_attention
    out = shifted(*inputs, mask, enable_gqa=True, num_landmarks=m)
    want = reference_shift(*inputs, mask, additive=additive, num_landmarks=m)
    assert out.shape == want.shape
    assert relative(out, want) < 1e-12
    weight = torch.randn_like(want)
    for got, wanted in zip(grad(out, inputs, weight), grad(want, inputs, weight), strict=True):
        assert (got - wanted).norm() <= 1e-9 * (1 + wanted.norm())


@BOTH
def test_scattered_masks_of_queries_and_keys_equal_reference(shifted):
    """The diagonal is that of the tokens in both masks; at a query whose key is masked nothing is added."""
    inputs = tuple(x.requires_grad_() for x in qkv(**SELF, own=1.5))
    masks = [torch.rand(2, 35) < share for share in (0.7, 0.8)]
    options = dict(num_landmarks=6, scale=0.7)
    additive = shifted is additive_shift_attention
    for key_mask in (masks[0], None):
        out = shifted(*inputs, key_mask, query_mask=masks[1], **options)
        want = reference_shift(*inputs, key_mask, masks[1], additive=additive, **options)
        assert relative(out, want) < 1e-12
        weight = torch.randn_like(want)
        for got, wanted in zip(grad(out, inputs, weight), grad(want, inputs, weight), strict=True):
            assert (got - wanted).norm() <= 1e-9 * (1 + wanted.norm())


@BOTH
@pytest.mark.parametrize(
    "options",
    [dict(pinv=x) for x in ("chebyshev", "ridge", "svd")]
    + [dict(landmarks=x) for x in ("strided", "kmeans")]
    + [dict(num_pinv_iters=3), dict(scale=0.2)],
    ids=lambda x: str(*x.values()),
)
def test_every_option_reaches_the_factors(shifted, options):
    query, key, value = qkv(**SELF, own=1.5)
    left, core_pinv, right = attention_factors(query, key, num_landmarks=7, **options)
    matrix = left @ core_pinv @ right
    logits = options.get("scale", 5**-0.5) * query @ key.mT
    middle = torch.arange(2, 35, 5)  # of seven segments of five
    own, nystrom_own = mean_diagonal(torch.softmax(logits, -1)[..., middle, :][..., middle]), mean_diagonal(matrix)
    assert (own > nystrom_own).all()
    delta = (own - nystrom_own)[..., None, None]
    if shifted is additive_shift_attention:
        want = matrix @ value + delta * value
    else:
        delta = delta / (1 - nystrom_own[..., None, None])
        want = (1 - delta) * (matrix @ value) + delta * value
    assert relative(shifted(query, key, value, num_landmarks=7, **options), want) < 1e-12


@pytest.mark.unhooked
@BOTH
@pytest.mark.parametrize("own", [0.0, 1.5])
@pytest.mark.parametrize("lengths", [None, [7, 2], [5, 0]])
def test_gradcheck(shifted, own, lengths):
    inputs = tuple(x.requires_grad_() for x in qkv(2, 2, 7, 3, own=own))
    mask = None if lengths is None else prefix_mask(lengths, 7)
    assert torch.autograd.gradcheck(lambda q, k, v: shifted(q, k, v, mask, num_landmarks=3), inputs)


# δ = 0.


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [None, [35, 16]])
@pytest.mark.parametrize("options", [dict(num_landmarks=1), dict(num_landmarks=7, landmarks=few(1))], ids=["1", "7"])
def test_without_a_heavy_diagonal_it_is_nystrom_attention_bit_for_bit(dtype, dropout_p, lengths, options):
    """Tokens that shun themselves: one landmark gives them 1 / n of themselves, which is too much already."""
    inputs = [x.to(dtype).requires_grad_() for x in qkv(**GROUPED, own=-3.0)]
    mask = None if lengths is None else prefix_mask(lengths, 35)
    results = []
    for function in (spectral_shift_attention, nystrom_attention):
        torch.manual_seed(1)
        out = function(*inputs, mask, dropout_p, enable_gqa=True, **options)
        results.append((out, *grad(out.double().square().sum(), inputs)))
    assert torch.equal(results[0][0], results[1][0])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


# What it is for.


def tied(b: int, h: int, n: int, d: int, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Heads whose query and key projections are one, as in shared-QK attention: a token is most like itself."""
    key = size**0.5 * torch.randn(b, h, n, d, dtype=F64)
    return key, key, torch.randn(b, h, n, d, dtype=F64)


@pytest.mark.parametrize(("size", "largest"), [(1.0, 0.5), (1.6, 0.25), (2.2, 0.15), (4.0, 0.05)])
def test_heavy_diagonal_error_is_at_least_halved(size, largest):
    query, key, value = tied(2, 3, 512, 64, size)
    exact = F.scaled_dot_product_attention(query, key, value)
    plain, shifted, added = (
        (f(query, key, value, num_landmarks=32) - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))
        for f in (nystrom_attention, spectral_shift_attention, additive_shift_attention)
    )
    assert mean_diagonal(softmax_matrix(query, key)).min() > 0.5
    assert plain.min() > 0.8
    assert (shifted / plain).max() < largest
    assert (added / plain).max() < 0.6
    assert (shifted < 1.01 * added).all()


def test_light_diagonal_error_is_not_raised():
    query, key, value = qkv(2, 3, 512, 64)
    exact = F.scaled_dot_product_attention(query, key, value)
    plain, shifted, added = (
        (f(query, key, value, num_landmarks=32) - exact).norm(dim=(-2, -1))
        for f in (nystrom_attention, spectral_shift_attention, additive_shift_attention)
    )
    assert (shifted <= 1.001 * plain).all() and (added <= 1.001 * plain).all()


# Masks, batches, dtypes.


@BOTH
def test_padding_content_changes_nothing(shifted):
    query, key, value = qkv(**SELF, own=1.5)
    mask = prefix_mask([35, 16], 35)
    before = shifted(query, key, value, mask, num_landmarks=7)
    for x in (query, key, value):
        x[1, :, 16:] = 1e9
    after = shifted(query, key, value, mask, num_landmarks=7)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1, :, :16], after[1, :, :16])
    assert after.isfinite().all()


@BOTH
@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_amount_of_padding_changes_nothing(shifted, side):
    inputs = qkv(1, 3, 35, 5, own=1.5)
    alone = shifted(*inputs, num_landmarks=8)
    places = {
        "left": torch.arange(35) + 15,
        "right": torch.arange(35),
        "scattered": torch.randperm(50)[:35].sort().values,
    }
    mask = torch.zeros(1, 50, dtype=torch.bool)
    mask[:, places[side]] = True
    padded = [torch.randn(1, 3, 50, 5, dtype=F64).index_copy(2, places[side], x) for x in inputs]
    out = shifted(*padded, mask, num_landmarks=8)
    torch.testing.assert_close(out[:, :, places[side]], alone, rtol=1e-12, atol=1e-12)


@BOTH
def test_batch_mates_change_nothing(shifted):
    query, key, value = qkv(3, 2, 64, 8, own=1.5)
    together = shifted(query, key, value, num_landmarks=8)
    key[1:] *= 10
    query[1:] *= 10
    assert torch.equal(shifted(query, key, value, num_landmarks=8)[0], together[0])
    alone = shifted(query[:1], key[:1], value[:1], num_landmarks=8)
    torch.testing.assert_close(alone, together[:1], rtol=1e-13, atol=1e-14)


@BOTH
@pytest.mark.parametrize("side", ["key", "query", "no token in both"])
def test_a_sample_without_a_token_has_no_shift(shifted, side):
    inputs = tuple(x.requires_grad_() for x in qkv(**SELF, own=1.5))
    key_mask = prefix_mask([35, 0 if side == "key" else 20], 35)
    query_mask = prefix_mask([35, 0 if side == "query" else 35], 35)
    if side == "no token in both":
        query_mask[1] = ~key_mask[1]
    options = dict(attn_mask=key_mask, query_mask=query_mask, num_landmarks=7)
    out, plain = shifted(*inputs, **options), nystrom_attention(*inputs, **options)
    assert torch.equal(out[1], plain[1]) and not torch.equal(out[0], plain[0])
    assert (out[1] == 0).all() == (side != "no token in both")
    for gradient in grad(out.square().sum() + out.sum(), inputs):
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all() == (side != "no token in both")


@BOTH
def test_dropout_leaves_the_shift_alone(shifted):
    """With one landmark a query has one weight: where that is dropped, what is left is δ times its value."""
    query, key, value = qkv(1, 2, 2000, 4, own=3.0)
    options = dict(num_landmarks=64, landmarks=few(1))
    plain, kept = nystrom_attention(query, key, value, **options), shifted(query, key, value, **options)
    additive = shifted is additive_shift_attention
    towards = value if additive else value - plain
    delta = ((kept - plain) * towards).sum((-2, -1), keepdim=True) / towards.square().sum((-2, -1), keepdim=True)
    assert delta.min() > 0.005
    out = shifted(query, key, value, None, 0.3, **options) - delta * value
    dropped = out.abs().amax(-1) < 1e-9
    want = (plain if additive else (1 - delta) * plain) / 0.7
    torch.testing.assert_close(out[~dropped], want[~dropped], rtol=1e-8, atol=1e-9)
    assert abs(dropped.double().mean().item() - 0.3) < 5 * (0.3 * 0.7 / dropped.numel()) ** 0.5


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_that_of_exact_attention(shifted, dtype):
    halves = [x.to(dtype) for x in qkv(2, 4, 512, 32, own=1.0)]
    mask = prefix_mask([512, 300], 512)
    out = shifted(*halves, mask, num_landmarks=32)
    assert out.dtype == dtype

    def error(got: Tensor, want: Tensor) -> float:
        return (got.double() - want.double())[0].norm().item() / want.double()[0].norm().item()

    wide = [x.double() for x in halves]
    own = error(out, shifted(*wide, mask, num_landmarks=32))
    plain = error(F.scaled_dot_product_attention(*halves), F.scaled_dot_product_attention(*wide))
    assert own < 2 * plain


@BOTH
@pytest.mark.parametrize("size", [300.0, 1e4])
def test_saturated_weights_give_the_values_and_finite_gradients(shifted, size):
    """Every softmax is one-hot in float32: δ is 1 less the weight that the landmarks give, and no 0 / 0 appears."""
    key = torch.nn.functional.normalize(torch.randn(2, 3, 35, 5), dim=-1)
    leaves = [x.requires_grad_() for x in (size * key, size * key, torch.randn(2, 3, 35, 5))]
    for m in (7, 35):
        out = shifted(*leaves, num_landmarks=m)
        grads = grad(out.square().sum(), leaves)
        assert all(x.isfinite().all() for x in (out, *grads))
        if shifted is spectral_shift_attention:
            torch.testing.assert_close(out, leaves[2], rtol=1e-3, atol=0.05)


@BOTH
def test_autocast_changes_nothing(shifted):
    inputs = [x.float().requires_grad_() for x in qkv(2, 4, 128, 32, own=1.0)]
    plain = shifted(*inputs, num_landmarks=32)
    with torch.autocast("cpu", torch.bfloat16):
        out = shifted(*inputs, num_landmarks=32)
    assert torch.equal(out, plain)
    for got, want in zip(grad(out.sum(), inputs), grad(plain.sum(), inputs), strict=True):
        assert torch.equal(got, want)


@BOTH
def test_makes_no_array_larger_than_tokens_times_landmarks(shifted):
    n, m = 8192, 64
    query, key, value = (torch.randn(1, 2, n, 8) for _ in range(3))
    mask = prefix_mask([n - 5], n)
    largest = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if hasattr(x, "numel"))])
            return out

    with Count(), torch.no_grad():
        shifted(query, key, value, mask, num_landmarks=m)
    assert largest <= 2 * n * m


# Ways of running it.


class Op(nn.Module):
    def __init__(self, shifted):
        super().__init__()
        self.shifted = shifted

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.shifted(query, key, value, mask, num_landmarks=7)


def masked_inputs(b: int = 2, n: int = 35, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value (b, 3, n, 5) and a mask with a gap and padding."""
    query, key, value = (x.to(dtype) for x in qkv(b, 3, n, 5, own=1.0))
    lengths = torch.tensor([n, n // 2 + 1])[torch.arange(b) % 2]
    mask = torch.arange(n) < lengths[:, None]
    mask[:, n // 3] &= n < 6
    return query, key, value, mask


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.unhooked
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own, tracing an autograd.Function
@pytest.mark.parametrize(
    ("shifted", "dynamic", "masked"),
    [
        (spectral_shift_attention, False, True),
        (additive_shift_attention, False, False),
        pytest.param(spectral_shift_attention, True, False, marks=pytest.mark.slow),
    ],
)
def test_compiled_with_gradients(shifted, dynamic, masked):
    op = Op(shifted)
    compiled = torch.compile(op, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (35, 42) if dynamic else (35,):
        *tensors, mask = masked_inputs(n=n)
        leaves = [x.requires_grad_() for x in tensors]
        mask = mask if masked else None
        got, want = compiled(*leaves, mask), op(*leaves, mask)
        torch.testing.assert_close(got, want)
        for one, other in zip(grad(got.square().sum(), leaves), grad(want.square().sum(), leaves), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.unhooked
@BOTH
@pytest.mark.parametrize("masked", [True, False])
def test_exported_with_dynamic_batch_and_length(shifted, masked):
    b, n = Dim("b"), Dim("n")
    shapes = ({0: b, 2: n},) * 3 + (({0: b, 1: n},) if masked else (None,))
    example = masked_inputs() if masked else (*masked_inputs()[:3], None)
    program = torch.export.export(Op(shifted), example, dynamic_shapes=shapes)
    for batch, length in ((2, 35), (3, 50), (1, 4), (2, 1)):
        *tensors, mask = masked_inputs(batch, length)
        arguments = (*tensors, mask if masked else None)
        torch.testing.assert_close(program.module()(*arguments), Op(shifted)(*arguments))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@BOTH
def test_vmap_and_per_sample_gradients(shifted):
    query, key, value, mask = masked_inputs()

    def loss(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return Op(shifted)(query, key, value, mask).square().sum()

    single = [x[:, None] for x in (query, key, value, mask)]
    torch.testing.assert_close(torch.func.vmap(Op(shifted))(*single)[:, 0], Op(shifted)(query, key, value, mask))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    want = grad(loss(*leaves, mask), leaves)
    detached = [x.detach() for x in single]
    for got, wanted in zip(torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(*detached), want, strict=True):
        torch.testing.assert_close(got[:, 0], wanted)


@BOTH
def test_gradient_of_one_tensor_in_all_three_roles(shifted):
    """Gradients of the tokens meet in place on their way back through the landmarks."""
    x = torch.randn(2, 3, 35, 5, dtype=F64, requires_grad=True)
    apart = [x.detach().requires_grad_() for _ in range(3)]
    weight = torch.randn_like(x)
    want = grad(shifted(*apart, num_landmarks=7), apart, weight)
    y = x * 1
    (got,) = grad((shifted(y, y, y, num_landmarks=7) * weight).sum() + y.sum(), x)
    torch.testing.assert_close(got, sum(want) + 1, rtol=1e-12, atol=1e-12)


@BOTH
def test_deterministic_mode(shifted):
    *tensors, mask = masked_inputs()
    leaves = [x.requires_grad_() for x in tensors]

    def run() -> list[Tensor]:
        out = Op(shifted)(*leaves, mask)
        return [out, *grad(out.square().sum(), leaves)]

    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@BOTH
def test_meta_tensors_and_an_empty_batch(shifted):
    assert Op(shifted)(*(x.to("meta") for x in masked_inputs())).shape == (2, 3, 35, 5)
    assert shifted(*qkv(0, 3, 35, 5), prefix_mask([], 35)).shape == (0, 3, 35, 5)


X = torch.randn(2, 3, 35, 5)
REFUSED = {
    "cross-attention": (dict(query=X[:, :, :20]), r"share the length.*query length 20, key length 35; use nystrom_att"),
    "causal": (dict(is_causal=True), r"is_causal must be False: got True"),
    "groups": (dict(key=X[:, :1], value=X[:, :1]), r"pass enable_gqa=True"),
    "dropout": (dict(dropout_p=1.0), r"dropout_p must be in \[0, 1\): got 1.0"),
    "landmarks": (dict(num_landmarks=0), r"num_landmarks must be an integer of at least 1: got 0"),
    "inverse": (dict(pinv="exact"), r"pinv must be one of .*: got 'exact'"),
    "steps": (dict(pinv="svd", num_pinv_iters=3), r"got 3 with pinv='svd'"),
    "mask": (dict(attn_mask=torch.ones(35, 35) > 0), r"got shape \(35, 35\) with batch 2, query length 35"),
    "query mask": (dict(query_mask=torch.ones(2, 34) > 0), r"query_mask must be bool .* \(2, 35\), True = takes part"),
}


@pytest.mark.unhooked
@BOTH
@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_with_the_rule_and_the_values(shifted, changes, message):
    with pytest.raises(ValueError, match=message):
        shifted(**(dict(query=X, key=X, value=X) | changes))


@BOTH
def test_inputs_are_left_alone(shifted):
    inputs = qkv(**SELF, own=1.5)
    before = copy.deepcopy(inputs)
    shifted(*inputs, prefix_mask([35, 16], 35), num_landmarks=7)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
