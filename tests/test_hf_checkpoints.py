"""Folders of transformers' own Nyströmformer: read, compared with that model, and written back; longer positions."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nystrom.hf import folders, keys
from nystrom.hf import modeling as ours

HEADS = [
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
]
B, N, V, LABELS, CHOICES, POSITIONS = 2, 23, 31, 4, 3, 40


def their_model(head: str = "ForMaskedLM", std: float = 0.5, **changes):
    """transformers' own, exact attention unless told otherwise, every weight drawn so that it counts."""
    sizes = dict(
        vocab_size=V,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=POSITIONS,
        num_landmarks=5,
        segment_means_seq_len=5,
        conv_kernel_size=7,
        layer_norm_eps=0.01,
        num_labels=LABELS,
    )
    model = getattr(transformers, f"Nystromformer{head}")(transformers.NystromformerConfig(**sizes | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * std + ("LayerNorm.weight" in name))
    return model


def our_class(head: str):
    return getattr(ours, f"Nystromformer{head}")


@pytest.fixture
def folder(tmp_path):
    """A masked language model of transformers."""
    their_model().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def inputs(head: str, n: int = N) -> dict[str, torch.Tensor]:
    shape = (B, CHOICES, n) if head == "ForMultipleChoice" else (B, n)
    given = {"input_ids": torch.randint(3, V, shape), "token_type_ids": torch.randint(2, shape)}
    if head == "ForQuestionAnswering":
        return given | {"start_positions": torch.randint(n, (B,)), "end_positions": torch.randint(n, (B,))}
    top = {"ForMaskedLM": V, "ForTokenClassification": LABELS, "ForMultipleChoice": CHOICES}.get(head, LABELS)
    labels = torch.randint(top, (B,) if "Choice" in head or "Sequence" in head else (B, n))
    if labels.ndim == 2:
        labels[:, 1::3] = -100
    return given if head == "Model" else given | {"labels": labels}


def same(got, want, **tolerances) -> None:
    assert list(got) == list(want)
    for name in want:
        torch.testing.assert_close(got[name], want[name], **tolerances or dict(rtol=1e-5, atol=1e-5))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("act", ["gelu_new", "gelu", "relu"])
def test_exact_attention_gives_transformers_numbers(head, act, tmp_path):
    """In float32 to 1e-5, and in float64 as far as only the same formula can."""
    for std, dtype, tolerance in ((0.3, torch.float32, 1e-5), (0.5, torch.float64, 1e-10)):
        theirs = their_model(head, std, hidden_act=act)
        theirs.save_pretrained(tmp_path / str(std))
        model = our_class(head).from_transformers(tmp_path / str(std), "exact").to(dtype)
        theirs.to(dtype)
        assert not model.training and (head == "ForQuestionAnswering" or model.config.num_labels == LABELS)
        for n in (1, 4, 5, 22, POSITIONS):
            given = inputs(head, n)
            with torch.no_grad():
                want = theirs(**given)
                same(model(**given), want, rtol=tolerance, atol=tolerance)
        assert want[-1].std() > 0.1  # the numbers vary, so that agreement says something


@pytest.mark.parametrize(
    ("problem", "num_labels", "labels"),
    [
        (None, 1, torch.tensor([0.5, -2.0])),
        (None, LABELS, torch.tensor([3, 1])),
        (None, LABELS, torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 1]])),
        ("regression", LABELS, torch.tensor([[1.0, 0, 0.3, 1], [0, -1, 1, 1]])),
    ],
)
def test_every_kind_of_label_costs_what_it_does_there(problem, num_labels, labels, tmp_path):
    theirs = their_model("ForSequenceClassification", num_labels=num_labels, problem_type=problem)
    theirs.save_pretrained(tmp_path)
    model = ours.NystromformerForSequenceClassification.from_transformers(tmp_path, "exact")
    ids = torch.randint(3, V, (B, N))
    want = theirs(ids, labels=labels)
    same(model(ids, labels=labels), want)
    assert model.config.problem_type == problem  # transformers' model has written its guess into its config


