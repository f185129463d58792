"""What a training run will take, before it is begun."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 3


def estimate(
    model: nn.Module, batches: Iterator[dict[str, Tensor]], per_step: int, bfloat16: bool
) -> dict[str, int | float]:
    """Train for a few real steps.

    Args:
        model: changed by it; it goes to the GPU where there is one.
        batches: at least 4.
        per_step: batches in an optimiser step (count); one of each step is timed.
        bfloat16: whether to multiply in it.

    Returns:
        bytes of weights, gradients and AdamW's moments ("weights"), and of what a batch's backward pass keeps
        ("activations"); seconds of a step ("seconds"), the first one, slower than those that follow, not counted.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = model.to(device).train()
    optimiser = torch.optim.AdamW(model.parameters())
    kept, times = 0, []
    for batch in islice(batches, STEPS + 1):
        begin = time.monotonic()
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        with _saved(model) as sizes, torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.monotonic() - begin)
        kept = max(kept, sum(sizes.values()))
    weights = 4 * sum(p.numel() * p.element_size() for p in model.parameters())
    return {"weights": weights, "activations": kept, "seconds": per_step * sum(times[1:]) / len(times[1:])}


@contextmanager
def _saved(model: nn.Module) -> Iterator[dict[Any, int]]:
    """Bytes of each tensor that the forward pass keeps for the backward one, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[Any, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
