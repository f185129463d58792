"""nystrom_attention on generated inputs: sizes, masks, dtypes, memory layouts, options and both implementations.

Each law is checked on a few dozen cases here, always the same ones, and on thousands of random ones by `make nightly`.
The reference runs with the inverse iteration written as published instead of through singular values: generated cores
have singular values that coincide, where a singular value decomposition has no gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import reference
from nystrom import _cpu, attention_factors, attention_rows, nystrom_attention
from nystrom.functional import INVERSES, LANDMARKS

F64 = torch.float64
HALVES = (torch.bfloat16, torch.float16)
NEVER_EMPTY = ("prefix", "suffix", "scattered", "shared")
PADDED = (*NEVER_EMPTY, "some empty")
NONE = ("none",) * 3  # a branch of its own in most of the code, so drawn more often than one kind of mask
MASKS = (*NONE, *PADDED)

FORMS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "(b, s)": lambda mask, h, n: mask,
    "(b, 1, 1, s)": lambda mask, h, n: mask[:, None, None],
    "expanded (b, 1, n, s)": lambda mask, h, n: mask[:, None, None].expand(-1, 1, n, -1),
    "written out (b, 1, n, s)": lambda mask, h, n: mask[:, None, None].repeat(1, 1, n, 1),
    "written out (b, h, n, s)": lambda mask, h, n: mask[:, None, None].repeat(1, h, n, 1),
    "-inf": lambda mask, h, n: torch.zeros(mask.shape).masked_fill(~mask, -torch.inf),
    "-1e4 (b, 1, 1, s)": lambda mask, h, n: torch.zeros(mask.shape).masked_fill(~mask, -1e4)[:, None, None],
    "half, lowest": lambda mask, h, n: torch.zeros(mask.shape).masked_fill(~mask, -65504.0).half(),
    "double, expanded (b, h, n, s)": lambda mask, h, n: (
        torch.zeros(mask.shape, dtype=F64).masked_fill(~mask, -1e9)[:, None, None].expand(-1, h, n, -1)
    ),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads first": lambda x: x.contiguous(),
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "width first": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "slice of a wider tensor": lambda x: torch.cat([x, x + 1], -1)[..., : x.shape[3]],
    "every second token": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "expanded heads": lambda x: x[:, :1].expand_as(x),
    "expanded batch": lambda x: x[:1].expand_as(x),
}


@dataclass(frozen=True)
class Case:
    """Everything about one call but its numbers, which follow from the seed."""

    b: int
    h: int
    g: int
    n: int
    s: int
    d: int
    v: int
    dtype: torch.dtype
    spread: float
    """Standard deviation of the inputs."""
    scale: float | None
    mask: str
    form: str
    own_query_mask: bool
    layouts: tuple[str, str, str]
    num_landmarks: int
    num_pinv_iters: int | None
    landmarks: str
    pinv: str
    plain: bool
    """Run what other devices, compilers and transforms run, in place of the code for eager CPU tensors."""
    block: int
    seed: int

    def inputs(self) -> list[Tensor]:
        """query, key and value: leaves that ask for gradients."""
        torch.manual_seed(self.seed)
        sizes = (self.h, self.n, self.d), (self.g, self.s, self.d), (self.g, self.s, self.v)
        numbers = [(self.spread * torch.randn(self.b, *size, dtype=F64)).to(self.dtype) for size in sizes]
        return [LAYOUTS[layout](x).detach().requires_grad_() for layout, x in zip(self.layouts, numbers, strict=True)]

    def key_mask(self) -> Tensor | None:
        """Bool (b, s), or None."""
        torch.manual_seed(self.seed + 1)
        return None if self.mask == "none" else make_mask(self.mask, self.b, self.s)

    def query_mask(self) -> Tensor | None:
        """Bool (b, n) where the call is given one."""
        torch.manual_seed(self.seed + 2)
        return (
            make_mask("scattered" if self.mask == "none" else self.mask, self.b, self.n)
            if self.own_query_mask
            else None
        )

    def real_queries(self) -> Tensor:
        """Bool (b, n): whose outputs mean something."""
        if self.own_query_mask:
            return self.query_mask()
        mask = self.key_mask() if self.n == self.s else None
        return torch.ones(self.b, self.n, dtype=torch.bool) if mask is None else mask

    def run(self, query: Tensor, key: Tensor, value: Tensor, **changes) -> Tensor:
        """The call."""
        key_mask = self.key_mask()
        options = dict(
            attn_mask=None if key_mask is None else FORMS[self.form](key_mask, self.h, self.n),
            scale=self.scale,
            enable_gqa=True,
            query_mask=self.query_mask(),
            num_landmarks=self.num_landmarks,
            num_pinv_iters=self.num_pinv_iters,
            landmarks=self.landmarks,
            pinv=self.pinv,
        )
        return nystrom_attention(query, key, value, **(options | changes))

    def reference(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same from tests/reference.py, for the published landmarks and inverse."""
        with mock.patch.object(reference, "pinv", published_iteration):
            out = reference.nystrom_attention(
                query,
                key,
                value,
                self.key_mask(),
                self.query_mask(),
                num_landmarks=self.num_landmarks,
                num_iters=6 if self.num_pinv_iters is None else self.num_pinv_iters,
                scale=self.scale,
            )
        return out + 0 * (query.sum() + key.sum() + value.sum())  # in the graph, even where no sample has a token

    @contextmanager
    def implementation(self) -> Iterator[None]:
        """The implementation and block size that the case names."""
        with implementation(self.plain, self.block):
            yield