@pytest.mark.parametrize("head", HEADS)
def test_padded_it_gives_what_transformers_gives_without_the_padding(head, tmp_path):
    theirs = their_model(head)
    theirs.save_pretrained(tmp_path)
    model = our_class(head).from_transformers(tmp_path, "exact")
    given = {name: inputs(head)[name] for name in ("input_ids", "token_type_ids")}
    mask = torch.ones_like(given["input_ids"])
    mask[1, ..., 15:] = 0
    together, alone = model(**given, attention_mask=mask), theirs(**{k: x[1:, ..., :15] for k, x in given.items()})
    for name in alone:
        want = alone[name][0]
        torch.testing.assert_close(together[name][1][: len(want)], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_every_bit_is_the_same(head, dtype, tmp_path):
    theirs = their_model(head).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    model = our_class(head).from_transformers(tmp_path / "theirs", "exact")
    assert {p.dtype for p in model.parameters()} == {dtype}
    model.save_transformers(tmp_path / "new" / "back")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["back"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "new/back"))
    assert before.keys() == after.keys()
    assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "new/back")]
    assert configs[0] == configs[1]
    again, info = type(theirs).from_pretrained(tmp_path / "new/back", output_loading_info=True)
    assert not any(info.values())
    given = inputs(head)
    same(again(**given), theirs(**given))


def test_every_tensor_has_one_name_on_each_side():
    for head in HEADS:
        theirs = {name: torch.zeros(1) for name in their_model(head).state_dict()}
        mine = keys.to_ours(theirs)
        assert set(mine) | {"decoder.weight"} >= set(our_class(head)(folders.NystromformerConfig(
            hidden_size=12, num_hidden_layers=2, num_attention_heads=3
        )).state_dict())  # fmt: skip
        assert set(keys.to_theirs(mine)) == set(theirs) - {keys.SAME_BIAS, keys.SAME_TOKENS}
    table = keys.ENCODER + keys.HEADS
    assert len({a for a, _ in table}) == len({b for _, b in table}) == len(table)


@pytest.mark.parametrize("kind", ["nystrom", "shift", "residual"])
def test_cheaper_attentions_read_the_same_weights_at_any_length(kind, folder, tmp_path):
    exact = ours.NystromformerForMaskedLM.from_transformers(folder, "exact")
    model = ours.NystromformerForMaskedLM.from_transformers(folder, kind)
    assert model.config.attention == kind
    assert all(torch.equal(a, b) for a, b in zip(exact.parameters(), model.parameters(), strict=True))
    for n in (1, 5, 23, POSITIONS):
        ids = torch.randint(3, V, (B, n))
        apart = (model(ids).logits - exact(ids).logits).norm() / exact(ids).logits.norm()
        if n == 1 or kind == "residual":  # which reads this few tokens exactly
            assert apart < 1e-5
        else:
            assert 1e-4 < apart < 1
    model.save_transformers(tmp_path / "back")  # with which transformers runs exact attention
    again = transformers.NystromformerForMaskedLM.from_pretrained(tmp_path / "back")
    ids = torch.randint(3, V, (B, N))
    torch.testing.assert_close(again(ids).logits, exact(ids).logits, rtol=1e-5, atol=1e-5)


def test_transformers_can_be_told_to_run_its_own_nystrom_attention_at_one_length(tmp_path):
    """With small weights, where its inverse is finished after its six steps too, and only one sample."""
    their_model(std=0.1).save_pretrained(tmp_path / "theirs")
    model = ours.NystromformerForMaskedLM.from_transformers(tmp_path / "theirs", "nystrom")
    model.save_transformers(tmp_path / "back", length=20)
    again = transformers.NystromformerForMaskedLM.from_pretrained(tmp_path / "back")
    assert again.config.segment_means_seq_len == 20
    ids = torch.randint(3, V, (1, 20))
    exact = ours.NystromformerForMaskedLM.from_transformers(tmp_path / "theirs", "exact")
    error = (model(ids).logits - exact(ids).logits).norm()
    assert (model(ids).logits - again(ids).logits).norm() < 0.01 * error
    with pytest.raises(RuntimeError):
        again(ids[:, :19])
    for length in (5, 22):
        with pytest.raises(ValueError, match=f"length must be a multiple of num_landmarks above it, 5: got {length}"):
            model.save_transformers(tmp_path / "no", length=length)


