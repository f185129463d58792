"""The encoder and its heads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nystrom import EncoderConfig, MaskedLM, NystromAttention, SequenceClassifier

CONFIG = EncoderConfig(
    vocab_size=31,
    max_length=40,
    embed_dim=12,
    num_layers=2,
    num_heads=3,
    ffn_dim=20,
    num_landmarks=5,
    conv_kernel_size=7,
)
MASK = torch.arange(33) < torch.tensor([33, 17])[:, None]


def replace(**changes) -> EncoderConfig:
    return EncoderConfig(**(CONFIG.__dict__ | changes))


def ids() -> torch.Tensor:
    return torch.randint(31, (2, 33))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", ["nystrom", "softmax"])
def test_padding_changes_no_valid_score(norm_first, kind):
    model = MaskedLM(replace(norm_first=norm_first, kind=kind)).double().eval()
    padded = ids()
    before = model(padded, MASK).logits
    alone = model(padded[1:, :17]).logits
    torch.testing.assert_close(before[1, :17], alone[0], rtol=1e-9, atol=1e-9)
    padded[1, 17:] = torch.randint(31, (16,))
    assert torch.equal(model(padded, MASK).logits[MASK], before[MASK])


@pytest.mark.parametrize("norm_first", [True, False])
def test_equals_the_forward_pass_written_out(norm_first):
    config = replace(norm_first=norm_first, num_pinv_iters=4)
    model = MaskedLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that every bias, norm and position counts
            parameter.copy_(torch.randn_like(parameter) / 3)
    w = model.state_dict()
    tokens = ids()

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attend(x, name):
        attention = NystromAttention(12, 3, num_landmarks=5, num_pinv_iters=4, conv_kernel_size=7).double()
        attention.load_state_dict({k.removeprefix(f"{name}."): v for k, v in w.items() if k.startswith(f"{name}.")})
        return attention(x, MASK)

    def ffn(x, name):
        return linear(F.gelu(linear(x, f"{name}.0")), f"{name}.2")

    x = w["encoder.embeddings.token.weight"][tokens] + w["encoder.embeddings.position.weight"][:33]
    if not norm_first:
        x = norm(x, "encoder.embeddings.norm")
    for i in range(2):
        block = f"encoder.blocks.{i}"
        if norm_first:
            x = x + attend(norm(x, f"{block}.attention_norm"), f"{block}.attention")
            x = x + ffn(norm(x, f"{block}.ffn_norm"), f"{block}.ffn")
        else:
            x = norm(x + attend(x, f"{block}.attention"), f"{block}.attention_norm")
            x = norm(x + ffn(x, f"{block}.ffn"), f"{block}.ffn_norm")
    if norm_first:
        x = norm(x, "encoder.norm")
    x = norm(F.gelu(linear(x, "transform")), "norm")
    want = x @ w["encoder.embeddings.token.weight"].T + w["output_bias"]
    torch.testing.assert_close(model(tokens, MASK).logits[MASK], want[MASK], rtol=1e-9, atol=1e-9)


def test_every_size_reaches_its_part():
    config = EncoderConfig(
        vocab_size=31, max_length=41, embed_dim=12, num_layers=5, num_heads=3, ffn_dim=20, dropout=0.37,
        num_landmarks=7, num_pinv_iters=8, conv_kernel_size=9, kind="softmax",
    )  # fmt: skip
    model = MaskedLM(config)
    block = model.encoder.blocks[-1]
    assert model.encoder.embeddings.token.weight.shape == (31, 12)
    assert model.encoder.embeddings.position.weight.shape == (41, 12)
    assert len(model.encoder.blocks) == 5 and block.ffn[0].out_features == 20
    attention = block.attention
    assert (attention.num_heads, attention.num_landmarks, attention.num_pinv_iters) == (3, 7, 8)
    assert attention.conv.kernel_size == (9, 1) and attention.kind == "softmax" and attention.dropout == 0.37
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.37}
    assert len([m for m in model.modules() if isinstance(m, nn.Dropout)]) == 1 + 5


def test_initialisation_is_berts():
    model = MaskedLM(replace(vocab_size=2000, embed_dim=96))
    assert abs(model.encoder.embeddings.token.weight.std().item() - 0.02) < 0.001
    assert abs(model.encoder.blocks[0].attention.query.weight.std().item() - 0.02) < 0.001
    assert (model.encoder.blocks[0].ffn[0].bias == 0).all()


def test_dropout_follows_both_branches():
    """With one branch's last layer zeroed, only the other branch's dropout can make two passes differ."""
    for silent in ("attention.out", "ffn.2"):
        model = MaskedLM(replace(num_layers=1, dropout=0.5)).train()
        model.encoder.embeddings.dropout.p = 0.0
        block = model.encoder.blocks[0]
        block.attention.dropout = 0.0
        nn.init.zeros_(block.get_submodule(silent).weight)
        tokens = ids()
        assert not torch.equal(model(tokens).logits, model(tokens).logits)


def test_loss_of_a_half_precision_model_does_not_overflow():
    model = MaskedLM(replace(max_length=2048)).half()
    tokens = torch.randint(31, (8, 2048))
    loss = model(tokens, None, tokens).loss
    assert loss.isfinite() and abs(loss.item() - 3.434) < 0.2  # ln 31


@pytest.mark.parametrize("form", ["(b, 1, 1, n)", "float"])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_classifier_takes_every_form_of_mask(form, pooling):
    model = SequenceClassifier(CONFIG, 4, pooling=pooling).eval()
    tokens = ids()
    mask = MASK[:, None, None] if form == "(b, 1, 1, n)" else torch.zeros(2, 33).masked_fill(~MASK, -torch.inf)
    assert torch.equal(model(tokens, mask).logits, model(tokens, MASK).logits)


def test_post_norm_block_equals_torchs_layer():
    """Without convolution and with exact attention, a block is torch's TransformerEncoderLayer."""
    config = replace(norm_first=False, kind="softmax", conv_kernel_size=None, num_layers=1)
    block = MaskedLM(config).double().eval().encoder.blocks[0]
    layer = nn.TransformerEncoderLayer(12, 3, 20, activation=F.gelu, batch_first=True).double().eval()
    ours = block.state_dict()
    packed = {
        part: torch.cat([ours[f"attention.{name}.{part}"] for name in ("query", "key", "value")])
        for part in ("weight", "bias")
    }
    theirs = {"self_attn.in_proj_weight": packed["weight"], "self_attn.in_proj_bias": packed["bias"]}
    names = {"self_attn.out_proj": "attention.out", "linear1": "ffn.0", "linear2": "ffn.2"}
    names |= {"norm1": "attention_norm", "norm2": "ffn_norm"}
    theirs |= {f"{a}.{part}": ours[f"{b}.{part}"] for a, b in names.items() for part in ("weight", "bias")}
    layer.load_state_dict(theirs)
    x = torch.randn(2, 33, 12, dtype=torch.float64)
    got, want = block(x, MASK), layer(x, src_key_padding_mask=~MASK)
    torch.testing.assert_close(got[MASK], want[MASK], rtol=1e-9, atol=1e-9)