@contextmanager
def implementation(plain: bool, block: int = _cpu.BLOCK) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(_cpu, "BLOCK", block))
        if plain:
            stack.enter_context(mock.patch.object(_cpu, "usable", lambda *tensors: False))
        yield


def make_mask(kind: str, b: int, s: int) -> Tensor:
    """Bool (b, s); every sample has a valid token unless kind is "some empty"."""
    lengths = torch.randint(0 if kind == "some empty" else 1, s + 1, (b, 1))
    if kind == "some empty":
        lengths[torch.randint(b, ())] = 0
    prefix = torch.arange(s) < lengths
    if kind == "suffix":
        return prefix.flip(1)
    if kind in ("scattered", "shared"):
        rows = torch.rand(1 if kind == "shared" else b, s) < 0.6
        rows[:, torch.randint(s, ())] = True
        return rows.expand(b, s)
    return prefix


def published_iteration(matrix: Tensor, num_iters: int) -> Tensor:
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    z = matrix.T / (torch.linalg.matrix_norm(matrix, 1) * torch.linalg.matrix_norm(matrix, torch.inf))
    for _ in range(num_iters):
        az = matrix @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


@st.composite
def cases(
    draw,
    *,
    dtypes=(F64,),
    masks=MASKS,
    published: bool = False,
    self_attention: bool = False,
    landmarks=tuple(LANDMARKS),
    plain: bool | None = None,
) -> Case:
    """Draw a case; `published`: with the published landmarks and inverse, which the reference has."""
    g = draw(st.integers(1, 3))
    n = draw(st.integers(1, 40))
    d = draw(st.integers(1, 8))
    cross = not self_attention and draw(st.booleans())
    pinv = "iterative" if published else draw(st.sampled_from(tuple(INVERSES)))
    kind = draw(st.sampled_from(masks))
    return Case(
        b=draw(st.integers(1, 3)),
        h=g * draw(st.integers(1, 2)),
        g=g,
        n=n,
        s=draw(st.integers(1, 60)) if cross else n,
        d=d,
        v=draw(st.sampled_from((d, d + 3, 1))),
        dtype=draw(st.sampled_from(dtypes)),
        spread=draw(st.sampled_from((0.1, 0.5, 1.0, 2.0, 5.0))),
        scale=draw(st.sampled_from((None, 0.3))),
        mask=kind,
        form=draw(st.sampled_from(tuple(FORMS))),
        own_query_mask=draw(st.booleans()),
        layouts=draw(st.tuples(*[st.sampled_from(tuple(LAYOUTS))] * 3)),
        num_landmarks=draw(st.integers(1, 24)),
        num_pinv_iters=draw(st.sampled_from((None, 1, 8))) if pinv in ("iterative", "chebyshev") else None,
        landmarks="segment_means" if published else draw(st.sampled_from(landmarks)),
        pinv=pinv,
        plain=draw(st.booleans()) if plain is None else plain,
        block=draw(st.sampled_from((1, 50, 300, _cpu.BLOCK))),
        seed=draw(st.integers(0, 2**20)),
    )


