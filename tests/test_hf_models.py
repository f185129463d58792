"""Our Nyströmformer as transformers models: heads, padding, lengths, cost, saving, and what transformers asks."""

import logging

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from nystrom import residual_nystrom_attention, spectral_shift_attention
from nystrom.attention import NystromAttention
from nystrom.functional import nystrom_attention
from nystrom.hf.modeling import (
    NystromformerConfig,
    NystromformerForMaskedLM,
    NystromformerForMultipleChoice,
    NystromformerForQuestionAnswering,
    NystromformerForSequenceClassification,
    NystromformerForTokenClassification,
    NystromformerModel,
)

HEADS = {
    NystromformerModel: transformers.AutoModel,
    NystromformerForMaskedLM: transformers.AutoModelForMaskedLM,
    NystromformerForSequenceClassification: transformers.AutoModelForSequenceClassification,
    NystromformerForTokenClassification: transformers.AutoModelForTokenClassification,
    NystromformerForQuestionAnswering: transformers.AutoModelForQuestionAnswering,
    NystromformerForMultipleChoice: transformers.AutoModelForMultipleChoice,
}
KINDS = ["nystrom", "exact", "shift", "residual"]
B, H, N, V, LABELS, CHOICES = 2, 3, 23, 31, 4, 5


def config(**changes) -> NystromformerConfig:
    sizes = dict(
        vocab_size=V,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=H,
        intermediate_size=20,
        max_position_embeddings=40,
        num_landmarks=5,
        conv_kernel_size=7,
        num_labels=LABELS,
    )
    return NystromformerConfig(**sizes | changes)


def build(cls=NystromformerForMaskedLM, std=0.3, **changes):
    """A model whose every weight counts, in eval mode."""
    model = cls(config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * std + ("norm" in name and "weight" in name))
    return model


def inputs(cls, n=N) -> dict[str, torch.Tensor]:
    shape = (B, CHOICES, n) if cls is NystromformerForMultipleChoice else (B, n)
    return {"input_ids": torch.randint(3, V, shape), "token_type_ids": torch.randint(2, shape)}


def labels(cls) -> dict[str, torch.Tensor]:
    return {
        NystromformerModel: {},
        NystromformerForMaskedLM: {"labels": torch.randint(V, (B, N))},
        NystromformerForSequenceClassification: {"labels": torch.randint(LABELS, (B,))},
        NystromformerForTokenClassification: {"labels": torch.randint(LABELS, (B, N))},
        NystromformerForQuestionAnswering: {
            "start_positions": torch.randint(N, (B,)),
            "end_positions": torch.randint(N, (B,)),
        },
        NystromformerForMultipleChoice: {"labels": torch.randint(CHOICES, (B,))},
    }[cls]


SHAPES = {
    NystromformerModel: {"last_hidden_state": (B, N, 12)},
    NystromformerForMaskedLM: {"logits": (B, N, V)},
    NystromformerForSequenceClassification: {"logits": (B, LABELS)},
    NystromformerForTokenClassification: {"logits": (B, N, LABELS)},
    NystromformerForQuestionAnswering: {"start_logits": (B, N), "end_logits": (B, N)},
    NystromformerForMultipleChoice: {"logits": (B, CHOICES)},
}


@pytest.mark.parametrize("cls", HEADS)
def test_every_head_returns_what_transformers_expects(cls):
    model = build(cls)
    given = inputs(cls) | labels(cls)
    with torch.no_grad():
        out = model(**given, output_hidden_states=True, output_attentions=True)
        pair = model(**given, return_dict=False)
    samples = B * CHOICES if cls is NystromformerForMultipleChoice else B
    assert isinstance(out, transformers.utils.ModelOutput)
    for name, shape in SHAPES[cls].items():
        assert out[name].shape == shape
    assert [x.shape for x in out.hidden_states] == [(samples, N, 12)] * 3
    assert [x.shape for x in out.attentions] == [(samples, H, 1, N)] * 2
    if cls is not NystromformerModel:
        assert out.loss.shape == () and out.loss.isfinite()
    assert isinstance(pair, tuple) and all(torch.equal(a, b) for a, b in zip(pair, out.to_tuple(), strict=False))
    assert len(pair) == len(out.to_tuple()) - 2
    torch.testing.assert_close(out.hidden_states[-1], model.base_model(**flat(given)).last_hidden_state)