def test_labels_select_the_tokens_that_are_scored():
    model = MaskedLM(CONFIG).eval()
    tokens = ids()
    labels = torch.where(torch.rand(2, 33) < 0.3, tokens, -100)
    everything = model(tokens, MASK).logits
    loss, logits = model(tokens, MASK, labels)
    torch.testing.assert_close(logits, everything[labels != -100])
    torch.testing.assert_close(loss, F.cross_entropy(everything.flatten(0, 1), labels.flatten()))


def test_a_batch_without_labels_has_zero_loss_and_gradient():
    model = MaskedLM(CONFIG)
    loss = model(ids(), None, torch.full((2, 33), -100)).loss
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_output_layer_is_tied_and_saved_once():
    model = MaskedLM(CONFIG)
    holders = [name for name, p in model.state_dict().items() if tuple(p.shape) == (31, 12)]
    assert holders == ["encoder.embeddings.token.weight"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_classifier_pools_valid_tokens_only(pooling, side):
    """Pooling alone is under test, so the encoder is replaced by one that returns its embeddings."""
    model = SequenceClassifier(replace(num_layers=0), 4, pooling=pooling).double().eval()
    tokens = ids()[:1]
    mask = torch.zeros(1, 33, dtype=torch.bool)
    valid = range(10, 33) if side == "left" else range(23)
    mask[:, list(valid)] = True
    states = model.encoder(tokens)[0, list(valid)]
    want = model.classifier(states.mean(0) if pooling == "mean" else states[0])
    torch.testing.assert_close(model(tokens, mask).logits[0], want, rtol=1e-9, atol=1e-9)


def test_classifier_learns_a_rule():
    """Which of two tokens is commoner: solvable only from the tokens."""
    config = EncoderConfig(
        vocab_size=4, max_length=24, embed_dim=16, num_layers=1, num_heads=2, ffn_dim=32, dropout=0.0, num_landmarks=4
    )
    model = SequenceClassifier(config, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        tokens = torch.randint(2, (64, 23), generator=generator)
        loss = model(tokens, None, (tokens.sum(1) > 11).long()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens = torch.randint(2, (500, 23), generator=generator)
    right = model.eval()(tokens).logits.argmax(-1) == (tokens.sum(1) > 11)
    assert right.float().mean() > 0.9


@pytest.mark.unhooked
def test_refuses_with_the_values():
    with pytest.raises(ValueError, match="at most max_length tokens long: got 41, max_length 40"):
        MaskedLM(CONFIG)(torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(ValueError, match="max_length must be positive: got 0"):
        MaskedLM(replace(max_length=0))
    with pytest.raises(ValueError, match="pooling must be 'mean' or 'first': got 'max'"):
        SequenceClassifier(CONFIG, 2, pooling="max")
