"""Reformer: attention within chunks of tokens that hash alike (Kitaev et al. 2020)."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nystrom._precision import full_precision
from nystrom.baselines.draws import fresh, stream
from nystrom.baselines.tokens import finish, prepare

BLOCK = 1 << 22  # hash values compared at a time
SELF = -1e5  # a token's logit with itself: weighs nothing beside any other


class ReformerAttention(nn.Module):
    """LSH attention: a token reads those that lie near it once all are sorted by a random hash, in several rounds.

    The key is the query scaled to length 1, so a logit is ``q · q' / |q'|``. In each round tokens are sorted by bucket,
    and by place within one, and cut into chunks; a chunk reads itself and the one before. A token reads itself only
    where it reads nothing else. The rounds' results are weighted by their normalisers, so a token met in two of them
    counts twice. With r rounds and chunks of l tokens: memory O(b h n r (d + l)), time O(b h n r d (l + n / l)), the
    last term for the hashes.

    Args:
        num_hashes: rounds (count).
        chunk_length: tokens of a chunk (count). A sample with t valid tokens has 2 ⌈t / chunk_length⌉ buckets; up to
            chunk_length tokens get exact attention, themselves excluded.
        seed: of the hashes in evaluation. In training they are new in each call, from torch's global generator.

    Raises:
        ValueError: a count below 1.

    Source: Kitaev et al. 2020, arXiv:2001.04451, section 2 and appendix A; like Hugging Face's code, which the
    Nyströmformer authors' LRA runs call, without the correction for tokens met twice. Unlike in that code, the first
    chunk of a round does not look back at the last.
    """

    def __init__(self, num_hashes: int = 2, chunk_length: int = 64, *, seed: int = 0) -> None:
        super().__init__()
        if min(num_hashes, chunk_length) < 1:
            raise ValueError(f"num_hashes and chunk_length must be at least 1: got {num_hashes} and {chunk_length}")
        self.num_hashes = num_hashes
        self.chunk_length = chunk_length
        self.seed = seed

    def forward(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n v"],
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b h n v"]:
        """Attend.

        Raises:
            ValueError: key is another tensor than query; shapes or dtypes disagree; mask is not bool (b, n).
        """
        if key is not query:
            raise ValueError("Reformer has no keys of its own: got a key that is not the query; pass the query twice")
        with full_precision(query.device):
            q, _, v, mask = prepare(query, key, value, mask)
            rounds = hashed_order(q, mask, self.num_hashes, self.chunk_length, fresh(self.seed, self.training))
            outs, totals = zip(*(_attend(q, v, mask, order, self.chunk_length) for order in rounds), strict=True)
            out = (torch.stack(totals).softmax(0)[..., None] * torch.stack(outs)).sum(0)
            return finish(out, mask, value.dtype)


@torch.no_grad()
def hashed_order(
    query: Float[Tensor, "b h n d"], mask: Bool[Tensor, "b n"], num_hashes: int, chunk_length: int, seed: int
) -> list[Int[Tensor, "b h n"]]:
    """The places of the tokens sorted by hash, the masked last, for each round."""
    h, n, d = query.shape[1:]
    num_pairs = -(-mask.sum(-1) // chunk_length)  # (b,): the buckets of x and of -x
    rotations = stream(torch.randn, -(-n // chunk_length), (num_hashes, h, d), seed).to(query)
    absent = torch.arange(len(rotations), device=query.device) >= num_pairs[:, None]  # of the batch's longest sample
    orders = []
    for rotation in rotations.permute(1, 2, 3, 0):  # (h, d, pairs)
        buckets = []
        for part in query.split(max(1, BLOCK // absent.numel() // h), dim=2):
            rotated = part @ rotation
            rotated = torch.cat([rotated, -rotated], -1)
            buckets.append(rotated.masked_fill(absent.repeat(1, 2)[:, None, None], -torch.inf).argmax(-1))
        bucket = torch.cat(buckets, 2).masked_fill(~mask[:, None], 2 * len(rotations))
        orders.append(bucket.sort(dim=-1, stable=True).indices)
    return orders


def _attend(
    q: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n v"],
    mask: Bool[Tensor, "b n"],
    order: Int[Tensor, "b h n"],
    length: int,
) -> tuple[Float[Tensor, "b h n v"], Float[Tensor, "b h n"]]:
    """One round: what each token reads, and the logarithm of its normaliser."""
    h, n, d = q.shape[1:]
    real = mask[:, None].expand(-1, h, -1)
    q, v, real = (x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[3])) for x in (q, v, real[..., None]))
    q, v, real = (F.pad(x, (0, 0, 0, -n % length)).unflatten(2, (-1, length)) for x in (q, v, real))
    k = q * (q.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * d**-0.5
    k, v, real = (torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], 3) for x in (k, v, real))
    logits = q @ k.mT  # (b, h, chunks, length, 2 length)
    itself = F.pad(torch.eye(length, dtype=torch.bool, device=q.device), (length, 0))
    logits = logits.masked_fill(itself, SELF)
    logits = logits.masked_fill(~real.mT, torch.finfo(logits.dtype).min)
    total = logits.logsumexp(-1, keepdim=True)
    out = (logits - total).exp() @ v
    out, total = (x.flatten(2, 3)[:, :, :n] for x in (out, total))
    back = order.argsort(-1)
    return out.gather(2, back[..., None].expand_as(out)), total[..., 0].gather(2, back)