def flat(given):
    return {name: given[name].flatten(0, -2) for name in ("input_ids", "token_type_ids")}


PER_TOKEN = (NystromformerModel, NystromformerForMaskedLM, NystromformerForTokenClassification)


def meaningful(cls, out, mask) -> list[torch.Tensor]:
    """Of a model's output, what must not depend on padding."""
    if cls in PER_TOKEN:
        return [out[name][mask == 1] for name in SHAPES[cls]] + ([out.loss] if "loss" in out else [])
    return list(out.values())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_padding_holds_changes_nothing(cls, kind, side):
    model = build(cls, attention=kind)
    given = inputs(cls) | labels(cls)
    mask = torch.ones_like(given["input_ids"])
    mask[1, ..., slice(15, None) if side == "right" else slice(0, 8)] = 0
    if cls is NystromformerForQuestionAnswering:
        given |= {"start_positions": torch.tensor([9, 10]), "end_positions": torch.tensor([11, 12])}
    elif cls in PER_TOKEN[1:]:
        given["labels"][mask == 0] = -100
    before = model(**given, attention_mask=mask)
    given["input_ids"][mask == 0] = torch.randint(3, V, (int((mask == 0).sum()),))
    given["token_type_ids"][mask == 0] ^= 1
    after = model(**given, attention_mask=mask)
    pairs = list(zip(meaningful(cls, before, mask), meaningful(cls, after, mask), strict=True))
    assert pairs and all(torch.equal(a, b) and a.isfinite().all() for a, b in pairs)


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_amount_of_padding_and_the_others_in_a_batch_change_nothing(cls, kind):
    model = build(cls, attention=kind).double()
    given = inputs(cls)
    mask = torch.ones_like(given["input_ids"])
    mask[1, ..., 15:] = 0
    together = model(**given, attention_mask=mask)
    alone = model(**{name: x[1:, ..., :15] for name, x in given.items()})
    for name in SHAPES[cls]:
        want = alone[name][0]
        torch.testing.assert_close(together[name][1][: len(want)], want, rtol=1e-8, atol=1e-8)


def test_padding_on_the_left_moves_positions_and_nothing_else():
    """As in transformers, positions count from the first column: with no positions the side does not matter."""
    for cls in (NystromformerForSequenceClassification, NystromformerModel):
        model = build(cls).double()
        model.base_model.encoder.embeddings.position.weight.data.zero_()
        ids = torch.randint(3, V, (1, 15))
        mask = torch.ones(1, 23, dtype=torch.long)
        mask[:, :8] = 0
        padded = torch.cat([torch.randint(3, V, (1, 8)), ids], 1)
        got, want = model(padded, mask)[0], model(ids)[0]
        torch.testing.assert_close(got if got.ndim == 2 else got[:, 8:], want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["nystrom", "exact"])
def test_attention_rows_are_what_the_chosen_tokens_read(kind):
    model = build(NystromformerModel, attention=kind, num_hidden_layers=1).double()
    attention = model.encoder.blocks[0].attention
    ids = torch.randint(3, V, (B, N))
    mask = torch.ones(B, N, dtype=torch.long)
    mask[0, 17:], mask[1, :6] = 0, 0
    x = model.encoder.embeddings(ids)
    query, key, value = (
        project(x).view(B, N, H, 4).transpose(1, 2) for project in (attention.query, attention.key, attention.value)
    )
    if kind == "nystrom":
        want = nystrom_attention(query, key, value, mask.bool(), num_landmarks=5, num_pinv_iters=6)
    else:
        want = F.scaled_dot_product_attention(query, key, value, mask.bool()[:, None, None])
    places = {"default": [[0], [6]], "config": [[3, 8], [3, 8]], "argument": [[9, 1, 2], [7, 8, 22]]}
    for source, chosen in places.items():
        model.config.attention_queries = [3, 8] if source == "config" else None
        given = torch.tensor(chosen) if source == "argument" else None
        (rows,) = model(ids, mask, output_attentions=True, attention_queries=given).attentions
        assert rows.shape == (B, H, len(chosen[0]), N)
        assert (rows.transpose(1, 3)[mask == 0] == 0).all()
        got = rows @ value
        for i in range(B):
            torch.testing.assert_close(got[i], want[i][:, chosen[i]], rtol=1e-9, atol=1e-9)
    model.config.attention_queries, model.config.output_attentions = None, True
    assert model(ids).attentions[0].shape == (B, H, 1, N)