def test_a_classifier_begins_with_the_encoder_of_a_language_model(folder):
    with pytest.raises(ValueError, match=r"4 missing \(dense.bias.*5 left over \(decoder.bias, .*new_head=True"):
        ours.NystromformerForSequenceClassification.from_transformers(folder, "exact")
    model = ours.NystromformerForSequenceClassification.from_transformers(
        folder, "nystrom", new_head=True, num_labels=7, num_landmarks=3
    )
    source = ours.NystromformerForMaskedLM.from_transformers(folder, "nystrom")
    wanted, got = source.nystromformer.state_dict(), model.nystromformer.state_dict()
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[k], got[k]) for k in got)
    assert model.out_proj.weight.shape == (7, 12) and 0 < model.out_proj.weight.std() < 0.05
    assert model.nystromformer.encoder.blocks[0].attention.num_landmarks == 3
    bare = ours.NystromformerModel.from_transformers(folder, "exact", new_head=True)
    assert all(torch.equal(wanted[k], x) for k, x in bare.state_dict().items())


def test_a_head_begins_with_a_bare_encoder(tmp_path):
    theirs = their_model("Model")
    theirs.save_pretrained(tmp_path)
    model = ours.NystromformerForTokenClassification.from_transformers(tmp_path, "exact", new_head=True)
    ids = torch.randint(3, V, (B, N))
    torch.testing.assert_close(model.nystromformer(ids)[0], theirs(ids)[0], rtol=1e-5, atol=1e-5)


def test_old_files_hold_shared_tensors_twice_and_counters(folder):
    tensors = load_file(folder / "model.safetensors")
    want = ours.NystromformerForMaskedLM.from_transformers(folder, "exact").state_dict()
    (folder / "model.safetensors").unlink()
    tensors |= {
        "cls.predictions.decoder.weight": tensors["nystromformer.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
        "nystromformer.embeddings.position_ids": torch.arange(40)[None] + 2,
        "nystromformer.embeddings.token_type_ids": torch.zeros(1, 40, dtype=torch.long),
    }
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is the only file.*allow_pickle=True"):
        ours.NystromformerForMaskedLM.from_transformers(folder, "exact")
    got = ours.NystromformerForMaskedLM.from_transformers(folder, "exact", allow_pickle=True).state_dict()
    assert all(torch.equal(got[k], want[k]) for k in want)
    tensors["cls.predictions.decoder.weight"] = tensors["cls.predictions.decoder.weight"] + 1
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"word_embeddings.weight and cls.predictions.decoder.weight must be equal"):
        ours.NystromformerForMaskedLM.from_transformers(folder, "exact", allow_pickle=True)


def test_files_in_parts_are_read(tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = ours.NystromformerForMaskedLM.from_transformers(tmp_path, "exact")
    ids = torch.randint(3, V, (B, N))
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def rewrite(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("cls.predictions.bias"), r"1 missing \(decoder.bias\), 0 left over"),
        (
            lambda t: t.pop("nystromformer.encoder.layer.1.output.dense.bias"),
            r"1 missing \(nystromformer.encoder.blocks.1.ffn.2.bias\)",
        ),
        (
            lambda t: t.update({"nystromformer.encoder.layer.2.output.dense.bias": torch.zeros(12)}),
            r"1 left over \(nystromformer.encoder.blocks.2.ffn.2.bias\)",
        ),
        (
            lambda t: t.update({"cls.seq_relationship.bias": torch.zeros(2)}),
            "not names of .*: cls.seq_relationship.bias",
        ),
        (
            lambda t: t.update({"nystromformer.embeddings.LayerNorm.bias": torch.zeros(13)}),
            r"1 tensors are not of the shape .*embeddings.norm.bias: got \(13,\), needed \(12,\)",
        ),
    ],
)
def test_refuses_other_tensors(change, message, folder):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        ours.NystromformerForMaskedLM.from_transformers(folder, "exact")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type must be 'nystromformer': got 'bert'"),
        ({"model_type": "nystrom"}, "got 'nystrom'; from_pretrained reads it"),
        ({"inv_coeff_init_option": True}, "inv_coeff_init_option must be false: got True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be true: got False"),
        ({"hidden_act": "silu"}, "hidden_act must be one of .*: got 'silu'"),
        ({"add_cross_attention": True}, "add_cross_attention must be False"),
        ({"max_position_embeddings": 39}, r"embeddings.position.weight: got \(42, 12\), needed \(41, 12\)"),
    ],
)
def test_refuses_other_configs(changes, message, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        ours.NystromformerForMaskedLM.from_transformers(folder, "exact")


def test_refuses_what_is_no_folder_of_a_model(folder, tmp_path):
    with pytest.raises(ValueError, match=r"model_type must be 'nystrom': got 'nystromformer'.*from_transformers"):
        ours.NystromformerForMaskedLM.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"nowhere/config.json: no such file.*snapshot_download"):
        ours.NystromformerModel.from_transformers(tmp_path / "nowhere", "exact")
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=str(folder)):
        ours.NystromformerForMaskedLM.from_transformers(folder, "exact")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: no such file"):
        ours.NystromformerForMaskedLM.from_transformers(folder, "exact")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not JSON"):
        ours.NystromformerForMaskedLM.from_transformers(folder, "exact")