def gap(got: Tensor, want: Tensor) -> float:
    """Distance as a share of the size, or of 1 for what is smaller."""
    return ((got - want).norm() / want.norm().clamp_min(1)).item()


@given(case=cases(dtypes=(F64, torch.float32, *HALVES)))
def test_output_is_finite_of_its_shape_and_dtype_and_inputs_are_left_alone(case: Case):
    inputs = case.inputs()
    before = [x.detach().clone() for x in inputs]
    with case.implementation():
        out = case.run(*inputs)
        weight = torch.ones_like(out)
        grads = grad(out, inputs, weight)
    assert out.shape == (case.b, case.h, case.n, case.v) and out.dtype == case.dtype
    assert out.isfinite().all()
    for x, original, gradient in zip(inputs, before, grads, strict=True):
        assert torch.equal(x, original)
        assert gradient.shape == x.shape and gradient.dtype == x.dtype
        assert gradient.isfinite().all()
    assert (weight == 1).all()


@given(case=cases(published=True))
def test_equals_the_reference_output_and_gradients(case: Case):
    inputs = case.inputs()
    want = case.reference(*inputs)
    weight = torch.randn_like(want)
    wanted = grad(want, inputs, weight)
    with case.implementation():
        out = case.run(*inputs)
        got = grad(out, inputs, weight)
    assert gap(out, want) < 1e-12
    for one, other in zip(got, wanted, strict=True):
        assert gap(one, other) < 1e-11


def rounding_bound(case: Case, inputs: list[Tensor]) -> Tensor:
    """How far float32 may be from float64: the inverse magnifies the rounding of the logits, on both its sides."""
    query, key, value = inputs
    factors = attention_factors(
        query,
        key,
        case.key_mask(),
        scale=case.scale,
        enable_gqa=True,
        query_mask=case.query_mask(),
        num_landmarks=case.num_landmarks,
        num_pinv_iters=case.num_pinv_iters,
        landmarks=case.landmarks,
        pinv=case.pinv,
    )
    scale = case.d**-0.5 if case.scale is None else case.scale
    logit = scale * query.norm(dim=-1).max() * key.norm(dim=-1).max()
    inverse = torch.linalg.matrix_norm(factors.core_pinv, 2).max()
    return 8 * torch.finfo(torch.float32).eps * (1 + logit) * (1 + inverse) ** 2 * value.abs().max()


@given(case=cases(dtypes=(torch.float32, *HALVES), landmarks=("segment_means",) * 3 + ("strided",)))
def test_float32_and_halves_are_as_near_to_float64_as_rounding_allows(case: Case):
    """Arithmetic is float32 whatever the inputs, so that a half result is off by the rounding of its output alone."""
    inputs = [x.detach() for x in case.inputs()]
    wide = [x.double() for x in inputs]
    want = case.run(*wide)
    with case.implementation():
        error = (case.run(*inputs).double() - want).abs()
    unit = torch.finfo(case.dtype)
    rounding = 0.0 if case.dtype == torch.float32 else unit.eps / 2 * want.abs() + unit.smallest_normal * unit.eps
    assert (error <= rounding + rounding_bound(case, wide)).all()


@given(case=cases(dtypes=HALVES, masks=(*NONE, *NEVER_EMPTY), published=True))
def test_half_error_is_at_most_twice_that_of_exact_attention(case: Case):
    inputs = [x.detach() for x in case.inputs()]
    wide = [x.double() for x in inputs]
    mask = case.key_mask()
    real = case.real_queries()[:, None, :, None]

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sdpa_mask = None if mask is None else mask[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, sdpa_mask, scale=case.scale, enable_gqa=True)

    want = case.run(*wide) * real
    with case.implementation():
        own = (case.run(*inputs).double() * real - want).norm()
    plain = ((exact(*inputs).double() - exact(*wide)) * real).norm()
    assert own <= 2 * plain + torch.finfo(case.dtype).eps / 2 * want.norm() + 1e-5


