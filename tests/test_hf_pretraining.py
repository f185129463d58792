"""The model that pretraining trains: its losses, what its folder opens as, and what it can be started from."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

import nystrom.hf as ours
from nystrom.hf.starting import start_from
from nystrom.presets import FORM, PRESETS, SIZES

V, N = 40, 24
SMALL = dict(vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
IDS = torch.arange(5, 5 + 2 * 12).view(2, 12) % V


def config(**changes) -> ours.NystromformerConfig:
    sizes = dict(max_position_embeddings=N, num_landmarks=4, conv_kernel_size=3, pad_token_id=0)
    return ours.NystromformerConfig(**{**SMALL, **sizes, **changes})


def model(**changes) -> ours.NystromformerForPreTraining:
    made = ours.NystromformerForPreTraining(config(**changes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # no weight, not even a bias, is like another
    return made


def test_the_loss_is_that_of_the_labelled_tokens_and_of_the_order():
    made = model()
    labels = torch.where(torch.rand(IDS.shape) < 0.3, IDS, -100)
    order = torch.tensor([1, -100])
    everything, scored = made(IDS), made(IDS, labels=labels, sentence_order_label=order)
    wanted = labels != -100
    torch.testing.assert_close(scored.prediction_logits, everything.prediction_logits[wanted])
    tokens = F.cross_entropy(everything.prediction_logits[wanted], labels[wanted])
    swapped = F.cross_entropy(everything.sop_logits[:1], order[:1])
    torch.testing.assert_close(scored.loss, tokens + swapped)
    torch.testing.assert_close(made(IDS, labels=labels).loss, tokens)
    torch.testing.assert_close(made(IDS, sentence_order_label=order).loss, swapped)
    nothing = made(IDS, labels=torch.full_like(labels, -100), sentence_order_label=torch.tensor([-100, -100])).loss
    assert nothing.item() == 0 and everything.loss is None
    assert len(made(IDS, return_dict=False)) == 2


def test_the_order_is_read_off_the_first_real_token():
    made = model()
    left = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    mask = (torch.arange(15) >= 3).long().expand(2, 15)
    states = made.nystromformer(left, mask).last_hidden_state[:, 3]
    want = made.sentence_order(torch.tanh(made.pooler(states)))
    torch.testing.assert_close(made(left, mask).sop_logits, want)


def test_without_the_head_there_is_no_order():
    made = model(sentence_order=False)
    assert made(IDS).sop_logits is None and not hasattr(made, "pooler")
    with pytest.raises(ValueError, match="must be left out: in this model's config sentence_order is False"):
        made(IDS, sentence_order_label=torch.tensor([0, 1]))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("sentence_order", [False, True])
def test_its_folder_opens_as_every_model(tmp_path, caplog, norm_first, sentence_order):
    made = model(norm_first=norm_first, sentence_order=sentence_order)
    made.save_pretrained(tmp_path)
    again, info = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and isinstance(again, ours.NystromformerForPreTraining)
    torch.testing.assert_close(again(IDS).prediction_logits, made(IDS).prediction_logits)
    masked, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(masked(IDS).logits, made(IDS).prediction_logits)
    assert masked.decoder.weight is masked.get_input_embeddings().weight
    bare, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    states = made.nystromformer(IDS).last_hidden_state
    torch.testing.assert_close(bare(IDS).last_hidden_state, states)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"dense", "out_proj"}
    torch.testing.assert_close(classifier.nystromformer(IDS).last_hidden_state, states)


def test_norm_first_is_another_model():
    made = model(norm_first=True)
    assert isinstance(made.nystromformer.encoder.norm, torch.nn.LayerNorm)
    assert isinstance(made.nystromformer.encoder.embeddings.norm, torch.nn.Identity)
    with pytest.raises(ValueError, match="norm_first must be False: got True"):
        ours.NystromformerForMaskedLM(config(norm_first=True)).save_transformers("nowhere")


def test_a_new_convolution_starts_as_torchs():
    made = ours.NystromformerForMaskedLM(config(conv_kernel_size=9, num_attention_heads=8))
    (conv, *_) = (module.weight for module in made.modules() if isinstance(module, torch.nn.Conv2d))
    assert 0.5 / 3**0.5 < conv.std().item() * 3 < 2 / 3**0.5  # uniform in ±1/sqrt(9); transformers' has 0.02


@pytest.mark.parametrize(
    ("preset", "vocab_size", "millions"), [("tiny", 262, 0.98), ("small", 30522, 29), ("base", 30522, 110)]
)
def test_presets_have_the_published_size(preset, vocab_size, millions):
    """BERT-small has 28.8 million parameters, BERT-base 110; both with their pooler and without MLM head."""
    sizes = {field: PRESETS[preset][name] for name, field in SIZES.items()}
    length = {"max_position_embeddings": PRESETS[preset]["length"], "vocab_size": vocab_size}
    with torch.device("meta"):
        made = ours.NystromformerForPreTraining(ours.NystromformerConfig(**sizes, **length, **FORM[preset]))
    assert made.num_parameters() == pytest.approx(millions * 1e6, rel=0.03)


def bert(folder, model_class=BertForMaskedLM, config_class=BertConfig, **changes):
    made = model_class(config_class(**SMALL, **{"max_position_embeddings": N, **changes})).eval()
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize("kernel", [None, 5])
@pytest.mark.parametrize(
    ("model_class", "config_class", "reach"),
    [(BertForMaskedLM, BertConfig, N), (RobertaForMaskedLM, RobertaConfig, N + 2)],
)
def test_bert_goes_on_with_what_it_predicts(tmp_path, model_class, config_class, reach, kernel):
    theirs = bert(tmp_path, model_class, config_class, max_position_embeddings=reach)
    made, new = start_from(tmp_path, kernel, "softmax", sentence_order=True)
    torch.testing.assert_close(made.eval()(IDS).prediction_logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    assert {name.split(".")[0] for name in new} == {"pooler", "sentence_order"}
    assert made.config.conv_kernel_size == kernel and made.config.max_position_embeddings == N
    linear, _ = start_from(tmp_path, kernel, None, num_landmarks=6, hidden_dropout_prob=0.3)
    assert linear.config.attention == "nystrom" and linear.config.num_landmarks == 6
    assert linear.nystromformer.encoder.blocks[0].dropout.p == 0.3
    linear.extend_positions(2 * N)
    assert linear(torch.ones(1, 2 * N, dtype=torch.long)).prediction_logits.isfinite().all()


def test_of_other_heads_the_encoder_is_kept(tmp_path):
    theirs = bert(tmp_path / "a", RobertaForSequenceClassification, RobertaConfig, max_position_embeddings=N + 2)
    made, new = start_from(tmp_path / "a", None, "softmax", sentence_order=False)
    states = theirs.roberta(IDS).last_hidden_state
    torch.testing.assert_close(made.eval().nystromformer(IDS).last_hidden_state, states, atol=1e-5, rtol=1e-5)
    assert {name.split(".")[0] for name in new} == {"transform", "norm", "decoder"}
    theirs = bert(tmp_path / "b", BertForPreTraining)
    made, new = start_from(tmp_path / "b", None, "softmax", sentence_order=False)
    torch.testing.assert_close(made.eval()(IDS).prediction_logits, theirs(IDS).prediction_logits, atol=1e-5, rtol=1e-5)
    assert new == []
    bert(tmp_path / "c", BertModel)
    assert len(start_from(tmp_path / "c", 3, None, sentence_order=False)[1]) == 5


def test_swapped_attention_stays(tmp_path):
    made = bert(tmp_path)
    ours.configure(made, "nystrom_residual", num_landmarks=5, exact_below=0).save_pretrained(tmp_path)
    started, _ = start_from(tmp_path, None)
    assert started.config.attention == "residual" and started.config.num_landmarks == 5
    started, _ = start_from(tmp_path, None, "nystrom_shift", num_landmarks=6)
    assert started.config.attention == "shift" and started.config.num_landmarks == 6


def test_a_run_is_gone_on_with(tmp_path):
    made = model(norm_first=True, sentence_order=False)
    made.save_pretrained(tmp_path)
    started, new = start_from(tmp_path, 33, sentence_order=True)
    torch.testing.assert_close(started.eval()(IDS).prediction_logits, made(IDS).prediction_logits)
    assert {name.split(".")[0] for name in new} == {"pooler", "sentence_order"}
    assert started.config.conv_kernel_size == 3  # its own
    assert start_from(tmp_path, 33, "softmax", sentence_order=False)[0].config.attention == "exact"
    ours.NystromformerForSequenceClassification(config()).save_pretrained(tmp_path / "classifier")
    _, new = start_from(tmp_path / "classifier", 33, sentence_order=False)
    assert {name.split(".")[0] for name in new} == {"transform", "norm", "decoder"}


@pytest.mark.parametrize("head", ["ForMaskedLM", "Model"])
def test_transformers_own_nystromformer_is_read(tmp_path, head):
    sizes = dict(segment_means_seq_len=4, num_landmarks=4, conv_kernel_size=3, max_position_embeddings=N)
    theirs = getattr(transformers, f"Nystromformer{head}")(transformers.NystromformerConfig(**SMALL, **sizes)).eval()
    theirs.save_pretrained(tmp_path)
    made, new = start_from(tmp_path, 33, "softmax", sentence_order=False)
    if head == "ForMaskedLM":
        torch.testing.assert_close(made.eval()(IDS).prediction_logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
        assert new == []
    else:
        want = theirs(IDS).last_hidden_state
        torch.testing.assert_close(made.eval().nystromformer(IDS).last_hidden_state, want, atol=1e-5, rtol=1e-5)
    assert start_from(tmp_path, 33)[0].config.attention == "nystrom"


def test_half_precision_is_trained_in_float32(tmp_path):
    bert(tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in start_from(tmp_path, 3)[0].parameters()} == {torch.float32}
    model().to(torch.bfloat16).save_pretrained(tmp_path / "ours")
    assert {p.dtype for p in start_from(tmp_path / "ours", 3)[0].parameters()} == {torch.float32}


def test_what_cannot_be_started_from_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/config\.json: no such file; is .*nowhere a model's folder"):
        start_from(tmp_path / "nowhere", 3)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match=r"config\.json: model_type must be one of nystrom, .*: got 't5'"):
        start_from(tmp_path, 3)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file; pickled weights are not read"):
        start_from(tmp_path, 3)
    model().save_pretrained(tmp_path / "ours")
    short = tmp_path / "short"
    shutil.copytree(tmp_path / "ours", short)
    (short / "model.safetensors").write_bytes((short / "model.safetensors").read_bytes()[:-50])
    with pytest.raises(ValueError, match="short: its weights cannot be read, or do not fit"):
        start_from(short, 3)
    fields = json.loads((tmp_path / "ours/config.json").read_text())
    (tmp_path / "ours/config.json").write_text(json.dumps(fields | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"weights of the encoder are missing: .*blocks\.2"):
        start_from(tmp_path / "ours", 3)


def test_transformers_has_no_such_model_to_write(tmp_path):
    with pytest.raises(ValueError, match=r"no NystromformerForPreTraining: .* as NystromformerForMaskedLM"):
        model().save_transformers(tmp_path / "no")
    assert not (tmp_path / "no").exists()
