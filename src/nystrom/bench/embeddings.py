"""What another attention in every layer does to a model's states and to the embeddings of whole texts."""

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nystrom.bench.approximations import Attend
from nystrom.bench.texts import Texts
from nystrom.models import replaced

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def states(model: "PreTrainedModel", ids: Int[Tensor, "t n"], attend: Attend | None = None) -> Float[Tensor, "t n c"]:
    """The last hidden states, text by text; with `attend` instead of the attention of every layer, if given."""

    def in_a_layer(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, _: int) -> Tensor:
        assert attend is not None
        return attend(query, key, value, mask, scale)

    with nullcontext() if attend is None else replaced(model, in_a_layer), torch.no_grad():
        return torch.cat([model(input_ids=each[None]).last_hidden_state for each in ids])


def embed(model: "PreTrainedModel", ids: Int[Tensor, "t n"], attend: Attend | None = None) -> Float[Tensor, "t c"]:
    """The mean of each text's last hidden states."""
    return torch.cat([states(model, each[None], attend).mean(1) for each in ids])


def compare(swapped: Float[Tensor, "t n c"], exact: Float[Tensor, "t n c"]) -> dict[str, float]:
    """How far the states are apart, and the texts' embeddings, which are the mean over tokens.

    Returns:
        hidden_error, ‖swapped - exact‖ / ‖exact‖ over all texts; cosine_mean and cosine_min over texts; nearest, the
        share of texts whose nearest other text, among the exact embeddings, stays the same.
    """
    ours, truth = swapped.mean(1), exact.mean(1)
    cosine = F.cosine_similarity(ours, truth)
    return {
        "hidden_error": ((swapped - exact).norm() / exact.norm()).item(),
        "cosine_mean": cosine.mean().item(),
        "cosine_min": cosine.min().item(),
        "nearest": (nearest_other(ours, truth) == nearest_other(truth, truth)).double().mean().item(),
    }


def nearest_other(queries: Float[Tensor, "t c"], index: Float[Tensor, "t c"]) -> Int[Tensor, " t"]:
    """For each query the row of `index` with the largest cosine, its own row left out."""
    cosine = F.normalize(queries, dim=-1) @ F.normalize(index, dim=-1).mT
    return cosine.fill_diagonal_(-2.0).argmax(-1)


class RidgeProbe:
    """A linear classifier of embeddings, by least squares with a ridge as large as a feature's mean sum of squares."""

    def __init__(self, embeddings: Float[Tensor, "t c"], labels: Int[Tensor, " t"]) -> None:
        x = F.normalize(embeddings.double(), dim=-1)
        self.mean = x.mean(0)
        x = x - self.mean
        gram = x.mT @ x
        ridge = gram.diagonal().mean() * torch.eye(len(gram), dtype=x.dtype)
        targets = F.one_hot(labels).to(x.dtype)
        self.bias = targets.mean(0)
        self.weights = torch.linalg.solve(gram + ridge, x.mT @ (targets - self.bias))

    def accuracy(self, embeddings: Float[Tensor, "t c"], labels: Int[Tensor, " t"]) -> float:
        """The share of right labels."""
        x = F.normalize(embeddings.double(), dim=-1) - self.mean
        return ((x @ self.weights + self.bias).argmax(-1) == labels).double().mean().item()


class EndToEnd:
    """The model with another attention in every layer, against itself."""

    def __init__(self, model: "PreTrainedModel", ids: Int[Tensor, "t n"], probed: Texts) -> None:
        self.model, self.ids, self.exact = model, ids, states(model, ids)
        self.probe, half = None, len(probed.ids) // 2
        if half:
            embeddings = embed(model, probed.ids)
            self.probe = RidgeProbe(embeddings[:half], probed.labels[:half])
            self.tests = Texts(probed.ids[half:], probed.labels[half:])
            right = self.probe.accuracy(embeddings[half:], self.tests.labels)
            self.about = {"probe_texts": len(probed.ids) - half, "probe_exact": right}

    def measure(self, attend: Attend) -> dict[str, float]:
        """What `compare` says, and the accuracy, on these embeddings, of a probe that was fitted to exact ones."""
        numbers = compare(states(self.model, self.ids, attend), self.exact)
        if self.probe is None:
            return numbers
        right = self.probe.accuracy(embed(self.model, self.tests.ids, attend), self.tests.labels)
        return numbers | {"probe": right} | self.about
