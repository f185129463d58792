"""A slide's worth of patches in one pass: TransMIL's aggregator over a bag of 10,000 instances, and what it looks at.

    pip install 'nystrom[train]'
    python examples/pathology_bag.py        # about two minutes on a CPU; made-up features, no network

In TransMIL the swap is one line: `from nystrom.compat.lucidrains import NystromAttention`, the same arguments, the same
weights. A few instances of each positive bag carry a sign; only the bag has a label. The class token's row of the
attention matrix says which instances decided; the 10,001 x 10,001 matrix is never made.
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from nystrom import attention_rows
from nystrom.compat.lucidrains import NystromAttention


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a small aggregator on made-up bags, and read a large one."""

    instances: int = 10_000
    """Instances of the large bag (count)."""
    share: float = 0.02
    """Share of a positive bag's instances that carry the sign."""
    features: int = 1024
    """Width of an instance, as a patch encoder makes it."""
    dim: int = 512
    """Width of the aggregator; a multiple of 8."""
    num_landmarks: int = 256
    """Landmarks per head (count)."""
    steps: int = 60
    """Training steps (count)."""
    train_instances: int = 1000
    """Instances of a bag to train on: between half and twice as many (count)."""


class Layer(nn.Module):
    """TransMIL's TransLayer."""

    def __init__(self, dim: int, num_landmarks: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = NystromAttention(
            dim=dim,
            dim_head=dim // 8,
            heads=8,
            num_landmarks=num_landmarks,
            pinv_iterations=6,
            residual=True,
            dropout=0.1,
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))

    def read_by(self, x: Tensor, token: int) -> Tensor:
        """What one token reads of every token, (heads, n)."""
        attn = self.attn
        query, key, _ = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in attn.to_qkv(self.norm(x)).chunk(3, -1)
        )
        rows = attention_rows(
            query, key, torch.tensor([token]), num_landmarks=attn.num_landmarks, num_pinv_iters=attn.pinv_iterations
        )
        return rows[0, :, 0]


class Aggregator(nn.Module):
    """TransMIL without its position encoding, which needs patches in a grid."""

    def __init__(self, features: int, dim: int, num_landmarks: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(features, dim), nn.ReLU())
        self.class_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.first, self.second = Layer(dim, num_landmarks), Layer(dim, num_landmarks)
        self.norm = nn.LayerNorm(dim)
        self.classify = nn.Linear(dim, 2)

    def forward(self, bag: Tensor) -> Tensor:
        return self.classify(self.norm(self.second(self.first(self.tokens(bag)))[:, 0]))

    def tokens(self, bag: Tensor) -> Tensor:
        """The class token and one state per instance, (1, 1 + n, dim)."""
        return torch.cat([self.class_token, self.project(bag)], dim=1)

    def class_token_reads(self, bag: Tensor) -> Tensor:
        """The weights of the instances in the class token's row, for the heads of both layers, (16, n)."""
        x = self.tokens(bag)
        return torch.cat([self.first.read_by(x, 0), self.second.read_by(self.first(x), 0)])[:, 1:]


def run(config: Config) -> None:
    torch.manual_seed(0)
    sign = torch.randn(config.features)
    model = Aggregator(config.features, config.dim, config.num_landmarks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses = []
    for step in range(config.steps):
        label = step % 2
        instances = int(torch.randint(config.train_instances // 2, 2 * config.train_instances, ()))
        bag, _ = make_bag(instances, label * config.share, sign)
        loss = F.cross_entropy(model(bag), torch.tensor([label]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    quarter = -(-config.steps // 4)
    first, last = (sum(part) / quarter for part in (losses[:quarter], losses[-quarter:]))
    print(f"{config.steps} bags to train on: mean loss {first:.2f} in the first quarter, {last:.2f} in the last")

    model.eval()
    negative, _ = make_bag(config.instances, 0, sign)
    bag, carries = make_bag(config.instances, config.share, sign)
    with torch.no_grad():
        for kind, one in (("without the sign", negative), ("with it", bag)):
            start = time.perf_counter()
            probability = model(one).softmax(-1)[0, 1]
            print(
                f"A bag of {config.instances:,} {kind}: positive with {probability:.1%}, "
                f"read in {time.perf_counter() - start:.1f} s"
            )
        reads = model.class_token_reads(bag)  # (layers * heads, n)
    attended = (reads / reads.mean(1, keepdim=True)).amax(0)  # by the most uneven head; a mean over heads hides it
    best = attended.topk(int(carries.sum())).indices
    found = int(carries[best].sum())
    print(f"Of the {len(best)} instances that a head of the class token reads most, {found} carry the sign;")
    print(f"by chance {len(best) * config.share:.1f} would. The first five, against the head's mean weight:")
    for place in best[:5].tolist():
        print(f"  instance {place:6}  {attended[place]:6.2f} times  {'carries it' if carries[place] else ''}")


def make_bag(instances: int, share: float, sign: Tensor) -> tuple[Tensor, Tensor]:
    """Noise, (1, n, features); in some random instances with the sign; and which those are."""
    carries = torch.zeros(instances, dtype=torch.bool)
    carries[torch.randperm(instances)[: round(share * instances)]] = True
    return (torch.randn(instances, len(sign)) + carries[:, None] * sign)[None], carries


if __name__ == "__main__":
    run(tyro.cli(Config))
