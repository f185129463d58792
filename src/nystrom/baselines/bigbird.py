"""BigBird: attention between blocks of tokens: neighbours, global ones, random ones (Zaheer et al. 2020)."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nystrom._precision import full_precision
from nystrom.baselines.draws import stream
from nystrom.baselines.tokens import finish, prepare


class BigBirdAttention(nn.Module):
    """Softmax over blocks of tokens: the own and its two neighbours, the first and the last, and some at random.

    The first block and the last that holds a valid token are global: they read everything. The random blocks are
    others than those, each head's own, and depend on the seed and on the sample's number of blocks alone. With s =
    5 + num_random, time O(b h n s block d), and memory O(b h n s d) where torch has a fused kernel.

    Args:
        block: tokens of a block (count).
        num_random: random blocks that each block reads (count), or as many as are left.
        seed: of their choice. Give each layer another one.

    Raises:
        ValueError: block below 1 or num_random below 0.

    Source: Zaheer et al. 2020, arXiv:2007.14062, section 2 and appendix D, "internal" global blocks.
    """

    def __init__(self, block: int = 64, num_random: int = 3, *, seed: int = 0) -> None:
        super().__init__()
        if block < 1 or num_random < 0:
            raise ValueError(f"block must be at least 1 and num_random at least 0: got {block} and {num_random}")
        self.block = block
        self.num_random = num_random
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
            ValueError: shapes or dtypes disagree; mask is not bool (b, n).
        """
        with full_precision(query.device):
            q, k, v, real = prepare(query, key, value, mask)
            n, block = q.shape[2], self.block
            q, k, v = (F.pad(x, (0, 0, 0, -n % block)).unflatten(2, (-1, block)) for x in (q, k, v))
            blocks = F.pad(real, (0, -n % block)).unflatten(1, (-1, block))  # (b, r, block)
            row = torch.arange(blocks.shape[1], device=q.device)
            last = (blocks.any(-1) * row).amax(-1)  # (b,)
            index, present = read_blocks(last, blocks.shape[1], q.shape[1], self.num_random, self.seed)
            out = _sparse(q, k, v, blocks, index, present)
            first, final = _everything(q, k, v, blocks, last)
            out = torch.where((row == 0)[:, None, None], first[:, :, None], out)
            out = torch.where((row == last[:, None])[:, None, :, None, None], final[:, :, None], out)
            return finish(out.flatten(2, 3)[:, :, :n], real, value.dtype)


def read_blocks(
    last: Int[Tensor, " b"], num_blocks: int, num_heads: int, num_random: int, seed: int
) -> tuple[Int[Tensor, "b h r s"], Bool[Tensor, "b h r s"]]:
    """The blocks that each block reads, and which of them there are: none is read twice."""
    row = torch.arange(num_blocks, device=last.device)[None, None, :, None]
    last = last[:, None, None, None].expand(-1, num_heads, num_blocks, 1)
    near = torch.cat([row - 1, row, row + 1], -1).expand(*last.shape[:3], 3)
    index = torch.cat([near, torch.zeros_like(last), last], -1)
    present = torch.cat([(near >= 0) & (near <= last), (row > 1).expand_as(last), last > row + 1], -1)
    chances = stream(torch.rand, num_blocks, (num_heads, num_random), seed).to(last.device).transpose(0, 1)
    for chance in chances.unbind(-1):  # (h, r)
        free = last[..., 0] + 1 - present.sum(-1)  # blocks not read yet
        pick = (chance * free).long()  # counted among those
        for taken in index.masked_fill(~present, num_blocks).sort(-1).values.unbind(-1):
            pick = pick + (pick >= taken)
        index, present = torch.cat([index, pick[..., None]], -1), torch.cat([present, free[..., None] > 0], -1)
    return index.clamp(0, num_blocks - 1), present


def _sparse(
    q: Float[Tensor, "b h r t d"],
    k: Float[Tensor, "b h r t d"],
    v: Float[Tensor, "b h r t v"],
    real: Bool[Tensor, "b r t"],
    index: Int[Tensor, "b h r s"],
    present: Bool[Tensor, "b h r s"],
) -> Float[Tensor, "b h r t v"]:
    """Each block's tokens read those of its s blocks."""
    b, h, r, s = index.shape
    keys, values, reads = (
        x.gather(2, index.flatten(2)[..., None, None].expand(-1, -1, -1, *x.shape[3:])).unflatten(2, (r, s))
        for x in (k, v, real[:, None, :, :, None].expand(-1, h, -1, -1, 1))
    )
    reads = (reads[..., 0] & present[..., None]).flatten(3)  # (b, h, r, s t)
    reads = reads | ~reads.any(-1, keepdim=True)  # padding with nothing to read, or there would be a NaN
    q, keys, values = (x.flatten(0, 1) for x in (q, keys.flatten(3, 4), values.flatten(3, 4)))
    out = F.scaled_dot_product_attention(q, keys, values, reads.flatten(0, 1)[:, :, None])
    return out.unflatten(0, (b, h))


def _everything(
    q: Float[Tensor, "b h r t d"],
    k: Float[Tensor, "b h r t d"],
    v: Float[Tensor, "b h r t v"],
    real: Bool[Tensor, "b r t"],
    last: Int[Tensor, " b"],
) -> tuple[Float[Tensor, "b h t v"], Float[Tensor, "b h t v"]]:
    """What the first and the last block's tokens read."""
    final = q.gather(2, last[:, None, None, None, None].expand(-1, q.shape[1], 1, *q.shape[3:]))[:, :, 0]
    reads = real.flatten(1)
    reads = (reads | ~reads.any(-1, keepdim=True))[:, None, None]
    out = F.scaled_dot_product_attention(torch.cat([q[:, :, 0], final], 2), k.flatten(2, 3), v.flatten(2, 3), reads)
    first, final = out.chunk(2, 2)
    return first, final