@given(case=cases(), weighted_dropout=st.sampled_from((0.0, 0.3)))
def test_both_implementations_agree_output_and_gradients(case: Case, weighted_dropout: float):
    """With every kind of landmark and inverse, and with dropout, where the backward pass is half by hand."""
    inputs = case.inputs()
    results = []
    for plain in (False, True):
        with implementation(plain, case.block):
            torch.manual_seed(case.seed)
            out = case.run(*inputs, dropout_p=weighted_dropout)
            weight = torch.linspace(-1, 2, out.numel(), dtype=F64).view_as(out)
            results.append((out, *grad(out, inputs, weight)))
    for one, other in zip(*results, strict=True):
        assert gap(one, other) < 1e-9


@given(case=cases(dtypes=(F64, torch.float32, *HALVES), masks=PADDED), content=st.sampled_from((0.0, -6e4, 6e4)))
def test_what_padding_holds_changes_nothing(case: Case, content: float):
    """Bit for bit, gradients of the real tokens included."""
    inputs = case.inputs()
    hidden_queries, hidden_keys = ~case.real_queries()[:, None, :, None], ~case.key_mask()[:, None, :, None]
    hidden = (hidden_queries, hidden_keys, hidden_keys)
    results = []
    for fill in (1.0, content):
        tensors = [
            x.detach().masked_fill(cells, fill).requires_grad_() for x, cells in zip(inputs, hidden, strict=True)
        ]
        with case.implementation():
            out = case.run(*tensors)
            weight = torch.linspace(-1, 2, out.numel(), dtype=case.dtype).view_as(out).masked_fill(hidden_queries, 0.0)
            grads = grad(out, tensors, weight)
        every = zip((out, *grads), (hidden_queries, *hidden), strict=True)
        results.append([x.masked_fill(cells, 0.0) for x, cells in every])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@given(case=cases(), side=st.sampled_from(("left", "right", "scattered")), extra=st.integers(1, 20))
def test_how_much_padding_there_is_changes_nothing(case: Case, side: str, extra: int):
    inputs = [x.detach() for x in case.inputs()]
    torch.manual_seed(case.seed + 3)

    def places(length: int) -> Tensor:
        if side == "scattered":
            return torch.randperm(length + extra)[:length].sort().values
        return torch.arange(length) + (extra if side == "left" else 0)

    def pad(x: Tensor, at: Tensor) -> Tensor:
        wider = 100 * torch.randn(*x.shape[:2], x.shape[2] + extra, x.shape[3], dtype=F64)
        return wider.index_copy_(2, at, x)

    def pad_mask(mask: Tensor | None, at: Tensor) -> Tensor:
        mask = torch.ones(case.b, len(at), dtype=torch.bool) if mask is None else mask
        return torch.zeros(case.b, len(at) + extra, dtype=torch.bool).index_copy_(1, at, mask)

    query_at = places(case.n)
    key_at = query_at if case.n == case.s else places(case.s)
    query_mask = case.query_mask()
    if query_mask is not None or case.n != case.s:
        query_mask = pad_mask(query_mask, query_at)
    with case.implementation():
        want = case.run(*inputs)
        padded = [pad(x, at) for x, at in zip(inputs, (query_at, key_at, key_at), strict=True)]
        got = case.run(*padded, attn_mask=pad_mask(case.key_mask(), key_at), query_mask=query_mask)
    real = case.real_queries()[:, None, :, None]
    assert gap(got[:, :, query_at] * real, want * real) < 1e-9


@given(case=cases())
def test_batch_mates_change_nothing(case: Case):
    inputs = [x.detach() for x in case.inputs()]
    key_mask, query_mask = case.key_mask(), case.query_mask()
    with case.implementation():
        together = case.run(*inputs)
        for i in range(case.b):
            one = slice(i, i + 1)
            alone = case.run(
                *(x[one] for x in inputs),
                attn_mask=None if key_mask is None else key_mask[one],
                query_mask=None if query_mask is None else query_mask[one],
            )
            assert gap(alone, together[one]) < 1e-9


