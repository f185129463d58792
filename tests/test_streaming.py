"""Blocks worked through chunk by chunk: the same numbers and gradients, in less memory."""

from dataclasses import replace

import pytest
import torch

from nystrom import EncoderConfig, MaskedLM
from nystrom.streaming import stream_blocks

CONFIG = EncoderConfig(
    vocab_size=11, max_length=80, embed_dim=12, num_layers=2, num_heads=3, ffn_dim=16, num_landmarks=6, dropout=0.0
)


def make(**changes):
    torch.manual_seed(7)
    return MaskedLM(replace(CONFIG, **{"conv_kernel_size": 9} | changes)).double()


def learn(model, ids, mask, labels):
    out = model(ids, mask, labels)
    out.loss.backward()
    return [out.loss.detach(), out.logits.detach(), *(parameter.grad for parameter in model.parameters())]


SHAPES = [{}, {"norm_first": False}, {"num_landmarks": 70}, {"conv_kernel_size": 1}, {"conv_kernel_size": None}]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [9, 25, 66, 67, 100])
def test_chunk_by_chunk_is_all_at_once(changes, masked, chunk):
    whole, streamed = make(**changes), stream_blocks(make(**changes), chunk)
    ids, mask = torch.randint(1, 11, (3, 67)), None
    if masked:
        mask = torch.arange(67) < torch.tensor([[67], [40], [0]])
        mask[0] = torch.rand(67) < 0.7
    labels = torch.where(torch.rand(3, 67) < 0.5, ids, -100)
    assert list(whole.state_dict()) == list(streamed.state_dict())
    for got, want in zip(learn(streamed, ids, mask, labels), learn(whole, ids, mask, labels), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_dropout_is_the_same_when_a_chunk_is_made_again():
    """A gradient of dropped-out numbers that were drawn anew would be of another function."""
    model = stream_blocks(make(dropout=0.3), 16)
    ids = torch.randint(1, 11, (2, 67))
    weight = model.encoder.blocks[0].attention.value.weight

    def loss():
        torch.manual_seed(5)
        return model.encoder(ids).square().mean()

    (grad,) = torch.autograd.grad(loss(), weight)
    moved = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight[2, 3] += step
            moved.append(loss())
            weight[2, 3] -= step
    assert abs((moved[0] - moved[1]) / 2e-6 - grad[2, 3]) < 1e-8 + 1e-5 * abs(grad[2, 3])


def test_in_bfloat16_under_autocast():
    ids = torch.randint(1, 11, (2, 67))
    outs = []
    for model in (make().float(), stream_blocks(make().float(), 16)):
        with torch.autocast("cpu", torch.bfloat16):
            outs.append(model.encoder(ids))
    exact = make().encoder(ids).float()
    errors = [(out.float() - exact).norm() for out in outs]
    assert outs[0].dtype == outs[1].dtype and errors[1] < 1.5 * errors[0]


def test_nothing_of_the_length_is_kept_but_what_goes_in_and_out():
    """Numbers that autograd saves, in arrays as long as the sequence."""
    kept = {}
    for name, model in (("whole", make()), ("streamed", stream_blocks(make(conv_kernel_size=3), 8))):
        x = torch.randn(1, 64, 12, dtype=torch.float64, requires_grad=True)
        seen = set()

        def pack(saved, seen=seen):
            if saved.numel() >= 64:
                seen.add((saved.untyped_storage().data_ptr(), saved.untyped_storage().nbytes() // 8))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            model.encoder.blocks[0](x)
        kept[name] = sum(size for _, size in seen)
    assert kept["streamed"] < kept["whole"] / 3


@pytest.mark.unhooked
def test_what_cannot_be_streamed_says_why():
    with pytest.raises(ValueError, match="no Block in the model, so nothing to stream: got Linear"):
        stream_blocks(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="chunk must be at least 1: got 0"):
        stream_blocks(make(), 0)
    with pytest.raises(ValueError, match="chunk must be at least the convolution's width: got 8 and 9"):
        stream_blocks(make(), 8)
    with pytest.raises(ValueError, match="can be streamed: got 'shift' and 'segment_means'"):
        stream_blocks(make(kind="shift"))
    assert "forward" not in vars(make().encoder.blocks[0])