def test_a_field_that_is_left_out_has_transformers_default(folder):
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    del fields["max_position_embeddings"]
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"position.weight: got \(42, 12\), needed \(512, 12\)"):  # 510 + 2
        ours.NystromformerForMaskedLM.from_transformers(folder, "exact")


def test_writes_all_or_nothing(folder, tmp_path, monkeypatch):
    model = ours.NystromformerForMaskedLM.from_transformers(folder, "exact")
    before = sorted(folder.iterdir())
    with pytest.raises(FileExistsError, match="exists already; name a new or an empty folder"):
        model.save_transformers(folder)
    assert sorted(folder.iterdir()) == before
    with pytest.raises(FileExistsError):
        model.save_transformers(folder / "config.json")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            model.save_transformers(tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []
    model.save_transformers(tmp_path / "out")  # empty
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    model.config.conv_kernel_size = None
    with pytest.raises(ValueError, match="conv_kernel_size must be a number: got None"):
        model.save_transformers(tmp_path / "no")
    model.config.conv_kernel_size, model.config.norm_first = 5, True
    with pytest.raises(ValueError, match="norm_first must be False: got True"):
        model.save_transformers(tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("how", ["tile", "interpolate"])
@pytest.mark.parametrize("kind", ["nystrom", "exact"])
def test_longer_positions_read_longer_inputs(how, kind, folder, tmp_path):
    model = ours.NystromformerForMaskedLM.from_transformers(folder, kind)
    table = model.nystromformer.encoder.embeddings.position.weight.detach().clone()
    short, long = torch.randint(3, V, (B, POSITIONS)), torch.randint(3, V, (B, 100))
    before = model(short).logits
    with pytest.raises(ValueError, match=r"got 100, max_position_embeddings 40.*extend_positions\(100\)"):
        model(long)
    assert model.extend_positions(100, how) is model and model.config.max_position_embeddings == 100
    rows = model.nystromformer.encoder.embeddings.position.weight
    assert rows.shape == (102, 12) and rows.requires_grad and torch.equal(rows[:2], table[:2])
    for i in range(100):
        if how == "tile":
            want = table[2 + i % 40]
        else:
            at = i * 39 / 99
            low = min(int(at), 38)
            want = table[2 + low] + (at - low) * (table[3 + low] - table[2 + low])
        torch.testing.assert_close(rows[2 + i], want, rtol=1e-5, atol=1e-5)
    assert model(long).logits.isfinite().all()
    assert torch.equal(model(short).logits, before) == (how == "tile")
    model.save_pretrained(tmp_path / "ours")
    again = ours.NystromformerForMaskedLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(long).logits, model(long).logits)
    model.save_transformers(tmp_path / "back")
    back = transformers.NystromformerForMaskedLM.from_pretrained(tmp_path / "back")
    if kind == "exact":
        torch.testing.assert_close(back(long).logits, model(long).logits, rtol=1e-4, atol=1e-4)  # float32


def test_refuses_to_shorten_positions(folder):
    model = ours.NystromformerModel.from_transformers(folder, "exact", new_head=True).bfloat16()
    with pytest.raises(ValueError, match="at least the 40 positions that there are: got 39"):
        model.extend_positions(39)
    assert model.config.max_position_embeddings == 40
    assert model.extend_positions(80, "interpolate").encoder.embeddings.position.weight.dtype == torch.bfloat16


@pytest.mark.unhooked
def test_refuses_unknown_words(folder):
    with pytest.raises(ValueError, match="attention must be one of nystrom, exact, shift, residual: got 'linear'"):
        ours.NystromformerForMaskedLM.from_transformers(folder, "linear")
    model = ours.NystromformerForMaskedLM.from_transformers(folder, "exact")
    with pytest.raises(ValueError, match="how must be 'tile' or 'interpolate': got 'stretch'"):
        model.extend_positions(80, "stretch")