@given(case=cases(masks=("some empty",), dtypes=(F64, torch.float32, *HALVES)))
def test_a_sample_without_a_token_gives_zeros_and_zero_gradients(case: Case):
    inputs = case.inputs()
    empty = ~case.key_mask().any(1)
    if case.own_query_mask:
        empty |= ~case.query_mask().any(1)
    with case.implementation():
        out = case.run(*inputs)
        grads = grad(out.sum() + (out.float() ** 2).sum(), inputs)
    assert empty.any() and (out[empty] == 0).all()
    for gradient in grads:
        assert gradient.isfinite().all() and (gradient[empty] == 0).all()


@given(case=cases(masks=PADDED, dtypes=(F64, torch.float32, *HALVES)))
def test_every_form_of_one_mask_gives_the_same_bits(case: Case):
    inputs = case.inputs()
    mask = case.key_mask()
    forms = [form(mask, case.h, case.n) for form in FORMS.values()]
    if case.mask == "shared":
        forms += [mask[:1, None, None], forms[6][:1]]  # (1, 1, 1, s), bool and additive
    with case.implementation():
        want = case.run(*inputs, attn_mask=mask)
        for form in forms:
            before = form.clone()
            assert torch.equal(case.run(*inputs, attn_mask=form), want)
            assert torch.equal(form, before)


