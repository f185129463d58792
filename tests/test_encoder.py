"""The encoder and its heads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nystrom import EncoderConfig, MaskedLM, SequenceClassifier

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
    with pytest.raises(ValueError, match="pooling must be 'mean' or 'first': got 'max'"):
        SequenceClassifier(CONFIG, 2, pooling="max")