@pytest.mark.parametrize("kind", KINDS)
def test_each_attention_reaches_its_operation(kind):
    model = build(NystromformerModel, attention=kind, num_pinv_iters=4 if kind in ("nystrom", "shift") else None)
    attention = model.encoder.blocks[1].attention
    assert isinstance(attention, NystromAttention)
    query, key, value = torch.randn(3, B, H, N, 4).unbind()
    want = {
        "nystrom": lambda: nystrom_attention(query, key, value, num_landmarks=5, num_pinv_iters=4),
        "shift": lambda: spectral_shift_attention(query, key, value, num_landmarks=5, num_pinv_iters=4),
        "residual": lambda: residual_nystrom_attention(query, key, value, num_landmarks=5),
        "exact": lambda: F.scaled_dot_product_attention(query, key, value),
    }[kind]()
    given = iter((query, key, value))
    attention._heads = lambda x: next(given)
    attention.conv = None
    attention.out = torch.nn.Identity()
    got = attention(torch.zeros(B, N, 12))
    assert torch.equal(got, want.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", KINDS)
def test_every_length_from_one_token_on(kind):
    model = build(attention=kind).double()
    ids = torch.randint(3, V, (B, 40))
    for n in (1, 2, 4, 5, 6, 9, 10, 11, 39, 40):
        mask = torch.zeros(B, 40, dtype=torch.long)
        mask[:, :n] = 1
        logits = model(ids[:, :n]).logits
        assert logits.shape == (B, n, V) and logits.isfinite().all()
        torch.testing.assert_close(model(ids, mask).logits[:, :n], logits, rtol=1e-7, atol=1e-7)


def test_more_landmarks_than_tokens_with_a_finished_inverse_is_exact():
    nystrom = build(num_landmarks=40, num_pinv_iters=40, attention="nystrom").double()
    exact = build(attention="exact").double()
    exact.load_state_dict(nystrom.state_dict())
    ids = torch.randint(3, V, (B, N))
    torch.testing.assert_close(nystrom(ids).logits, exact(ids).logits, rtol=1e-4, atol=1e-4)
    few = build(num_landmarks=2, attention="nystrom").double()
    few.load_state_dict(nystrom.state_dict())
    assert (few(ids).logits - exact(ids).logits).abs().max() > 0.05


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("masked", [False, True])
def test_no_array_of_all_pairs_is_ever_made(cls, masked):
    n, largest = 600, 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            if "scaled_dot_product" in str(func):  # whose kernels make the array out of sight
                query, key = args[1:3] if "backward" in str(func) else args[:2]
                largest = max(largest, query.shape[-2] * key.shape[-2])
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    model = build(cls, max_position_embeddings=n, num_attention_heads=1, num_hidden_layers=1)
    given = {name: x[:1, ..., :1, :] if x.ndim == 3 else x[:1] for name, x in inputs(cls, n).items()}
    if masked:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["attention_mask"][..., n - 9 :] = 0
    with Largest():
        out = model(**given, output_attentions=True)
        sum(out[name].sum() for name in SHAPES[cls]).backward()
    assert 20 * n <= largest <= V * n < n * n


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_repeats_itself_and_training_drops_attention_weights(kind):
    model = build(attention=kind, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    ids = torch.randint(3, V, (B, N))
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    still = build(attention=kind, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    assert torch.equal(still(ids).logits, still(ids).logits)


@pytest.mark.parametrize("cls", list(HEADS)[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(cls, kind):
    model = cls(config(attention=kind, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    given = inputs(cls) | labels(cls)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_runs_blocks_twice_and_changes_no_gradient():
    model = build(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    given = inputs(NystromformerForMaskedLM) | labels(NystromformerForMaskedLM)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for block in model.nystromformer.encoder.blocks:
        block.ffn.register_forward_hook(count)
    gradients = []
    for expected in (2, 4):
        model.zero_grad()
        model(**given).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        assert calls == expected
        calls = 0
        model.activation_checkpointing_enable()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with pytest.raises(ValueError, match="every_n_layers must be 1: got 2"):
        model.activation_checkpointing_enable(every_n_layers=2)
    model.activation_checkpointing_disable()
    model(**given)
    assert calls == 2


@pytest.mark.parametrize("cls", HEADS)
def test_vectors_may_be_given_in_place_of_ids(cls):
    model = build(cls)
    given = inputs(cls)
    want = model(**given)[0]
    vectors = model.get_input_embeddings()(given.pop("input_ids"))
    assert torch.equal(model(inputs_embeds=vectors, **given)[0], want)


def test_segments_are_told_apart_and_are_0_by_default():
    model = build()
    given = inputs(NystromformerForMaskedLM)
    zeros = torch.zeros_like(given["input_ids"])
    assert torch.equal(model(given["input_ids"]).logits, model(given["input_ids"], token_type_ids=zeros).logits)
    assert not torch.allclose(model(**given).logits, model(given["input_ids"]).logits)


@pytest.mark.parametrize("cls", HEADS)
def test_saved_and_loaded_it_is_the_same(cls, tmp_path, caplog):
    model = build(cls, num_pinv_iters=4, attention_queries=[2])
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        for loader in (cls, HEADS[cls]):
            again, info = loader.from_pretrained(tmp_path, output_loading_info=True)
            assert not any(info.values()) and type(again) is cls and not again.training
            assert again.config.to_encoder() == model.config.to_encoder()
            given = inputs(cls)
            assert torch.equal(again(**given)[0], model(**given)[0])
        exact = cls.from_pretrained(tmp_path, attention="exact", num_pinv_iters=None)
    assert exact.base_model.encoder.blocks[0].attention.kind == "softmax"
    assert not caplog.records


def test_auto_classes_keep_ours_and_transformers_own_apart():
    ours = transformers.AutoModelForMaskedLM.from_config(config())
    theirs = transformers.AutoModelForMaskedLM.from_config(transformers.NystromformerConfig(num_hidden_layers=1))
    assert type(ours) is NystromformerForMaskedLM
    assert type(theirs) is transformers.NystromformerForMaskedLM
    assert type(transformers.AutoConfig.for_model("nystrom")) is NystromformerConfig
    assert type(transformers.AutoModelForTextEncoding.from_config(config())) is NystromformerModel


def test_output_layer_is_the_token_embeddings_and_is_resized_with_them():
    model = build()
    assert model.decoder.weight is model.get_input_embeddings().weight
    ids = torch.randint(3, V, (B, N))
    before = model(ids).logits
    model.resize_token_embeddings(V + 6, mean_resizing=False)
    assert model.decoder.weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == V + 6
    after = model(ids).logits
    assert after.shape == (B, N, V + 6)
    torch.testing.assert_close(after[..., :V], before)


def test_new_weights_follow_initializer_range():
    model = NystromformerForSequenceClassification(config(hidden_size=96, vocab_size=2000, initializer_range=0.07))
    encoder = model.nystromformer.encoder
    for weight in (encoder.embeddings.token.weight, encoder.blocks[1].attention.query.weight, model.dense.weight):
        assert abs(weight.std().item() - 0.07) < 0.004
    assert (encoder.blocks[0].ffn[0].bias == 0).all() and (encoder.blocks[0].ffn_norm.weight == 1).all()


@pytest.mark.parametrize("cls", HEADS)
def test_bfloat16_errs_no_more_than_exact_attention_does(cls):
    errors = {}
    for kind in ("nystrom", "exact"):
        torch.manual_seed(1)
        model = build(cls, attention=kind)
        given = inputs(cls)
        mask = torch.ones_like(given["input_ids"])
        mask[1, ..., 15:] = 0
        want = model(**given, attention_mask=mask)
        got = model.bfloat16()(**given, attention_mask=mask)
        pairs = list(zip(meaningful(cls, want, mask), meaningful(cls, got, mask), strict=True))
        assert all(b.dtype == torch.bfloat16 for _, b in pairs)
        apart = [((a - b).where(a > -1e30, 0.0).norm() / a.where(a > -1e30, 0.0).norm()).item() for a, b in pairs]
        errors[kind] = max(apart)
    assert 0 < errors["nystrom"] < 2 * errors["exact"]


def test_labels_that_ask_nothing_cost_nothing():
    model = build()
    ids = torch.randint(3, V, (B, N))
    assert model(ids, labels=torch.full((B, N), -100)).loss == 0
    model = build(NystromformerForQuestionAnswering)
    outside = torch.tensor([-1, N])
    assert model(ids, start_positions=outside, end_positions=outside).loss == 0
    ends = torch.tensor([4, N + 3])
    out = model(ids, start_positions=outside, end_positions=ends)
    torch.testing.assert_close(out.loss, -out.end_logits[0].log_softmax(-1)[4] / 2)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"input_ids": torch.ones(1, 41, dtype=torch.long)},
            r"got 41, max_position_embeddings 40; .*extend_positions\(41",
        ),
        ({"inputs_embeds": torch.ones(1, 42, 12)}, r"got 42, max_position_embeddings 40; .*extend_positions\(42"),
        ({}, "either input_ids or inputs_embeds: got neither"),
        ({"input_ids": torch.ones(1, 3).long(), "inputs_embeds": torch.ones(1, 3, 12)}, "got both"),
        ({"attention_mask": torch.tensor([[1, 2, 0]])}, r"must hold 1 for a real token and 0 for padding: got 2"),
        ({"attention_mask": torch.tensor([[0.0, -1e9, 0.0]])}, "got -1000000000.0"),
        ({"attention_mask": torch.ones(1, 4)}, r"got shape \(1, 4\) with batch 1, query length 3"),
        ({"attention_queries": [3]}, r"indices must be in \[0, 3\): got 3"),
        ({"attention_queries": torch.tensor([-1])}, r"indices must be in \[0, 3\): got -1"),
    ],
)
@pytest.mark.parametrize("kind", ["nystrom", "exact"])
def test_refuses_input_with_the_values(given, message, kind):
    model = build(NystromformerModel, attention=kind)
    if "attention_mask" in given or "attention_queries" in given:
        given = given | {"input_ids": torch.ones(1, 3, dtype=torch.long), "output_attentions": True}
    with pytest.raises(ValueError, match=message):
        model(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "linear"}, "attention must be one of nystrom, exact, shift, residual: got 'linear'"),
        ({"hidden_act": "swish"}, "hidden_act must be one of gelu, gelu_new, .*: got 'swish'"),
        ({"attention": "exact", "num_pinv_iters": 4}, "num_pinv_iters must be None for attention 'exact'.*got 4"),
        ({"attention": "residual", "num_pinv_iters": 4}, "num_pinv_iters must be None for attention 'residual'.*got 4"),
        ({"is_decoder": True}, "is_decoder must be False"),
        ({"chunk_size_feed_forward": 8}, "chunk_size_feed_forward must be 0, no chunks: got 8"),
        ({"conv_kernel_size": 8}, "conv_kernel_size must be odd.*got 8"),
        ({"type_vocab_size": -1}, "type_vocab_size must not be negative: got -1"),
    ],
)
def test_refuses_a_config_with_the_values(changes, message):
    with pytest.raises(ValueError, match=message):
        NystromformerModel(config(**changes))


def test_refuses_what_an_attention_cannot_do():
    ids = torch.randint(3, V, (B, N))
    for kind in ("shift", "residual"):
        with pytest.raises(ValueError, match=f"only the kinds 'nystrom' and 'softmax' can show .*: got '{kind}'"):
            build(attention=kind)(ids, output_attentions=True)
    for option in ({"num_pinv_iters": 3}, {"landmarks": "strided"}, {"pinv": "svd"}):
        with pytest.raises(ValueError, match=f"kind 'residual' .*{next(iter(option.values()))}"):
            NystromAttention(12, H, kind="residual", **option)
    with pytest.raises(ValueError, match="token_type_ids must be left out"):
        build(type_vocab_size=0)(ids, token_type_ids=torch.zeros_like(ids))


@pytest.mark.unhooked
@pytest.mark.parametrize("kind", ["nystrom", "exact"])
def test_compiles_as_one_graph(kind):
    model = build(NystromformerForQuestionAnswering, attention=kind, num_hidden_layers=1)
    given = inputs(NystromformerForMaskedLM) | {"attention_mask": torch.ones(B, N, dtype=torch.long)}
    given["attention_mask"][1, 15:] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want, got = model(**given, output_attentions=True), compiled(**given, output_attentions=True)
    for name in ("start_logits", "end_logits"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.attentions, want.attentions, rtol=1e-5, atol=1e-5)