@given(case=cases())
def test_factors_and_rows_are_those_of_the_op(case: Case):
    """Gradients as well: these take the tokens with the in-place backward pass out of the op."""
    inputs = case.inputs()
    query, key, value = inputs
    repeated = value.repeat_interleave(case.h // case.g, 1)
    options = dict(
        attn_mask=case.key_mask(),
        scale=case.scale,
        enable_gqa=True,
        query_mask=case.query_mask(),
        num_landmarks=case.num_landmarks,
        num_pinv_iters=case.num_pinv_iters,
        landmarks=case.landmarks,
        pinv=case.pinv,
    )
    with case.implementation():
        out = case.run(*inputs)
        weight = torch.randn_like(out)
        want = out, *grad(out, inputs, weight)
        left, core_pinv, right = attention_factors(query, key, **options)
        for other in (
            left @ core_pinv @ right @ repeated,
            attention_rows(query, key, torch.arange(case.n), **options) @ repeated,
        ):
            got = other, *grad(other, inputs, weight)
            for one, wanted in zip(got, want, strict=True):
                assert gap(one, wanted) < 1e-9


@given(case=cases(masks=NEVER_EMPTY, plain=False), content=st.sampled_from((-1e20, 1e20)))
def test_huge_padding_changes_nothing_in_eager_cpu_tensors(case: Case, content: float):
    """torch's own kernel, in the plain code, makes NaN gradients of such logits, masked or not."""
    test_what_padding_holds_changes_nothing.hypothesis.inner_test(case, content)


@given(case=cases())
def test_gradients_do_not_depend_on_how_they_are_asked_for(case: Case):
    """The backward pass works in place on gradients that it takes for its own: nobody else may see that."""
    inputs = case.inputs()
    ones = torch.ones(case.b, case.h, case.n, case.v, dtype=F64)
    with case.implementation():
        out = case.run(*inputs)
        want = grad(out, inputs, ones, retain_graph=True)

        def same(got, expected=want) -> bool:
            return len(got) == len(expected) and all(map(torch.equal, got, expected))

        kept = [x.clone() for x in want]
        assert same(grad(out, inputs, ones, retain_graph=True))  # again, through the same graph
        assert same(want, kept)  # the first ones were not touched by the second pass
        assert (ones == 1).all()
        for weight in (ones.new_ones(()).expand_as(ones), ones.mT.contiguous().mT):  # the former is what sum() sends
            for got, one in zip(grad(out, inputs, weight, retain_graph=True), want, strict=True):
                assert gap(got, one) < 1e-12
        for i in range(3):  # one of them, or all but one
            others = [j for j in range(3) if j != i]
            assert same(grad(out, [inputs[i]], ones, retain_graph=True), [want[i]])
            assert same(grad(out, [inputs[j] for j in others], ones, retain_graph=True), [want[j] for j in others])
            alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
            assert same(grad(case.run(*alone), [alone[i]], ones), [want[i]])
        out.backward(ones, retain_graph=True)
        out.backward(ones)  # accumulates
        assert same([x.grad for x in inputs], [2 * x for x in want])


@given(case=cases())
def test_gradients_seen_by_hooks_are_final(case: Case):
    leaves = case.inputs()
    ones = torch.ones(case.b, case.h, case.n, case.v, dtype=F64)
    with case.implementation():
        want = grad(case.run(*leaves), leaves, ones)
        inputs = [x.view_as(x) for x in leaves]
        seen: list[list[Tensor]] = [[], [], []]
        copies: list[list[Tensor]] = [[], [], []]

        def watch(i: int) -> Callable[[Tensor], None]:
            def hook(gradient: Tensor) -> None:
                seen[i].append(gradient)
                copies[i].append(gradient.clone())

            return hook

        for i, x in enumerate(inputs):
            x.retain_grad()
            x.register_hook(watch(i))
            leaves[i].register_hook(watch(i))
        out = case.run(*inputs)
        out.retain_grad()
        out.backward(ones)
    assert torch.equal(out.grad, torch.ones_like(out))
    for i in range(3):
        assert len(seen[i]) == 2
        for gradient in (*seen[i], *copies[i], inputs[i].grad, leaves[i].grad):
            assert torch.equal(gradient, want[i])


@given(case=cases())
def test_gradients_add_up_where_inputs_are_used_elsewhere(case: Case):
    """Before the op, after it, twice in it, and through one tensor that holds all three."""
    inputs = case.inputs()
    ones = torch.ones(case.b, case.h, case.n, case.v, dtype=F64)
    with case.implementation():
        want = grad(case.run(*inputs), inputs, ones)
        moved = [x * 1 for x in inputs]
        before = sum(3 * x.sum() for x in moved)
        out = case.run(*moved)
        twice = out.sum() + case.run(*moved).sum() + before + sum(x.sum() for x in moved)
        for got, one in zip(grad(twice, inputs, retain_graph=True), want, strict=True):
            assert gap(got, 2 * one + 4) < 1e-12
        packed = torch.cat([x.flatten() for x in inputs])
        parts = packed.split([x.numel() for x in inputs])
        out = case.run(*(part.view(x.shape) for part, x in zip(parts, inputs, strict=True)))
        for got, one in zip(grad(out.sum(), inputs), want, strict=True):
            assert gap(got, one) < 1e-12
        out = checkpoint(lambda *tensors: case.run(*tensors), *inputs, use_reentrant=False)
        for got, one in zip(grad(out, inputs, ones), want, strict=True):
            assert torch.equal(got, one)


@given(case=cases(self_attention=True))
def test_gradient_of_one_tensor_in_all_three_roles(case: Case):
    case = replace(case, g=case.h, v=case.d)
    x = case.inputs()[0]
    apart = [x.detach().requires_grad_() for _ in range(3)]
    weight = torch.linspace(-1, 2, x.numel(), dtype=F64).view(x.shape)
    with case.implementation():
        want = grad(case.run(*apart), apart, weight)
        assert gap(*grad(case.run(x, x, x), x, weight), sum(want)) < 1e-12
        y = x * 1
        (got,) = grad((case.run(y, y, y) * weight).sum() + y.sum(), x)
        assert gap(got, sum(want) + 1) < 1e-12


@given(case=cases(self_attention=True, plain=False))
def test_gradients_survive_hooks_that_move_saved_tensors(case: Case):
    """Offloading to disk or to another device may bring a tensor back in another memory layout."""
    inputs = case.inputs()
    ones = torch.ones(case.b, case.h, case.n, case.v, dtype=F64)
    with case.implementation():
        want = grad(case.run(*inputs), inputs, ones)
        with saved_tensors_hooks(lambda x: x.detach().numpy().copy(), torch.from_numpy):
            out = case.run(*inputs)
        for got, one in zip(grad(out, inputs, ones), want, strict=True):
            assert gap(got, one) < 1e-12
