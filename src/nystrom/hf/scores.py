"""How well a pretraining model predicts held-out text: what Trainer is handed, and makes of it."""

import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from nystrom.hf.modeling import IGNORED

if TYPE_CHECKING:
    from transformers import EvalPrediction

NAMES = ("accuracy", "loss_nats", "perplexity", "sentence_order_accuracy")


def place_predictions(logits: Any, labels: Any) -> tuple[Tensor, ...]:
    """Predicted id and loss at each labelled token, elsewhere -100 and 0: small, and the same shape in every batch.
    Third, with sentence order, the answer to that.
    """
    predicted, order = logits if isinstance(logits, tuple) else (logits, None)
    wanted = labels[0] if isinstance(labels, tuple) else labels
    labelled = wanted != IGNORED
    predictions, losses = wanted.new_full(wanted.shape, IGNORED), wanted.new_zeros(wanted.shape, dtype=torch.float32)
    predictions[labelled] = predicted.argmax(-1)
    losses[labelled] = torch.nn.functional.cross_entropy(predicted.float(), wanted[labelled], reduction="none")
    return (predictions, losses) if order is None else (predictions, losses, order.argmax(-1))


def score(evaluated: "EvalPrediction") -> dict[str, float]:
    """Part of the labelled tokens predicted right, and their mean loss: per token, however they fell into batches. With
    sentence order, part of the labelled blocks whose order was told.
    """
    predictions, losses, *order = cast("tuple[np.ndarray, ...]", evaluated.predictions)
    labels, *swapped = cast("tuple[np.ndarray, ...]", evaluated.label_ids) if order else (evaluated.label_ids,)
    labelled = np.asarray(labels) != IGNORED
    accuracy, loss = (predictions == labels)[labelled].mean(), losses[labelled].mean()
    found = {"score": accuracy, "accuracy": accuracy, "loss_nats": loss, "perplexity": math.exp(loss)}
    if order:
        has_order = np.asarray(swapped[0]) != IGNORED
        found["sentence_order_accuracy"] = (order[0] == swapped[0])[has_order].mean() if has_order.any() else 0.0
    return {name: float(value) for name, value in found.items()}
