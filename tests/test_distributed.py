"""Attention on gloo ranks: the joined results are those of one process, and what they send is short."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import nystrom.hf as hf
from nystrom import (
    EncoderConfig,
    MaskedLM,
    NystromAttention,
    SequenceClassifier,
    nystrom_attention,
    spectral_shift_attention,
)
from nystrom.bench.ranks import Sent
from nystrom.convolution import TokenConvolution
from nystrom.distributed import (
    sequence_parallel_convolution,
    sequence_parallel_nystrom_attention,
    sequence_parallel_spectral_shift_attention,
    split_sequence,
    traffic,
)
from nystrom.hf.spread import spread_sequence
from nystrom.streaming import stream_blocks
from ranks import Ranks

ALONE = {
    sequence_parallel_nystrom_attention: nystrom_attention,
    sequence_parallel_spectral_shift_attention: spectral_shift_attention,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, pytestconfig):
    checked = bool(pytestconfig.getoption("--jaxtyping-packages"))
    pool = Ranks(4, tmp_path_factory.mktemp("ranks"), checked)
    yield pool
    pool.close()


def stretch(x, lengths, rank, axis):
    return None if x is None else x.split(lengths, axis)[rank].contiguous()


def attend(group, function, tensors, masks, lengths, weight, options):
    """On a rank: its stretch of the output and of the gradients of query, key and value."""
    rank = dist.get_rank(group)
    query, key, value = (stretch(x, lengths, rank, 2).requires_grad_() for x in tensors)
    attn_mask, query_mask = (stretch(x, lengths, rank, 1) for x in masks)
    out = function(query, key, value, attn_mask, group=group, query_mask=query_mask, **options)
    grads = torch.autograd.grad((out * stretch(weight, lengths, rank, 2)).sum(), (query, key, value))
    return [out.detach(), *grads]


def check(ranks, function, tensors, masks, lengths, options, tolerance=1e-10):
    b, h, n, _ = tensors[0].shape
    weight = torch.randn(b, h, n, tensors[2].shape[3], dtype=tensors[0].dtype)
    found = ranks.run(attend, function, tensors, masks, lengths, weight, options, ranks=len(lengths))
    whole = [x.clone().requires_grad_() for x in tensors]
    out = ALONE[function](*whole, masks[0], query_mask=masks[1], **options)
    expected = [out, *torch.autograd.grad((out * weight).sum(), whole)]
    for got, want in zip(zip(*found, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(got, 2), want.detach(), rtol=tolerance, atol=tolerance)


def inputs(b=2, h=3, g=3, n=35, d=5, v=7, dtype=torch.float64):
    shapes = (b, h, n, d), (b, g, n, d), (b, g, n, v)
    return tuple(2 * torch.randn(shape, dtype=dtype) for shape in shapes)


def some_masked(b, n):
    """One sample with holes, others with padding at the end."""
    mask = torch.arange(n) < torch.arange(n, n - b, -1)[:, None] * 3 // 4
    mask[0] = torch.rand(n) < 0.6
    return mask


LENGTHS = [[35], [17, 18], [1, 34], [20, 3, 12], [9, 9, 9, 8], [1, 1, 30, 3]]
both = pytest.mark.parametrize("function", list(ALONE), ids=["nystrom", "shift"])


@both
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_joined_they_are_the_attention_of_one_process(ranks, function, lengths, masked):
    masks = (some_masked(2, 35), None) if masked else (None, None)
    check(ranks, function, inputs(), masks, lengths, {"num_landmarks": 7})


@both
@pytest.mark.parametrize(
    "options",
    [
        {"num_landmarks": 7, "enable_gqa": True},
        {"num_landmarks": 50},
        {"num_landmarks": 4, "scale": 0.3, "pinv": "svd"},
        {"num_landmarks": 4, "num_pinv_iters": 3},
        {"num_landmarks": 1},
    ],
    ids=str,
)
def test_options_mean_what_they_mean_there(ranks, function, options):
    tensors = inputs(h=4, g=2 if "enable_gqa" in options else 4)
    check(ranks, function, tensors, (some_masked(2, 35), None), [13, 22], options, tolerance=1e-8)


@both
def test_queries_have_a_mask_of_their_own(ranks, function):
    check(ranks, function, inputs(), (some_masked(2, 35), torch.rand(2, 35) < 0.7), [13, 22], {"num_landmarks": 7})


@both
def test_samples_without_a_token_and_ranks_without_one(ranks, function):
    mask = torch.ones(3, 35, dtype=torch.bool)
    mask[0] = False
    mask[1, 13:] = False
    mask[2, :13] = False
    check(ranks, function, inputs(b=3), (mask, None), [13, 11, 11], {"num_landmarks": 7})


def test_queries_and_keys_may_be_of_other_sequences(ranks):
    (query, *_), (_, key, value) = inputs(n=20), inputs(n=35)
    mask = some_masked(2, 35)
    got = ranks.run(cross, (query, key, value), mask, [[4, 9, 7], [13, 2, 20]], ranks=3)
    want = nystrom_attention(query, key, value, mask, num_landmarks=6)
    torch.testing.assert_close(torch.cat(got, 2), want, rtol=1e-10, atol=1e-10)


@pytest.mark.unhooked
def test_only_tokens_that_read_themselves_can_be_shifted(ranks):
    (query, *_), (_, key, value) = inputs(n=20), inputs(n=35)
    lengths = [[4, 9, 7], [13, 2, 20]]
    found = ranks.run(cross, (query, key, value), some_masked(2, 35), lengths, True, ranks=3)
    assert "only self-attention has a diagonal to shift: got query length 9, key length 2" in str(found[1])


def cross(group, tensors, mask, lengths, shift=False):
    rank = dist.get_rank(group)
    query, key, value = (stretch(x, lengths[i > 0], rank, 2) for i, x in enumerate(tensors))
    function = sequence_parallel_spectral_shift_attention if shift else sequence_parallel_nystrom_attention
    return function(query, key, value, stretch(mask, lengths[1], rank, 1), group=group, num_landmarks=6)


def test_one_rank_may_have_no_mask(ranks):
    tensors, mask = inputs(), torch.ones(2, 35, dtype=torch.bool)
    mask[1, 30:] = False
    want = nystrom_attention(*tensors, mask, num_landmarks=7)
    got = ranks.run(last_masks, tensors, mask, ranks=2)
    torch.testing.assert_close(torch.cat(got, 2), want, rtol=1e-10, atol=1e-10)


def last_masks(group, tensors, mask):
    rank = dist.get_rank(group)
    own = None if rank == 0 else mask[:, 18:]
    parts = (stretch(x, [18, 17], rank, 2) for x in tensors)
    return sequence_parallel_nystrom_attention(*parts, own, group=group, num_landmarks=7)


@both
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 6e-2)])
def test_in_lower_precision(ranks, function, dtype, tolerance):
    tensors = tuple(x / 2 for x in inputs(dtype=dtype))
    check(ranks, function, tensors, (None, None), [13, 22], {"num_landmarks": 7}, tolerance)


def test_large_logits_do_not_overflow_where_masses_are_merged(ranks):
    query, key, value = inputs(dtype=torch.float32)
    tensors = 40 * query, torch.cat([key[:, :, :13], 1e-3 * key[:, :, 13:]], 2), value
    check(ranks, sequence_parallel_nystrom_attention, tensors, (None, None), [13, 22], {"num_landmarks": 35}, 1e-2)


def test_gradients_by_finite_differences(ranks):
    for wrong in ranks.run(differences, ranks=2):
        assert wrong < 1e-6, wrong


def differences(group):
    """On two ranks: how far the gradients of the joint loss are from finite differences, at a few numbers."""
    rank = dist.get_rank(group)
    torch.manual_seed(3)
    tensors = [x.requires_grad_() for x in inputs(n=11)]
    lengths = [4, 7]
    masks = stretch(some_masked(2, 11), lengths, rank, 1)

    def loss(tensors):
        parts = (stretch(x, lengths, rank, 2) for x in tensors)
        out = sequence_parallel_spectral_shift_attention(*parts, masks, group=group, num_landmarks=3)
        return (out**2).sum()

    grads = torch.autograd.grad(loss(tensors), tensors)
    worst = 0.0
    for which, at in itertools.product(range(3), [(0, 1, 2, 3), (1, 2, 5, 0), (1, 0, 0, 1)]):
        moved = []
        for step in (1e-5, -1e-5):
            changed = [x.detach().clone() for x in tensors]
            changed[which][at] += step
            moved.append(loss(changed).detach())
        both_losses = torch.stack([(moved[0] - moved[1]) / 2e-5, grads[which][at]])
        dist.all_reduce(both_losses, group=group)
        worst = max(worst, (both_losses[0] - both_losses[1]).abs().item())
    return worst


# The convolution, and encoders


def convolve(group, lengths, value, weight, kernel_size):
    torch.manual_seed(5)
    rank, conv = dist.get_rank(group), TokenConvolution(3, kernel_size).double()
    own = stretch(value, lengths, rank, 2).requires_grad_()
    out = sequence_parallel_convolution(own, conv, group)
    grads = torch.autograd.grad((out * stretch(weight, lengths, rank, 2)).sum(), (own, conv.weight))
    return out.detach(), *grads


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kernel_size", [1, 9, 69])
def test_the_convolution_reads_beyond_the_stretch(ranks, lengths, kernel_size):
    value, weight = torch.randn(2, 2, 3, 35, 4, dtype=torch.float64).unbind()
    found = ranks.run(convolve, lengths, value, weight, kernel_size, ranks=len(lengths))
    torch.manual_seed(5)
    conv = TokenConvolution(3, kernel_size).double()
    value.requires_grad_()
    out = conv(value)
    grad, grad_weight = torch.autograd.grad((out * weight).sum(), (value, conv.weight))
    outs, grads, grads_weight = zip(*found, strict=True)
    for got, want in ((torch.cat(outs, 2), out), (torch.cat(grads, 2), grad), (sum(grads_weight), grad_weight)):
        torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-12)


CONFIG = EncoderConfig(vocab_size=11, max_length=40, embed_dim=12, num_layers=2, num_heads=3, ffn_dim=16, dropout=0.0)


def make(what, kind):
    torch.manual_seed(7)
    config = replace(CONFIG, kind=kind, num_landmarks=6, conv_kernel_size=9)
    model = MaskedLM(config) if what == "masked" else SequenceClassifier(config, 3, what)
    return model.double()


def learn(group, what, kind, lengths, ids, mask, labels):
    """On a rank: loss, logits and gradients averaged over the ranks, as data parallel training averages them."""
    rank, model = dist.get_rank(group), split_sequence(make(what, kind), group)
    assert list(model.state_dict()) == list(make(what, kind).state_dict())
    labels = stretch(labels, lengths, rank, 1) if what == "masked" else labels
    out = model(stretch(ids, lengths, rank, 1), stretch(mask, lengths, rank, 1), labels)
    out.loss.backward()
    grads = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    averaged = torch.cat([out.loss.detach()[None], grads])
    dist.all_reduce(averaged, group=group)
    return averaged / len(lengths), out.logits.detach()


@pytest.mark.parametrize("kind", ["nystrom", "shift"])
@pytest.mark.parametrize("what", ["masked", "mean", "first"])
@pytest.mark.parametrize("lengths", [[35], [13, 22], [1, 20, 14]], ids=str)
def test_encoders_learn_what_they_learn_in_one_process(ranks, what, kind, lengths):
    ids, mask = torch.randint(1, 11, (3, 35)), some_masked(3, 35)
    mask[1, :3] = False
    labels = torch.tensor([2, 0, 1])
    if what == "masked":
        labels = torch.where((torch.rand(3, 35) < 0.3) & mask, ids, -100)
        labels[:, : lengths[0]] = -100  # none on the first rank
        labels[0, 20] = ids[0, 20]
    found = ranks.run(learn, what, kind, lengths, ids, mask, labels, ranks=len(lengths))
    model = make(what, kind)
    out = model(ids, mask, labels)
    out.loss.backward()
    grads = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    for averaged, logits in found:
        torch.testing.assert_close(averaged, torch.cat([out.loss.detach()[None], grads]), rtol=1e-9, atol=1e-11)
        if what != "masked":
            torch.testing.assert_close(logits, out.logits.detach(), rtol=1e-9, atol=1e-11)


HEADS = {
    "pretraining": hf.NystromformerForPreTraining,
    "masked": hf.NystromformerForMaskedLM,
    "classes": hf.NystromformerForSequenceClassification,
    "answers": hf.NystromformerForQuestionAnswering,
}


def make_hf(head, attention):
    torch.manual_seed(7)
    config = hf.NystromformerConfig(
        vocab_size=11,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=16,
        max_position_embeddings=40,
        num_landmarks=6,
        conv_kernel_size=9,
        attention=attention,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return HEADS[head](config).double()


def outputs(model, inputs):
    """Loss and gradients in one row, and all else that the model says."""
    out = model(**inputs, output_hidden_states=True)
    out.loss.backward()
    grads = [parameter.grad.flatten() for parameter in model.parameters()]
    said = [x.detach() for x in out.to_tuple()[1:] if torch.is_tensor(x)]
    return torch.cat([out.loss.detach()[None], *grads]), [*said, *(x.detach() for x in out.hidden_states)]


def learn_whole(group, head, attention, inputs):
    model = spread_sequence(make_hf(head, attention), group)
    assert list(model.state_dict()) == list(make_hf(head, attention).state_dict())
    row, said = outputs(model, inputs)
    dist.all_reduce(row, group=group)
    return row / dist.get_world_size(group), said


@pytest.mark.parametrize("attention", ["nystrom", "shift"])
@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize(("n", "over"), [(35, 2), (34, 3), (2, 3)])
def test_ranks_that_share_whole_inputs_learn_what_one_process_does(ranks, head, attention, n, over):
    ids = torch.randint(1, 11, (3, n))
    inputs = {"input_ids": ids, "token_type_ids": (ids > 5).long()}
    if n > 3:
        mask = some_masked(3, n)
        mask[1, : n // 2 + 1] = False  # all of the first rank's stretch, and where this sample begins
        inputs["attention_mask"] = mask.long()
    if head == "classes":
        inputs["labels"] = torch.tensor([2, 0, 1])
    elif head == "answers":
        real = inputs.get("attention_mask", torch.ones_like(ids))
        inputs |= {"start_positions": real.argmax(1), "end_positions": (real * torch.arange(n)).argmax(1)}
    else:
        inputs["labels"] = torch.where(torch.rand(3, n) < 0.3, ids, -100)
        inputs["labels"][:, 0] = ids[:, 0]
    if head == "pretraining":
        inputs["sentence_order_label"] = torch.tensor([1, 0, 1])
    row, said = outputs(make_hf(head, attention), inputs)
    for got_row, got in ranks.run(learn_whole, head, attention, inputs, ranks=over):
        torch.testing.assert_close(got_row, row, rtol=1e-9, atol=1e-11)
        for one, want in zip(got, said, strict=True):
            real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
            if one.shape[:2] == real.shape:  # what stands at padding means nothing
                one, want = one[real], want[real]
            torch.testing.assert_close(one, want, rtol=1e-9, atol=1e-11)


@pytest.mark.unhooked
def test_a_shared_input_must_fit_the_model_as_a_whole(ranks):
    for error in ranks.run(too_long, ranks=2):
        assert "at most max_position_embeddings tokens long: got 41" in error


def too_long(group):
    model = spread_sequence(make_hf("masked", "nystrom"), group)
    try:
        return str(model(torch.ones(1, 41, dtype=torch.long)))
    except ValueError as error:
        return str(error)


@pytest.mark.unhooked
def test_what_cannot_be_split_says_why():
    with pytest.raises(ValueError, match="kind 'residual' cannot be split over ranks: it picks single keys"):
        split_sequence(make("mean", "residual"))
    with pytest.raises(ValueError, match="kind must be one of nystrom, shift to be split over ranks: got 'softmax'"):
        split_sequence(NystromAttention(8, 2, kind="softmax"))
    with pytest.raises(ValueError, match="landmarks must be segment_means to be split over ranks: got 'strided'"):
        split_sequence(NystromAttention(8, 2, landmarks="strided"))
    with pytest.raises(ValueError, match="no NystromAttention in the model, so nothing to split: got Linear"):
        split_sequence(torch.nn.Linear(2, 2))


@pytest.mark.unhooked
def test_a_model_is_streamed_or_split_but_not_both(ranks):
    with pytest.raises(ValueError, match="blocks are streamed already; they cannot be split over ranks as well"):
        split_sequence(stream_blocks(make("mean", "nystrom")))
    for said in ranks.run(stream_too, ranks=2):
        assert "sequence is split over ranks already; it cannot be streamed as well" in said


def stream_too(group):
    try:
        return str(stream_blocks(split_sequence(make("mean", "nystrom"), group)))
    except ValueError as error:
        return str(error)


@pytest.mark.unhooked
def test_heads_of_transformers_are_refused():
    config = hf.NystromformerConfig(vocab_size=11, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"is for nystrom.hf.spread.spread_sequence, .*: got NystromformerForMaskedLM"):
        split_sequence(hf.NystromformerForMaskedLM(config))


@pytest.mark.unhooked
def test_a_split_encoder_shows_no_rows_and_knows_its_longest_input(ranks):
    ids = torch.ones(1, 50, dtype=torch.long)
    for error in ranks.run(rows_and_length, ids, ranks=2):
        rows, length = error
        assert "cannot show attention rows: this rank holds a part of one of 2" in rows
        assert length is None or "at most max_length tokens long: got 50, max_length 40" in length


def rows_and_length(group, ids):
    model = split_sequence(make("mean", "nystrom"), group)
    found = []
    for call in (
        lambda: model.encoder.blocks[0].attention.rows(torch.zeros(1, 4, 12), torch.tensor([0])),
        lambda: model.encoder.embeddings(stretch(ids, [25, 25], dist.get_rank(group), 1)),
    ):
        try:
            call()
            found.append(None)
        except ValueError as error:
            found.append(str(error))
    return found


# What is sent


def sent(group, function, n, masked):
    b, h, d, v, m = 2, 3, 8, 16, 4
    query, key, value = (torch.randn(b, h, n, width, requires_grad=True) for width in (d, d, v))
    mask = torch.ones(b, n, dtype=torch.bool) if masked else None
    with Sent() as counter:
        out = function(query, key, value, mask, group=group, num_landmarks=m)
        forward = counter.bytes
        out.sum().backward()
    return forward, counter.bytes - forward


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_sent_does_not_grow_with_the_length(ranks, masked):
    b, h, d, v, m = 2, 3, 8, 16, 4
    heads = 4 * b * h
    sizes = 8 * 24 + (8 * 3 * b if masked else 0)  # of the input; and valid tokens as query, as key, as both
    found = [ranks.run(sent, sequence_parallel_nystrom_attention, n, masked, ranks=2) for n in (32, 512)]
    assert found[0] == found[1]
    forward, backward = found[0][0]
    # landmark sums; largest masses, outputs and masses: then their gradients
    landmarks, values = heads * m * 2 * d, heads * m * (1 + v + 1)
    assert forward == sizes + landmarks + values
    assert backward == landmarks + heads * m * (v + 1)
    sizes = {"batch": b, "heads": h, "head_dim": d, "value_dim": v, "num_landmarks": m, "masked": masked}
    assert found[0] == [traffic("nystrom", **sizes)] * 2
    shift = [ranks.run(sent, sequence_parallel_spectral_shift_attention, n, masked, ranks=2)[0] for n in (32, 512)]
    assert shift[0] == shift[1] == traffic("shift", **sizes) and sum(shift[0]) > forward + backward


# What is refused


def refused(group, case):
    rank = dist.get_rank(group)
    query, key, value = inputs(n=8)
    options = {"num_landmarks": 4}
    match case:
        case "alone":
            if rank == 1:
                key = key[:, :, :, :4]
        case "width":
            if rank == 1:
                query, key = query[..., :4], key[..., :4]
        case "landmarks":
            options["num_landmarks"] = 4 + rank
        case "dtype":
            if rank == 1:
                query, key, value = (x.float() for x in (query, key, value))
        case "scale":
            options["scale"] = 1.0 + rank
        case "gradients":
            query.requires_grad_(rank == 0)
        case "causal":
            options["is_causal"] = True
    return sequence_parallel_nystrom_attention(query, key, value, group=group, **options)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("case", "messages"),
    [
        ("alone", ["the input of rank 1 was refused", "query and key must share the head width"]),
        ("width", ["the width of query and key must be the same on every rank: got 5 on rank 0 and 4 on rank 1"] * 2),
        ("landmarks", ["num_landmarks must be the same on every rank: got 4 on rank 0 and 5 on rank 1"] * 2),
        ("dtype", ["the dtype"] * 2),
        ("scale", ["scale"] * 2),
        ("gradients", ["whether gradients are asked for"] * 2),
        ("causal", ["is_causal must be False"] * 2),
    ],
)
def test_what_one_rank_refuses_all_do_and_none_waits(ranks, case, messages):
    errors = ranks.run(refused, case, ranks=2)
    for error, message in zip(errors, messages, strict=True):
        assert isinstance(error, ValueError) and message in str(error)
