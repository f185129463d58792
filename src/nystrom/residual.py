"""Residual-corrected Nyström attention: near keys exactly, all others through their clusters, at linear cost.

The keys are put into m clusters of near ones (_tree.py). The queries of a block attend, in one softmax, to

    the exact keys Ω     the `window` tokens around the block, and the `top_k` others that weigh most for one of them
    m cluster means      each cluster c without Ω, as the block's mean query q̄ reads it: with w_j = exp(q̄·k_j),

        mass_c = Σ w_j,   k_c = Σ w_j k_j / mass_c,   v_c = Σ w_j v_j / mass_c      j in c, not in Ω
        logit of a query q for c:  log mass_c + (q - q̄)·k_c

At q = q̄ this logit has the value and the slope of log Σ exp(q·k_j). The weights are positive and sum to one, and the
result is exact where Ω is every key, or every cluster is a single key. From 32 m keys on, cells of a few near keys
enter these sums as one. The choice of keys is not differentiated; everything else is.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nystrom import _cpu
from nystrom._choice import LOW, Keys, choose, lay_out
from nystrom._opaque import in_compile, opaque
from nystrom._precision import full_precision
from nystrom._tree import Tree, grow, rows
from nystrom._validate import check_attention_inputs, check_options, check_token_mask, key_padding_mask

CPU_BLOCKS = 32
"""Blocks at a time (count): their short lists then stay in a core's cache."""
NUMBERS = 2**27
"""Numbers in the short lists at a time, on other devices: half a GiB in float32."""


class Options(NamedTuple):
    """Sizes (counts) and dropout, as `residual_nystrom_attention` takes them."""

    num_landmarks: int
    top_k: int
    window: int
    block: int
    dropout_p: float


def residual_nystrom_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g s d"],
    value: Float[Tensor, "b g s v"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    query_mask: Bool[Tensor, "b n"] | None = None,
    num_landmarks: int = 64,
    top_k: int = 64,
    window: int | None = None,
    block: int = 32,
) -> Float[Tensor, "b h n v"]:
    """Approximate softmax attention by exact weights on a few keys and clusters for the rest, in linear time.

    Several times closer to exact attention than `nystrom_attention`, at several times its cost: per query
    top_k + window + num_landmarks keys. Time O(b h n (d (top_k + window + m) + log² s)), the choice of keys included.
    Memory beyond the output is O(b h n d), in the backward pass as well: it runs each head's forward again.

    Args:
        query: as in `nystrom_attention`, and so are all that follow unless said.
        key: with s tokens; s may differ from n (cross-attention).
        value: with s tokens; its width may differ from key's.
        attn_mask: which keys take part. Masked ones are in no list, cluster or choice.
        dropout_p: probability with which a weight, on a key or on a cluster, is zeroed.
        is_causal: must be False.
        scale: factor on the logits.
        enable_gqa: let each key/value head serve several query heads.
        query_mask: which queries are real. Default: the key mask where n = s, otherwise all. Masked ones get zeros.
        num_landmarks: m, clusters of keys (count).
        top_k: keys chosen for a block, beside the window (count).
        window: tokens around each block, its own among them, that it reads exactly (count). Default: its own alone
            where n = s, none otherwise.
        block: consecutive queries that share their exact keys (count). Fewer are more accurate and slower.

    Returns:
        The attended values, in value's dtype; all arithmetic is in float32 or wider. A sample without a valid key
        gives zeros. Outside `torch.func` a sample's result is the same to the bit whatever its padding; inside, the
        tree follows the padded length.

    Raises:
        ValueError: a window where n differs from s; a count out of range; and as `nystrom_attention`.

    Source: ours. Nearest relatives: exact top keys of query clusters in Vyas et al. 2020, arXiv:2007.04825; block means
    beside exact blocks in Zeng et al. 2022 (MRA), arXiv:2207.10284; landmarks in Xiong et al. 2021, arXiv:2102.03902.

    >>> query, key, value = torch.randn(3, 1, 4, 1000, 32).unbind()
    >>> residual_nystrom_attention(query, key, value).shape
    torch.Size([1, 4, 1000, 32])
    """
    check_attention_inputs(query, key, value, enable_gqa)
    check_options(dropout_p, is_causal, scale, num_landmarks, None)
    b, h, n, d = query.shape
    g, s = key.shape[1:3]
    if window is None:
        window = block if n == s else 0
    options = _checked(Options(num_landmarks, top_k, window, block, dropout_p), n, s)
    key_mask = None if attn_mask is None else key_padding_mask(attn_mask, b, n, s)
    if query_mask is not None:
        check_token_mask("query_mask", query_mask, b, n)
    elif n == s:
        query_mask = key_mask
    wide = torch.promote_types(query.dtype, torch.float32)
    with full_precision(query.device):
        q = (query.to(wide) * (d**-0.5 if scale is None else scale)).unflatten(1, (g, h // g))  # (b, g, h/g, n, d)
        attend = _compiled if in_compile() else _samples
        out = attend(q, key.to(wide), value.to(wide), query_mask, key_mask, list(options[:-1]), dropout_p)
        return out.view(b, h, n, value.shape[3]).to(query.dtype)


def _checked(options: Options, n: int, s: int) -> Options:
    for name, least in (("top_k", 0), ("window", 0), ("block", 1)):
        count = getattr(options, name)
        if not isinstance(count, int) or count < least:
            raise ValueError(f"{name} must be an integer of at least {least}: got {count!r}")
    if options.window and n != s:
        raise ValueError(
            f"window is for self-attention, where queries and keys are the same tokens: got window = {options.window} "
            f"with query length {n} and key length {s}; leave it out"
        )
    if 0 < options.window < options.block:
        raise ValueError(f"window must be 0 or at least block: got {options.window} and {options.block}")
    return options


def _samples(
    q: Float[Tensor, "b g r n d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s v"],
    query_mask: Bool[Tensor, "b n"] | None,
    key_mask: Bool[Tensor, "b s"] | None,
    sizes: list[int],
    dropout_p: float,
) -> Float[Tensor, "b g r n v"]:
    """All samples; `sizes` are the options but for dropout, as an operator can take them."""
    options = Options._make([*sizes, dropout_p])
    if key_mask is None and query_mask is None:
        return _attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), options).view(*q.shape[:4], v.shape[3])
    if _cpu.eager() and len(q) and q.device.type != "meta":
        return _sample_by_sample(q, k, v, query_mask, key_mask, options)
    return _masked(q, k, v, query_mask, key_mask, options)


_compiled = opaque("nystrom::residual_attention", _samples)


def _sample_by_sample(
    q: Float[Tensor, "b g r n d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s v"],
    query_mask: Bool[Tensor, "b n"] | None,
    key_mask: Bool[Tensor, "b s"] | None,
    options: Options,
) -> Float[Tensor, "b g r n v"]:
    """Each sample without its masked tokens: nothing can depend on them, nor on batch mates."""
    b, g, r, n, _ = q.shape
    s = k.shape[2]
    samples = []
    for i in range(b):
        queries = torch.arange(n, device=q.device) if query_mask is None else query_mask[i].nonzero().squeeze(1)
        keys = torch.arange(s, device=q.device) if key_mask is None else key_mask[i].nonzero().squeeze(1)
        out = v.new_zeros(g, r, n, v.shape[3])
        if len(queries) and len(keys):
            before = torch.searchsorted(keys, queries[:: options.block].contiguous())  # keys before each block
            read = _attend(q[i][:, :, queries], k[i][:, keys], v[i][:, keys], options, before.expand(g, -1))
            out = out.index_copy(2, queries, read)
        samples.append(out)
    return torch.stack(samples)


def _masked(
    q: Float[Tensor, "b g r n d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s v"],
    query_mask: Bool[Tensor, "b n"] | None,
    key_mask: Bool[Tensor, "b s"] | None,
    options: Options,
) -> Float[Tensor, "b g r n v"]:
    """The same without a loop over samples: valid tokens first, the rest as empty slots."""
    b, g, r, n, d = q.shape
    s = k.shape[2]
    if query_mask is None:
        query_mask = torch.ones(b, n, dtype=torch.bool, device=q.device)
    if key_mask is None:
        key_mask = torch.ones(b, s, dtype=torch.bool, device=q.device)
    queries, keys = _valid_first(query_mask), _valid_first(key_mask)
    real = torch.arange(n, device=q.device).minimum((query_mask.sum(1, keepdim=True) - 1).clamp_min(0))
    chosen = queries.gather(1, real)  # after the last real query comes that query again, as in `_attend`
    q = q.gather(3, chosen[:, None, None, :, None].expand(b, g, r, n, d))
    k, v = (x.gather(2, keys[:, None, :, None].expand_as(x)) for x in (k, v))
    before = torch.zeros_like(chosen[:, :: options.block])
    if n == s:
        before = (key_mask.cumsum(1) - key_mask.long()).gather(1, chosen[:, :: options.block])
    counts = key_mask.sum(1)
    each = (x.repeat_interleave(g, dim=0) for x in (before, counts))
    out = _attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), options, *each).unflatten(0, (b, g))
    out = torch.zeros_like(out).scatter(3, queries[:, None, None, :, None].expand_as(out), out)
    seen = (query_mask & key_mask.any(1, keepdim=True))[:, None, None, :, None]
    return torch.where(seen, out, 0.0)


def _valid_first(mask: Bool[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """The tokens that take part, in order, then the others."""
    number = mask.sum(1, keepdim=True)
    place = torch.where(mask, mask.cumsum(1), number + (~mask).cumsum(1)) - 1
    return torch.zeros_like(place).scatter(1, place, torch.arange(mask.shape[1], device=mask.device).expand_as(place))


def _attend(
    q: Float[Tensor, "b r n d"],
    k: Float[Tensor, "b s d"],
    v: Float[Tensor, "b s v"],
    options: Options,
    before: Int[Tensor, "b blocks"] | None = None,
    counts: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b r n v"]:
    """Cut queries into blocks and read the keys, a few heads at a time."""
    b, r, n, d = q.shape
    blocks = -(-n // options.block)
    if n % options.block:  # fill the last block with its last query
        q = q[:, :, torch.arange(blocks * options.block, device=q.device).clamp_max(n - 1)]
    q = q.unflatten(2, (blocks, options.block)).flatten(1, 2)  # (b, r blocks, block, d)
    if before is None:
        before = (torch.arange(blocks, device=q.device) * options.block).expand(b, -1)
    before = before.repeat(1, r)
    with torch.no_grad():
        tree = grow(k.detach(), options.num_landmarks, counts)
    if not _cpu.eager():
        out = _read(q, before, lay_out(k, v, tree), options)
    else:
        at_once = CPU_BLOCKS
        if q.device.type != "cpu":
            at_once = max(1, NUMBERS // ((options.top_k + options.window + options.num_landmarks) * (d + v.shape[2])))
        heads = max(1, at_once // (r * blocks))
        again = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        read = partial(checkpoint, _heads, use_reentrant=False) if again else _heads
        parts = (slice(i, i + heads) for i in range(0, max(1, b), heads))
        outs = [read(q[i], k[i], v[i], before[i], _of_heads(tree, i), options, at_once) for i in parts]
        out = torch.cat(outs)
    return out.unflatten(1, (r, blocks)).flatten(2, 3)[:, :, :n]


def _of_heads(tree: Tree, part: slice) -> Tree:
    exists, total = (x if x is None or len(x) == 1 else x[part] for x in (tree.exists, tree.total))
    return tree._replace(tokens=tree.tokens[part], exists=exists, axes=tree.axes[part], total=total)


def _heads(
    q: Float[Tensor, "b blocks block d"],
    k: Float[Tensor, "b s d"],
    v: Float[Tensor, "b s v"],
    before: Int[Tensor, "b blocks"],
    tree: Tree,
    options: Options,
    at_once: int,
) -> Float[Tensor, "b blocks block v"]:
    """Some heads, `at_once` blocks at a time."""
    keys = lay_out(k, v, tree)
    step = max(1, at_once // max(1, len(q)))
    parts = (slice(i, i + step) for i in range(0, q.shape[1], step))
    return torch.cat([_read(q[:, i], before[:, i], keys, options) for i in parts], 1)


def _read(
    q: Float[Tensor, "b blocks block d"], before: Int[Tensor, "b blocks"], keys: Keys, options: Options
) -> Float[Tensor, "b blocks block v"]:
    """One softmax per query over its block's exact keys and the clusters without them."""
    d, m = q.shape[3], options.num_landmarks
    with torch.no_grad():
        near, there = choose(q, before, keys, options.top_k, options.window)
    exact = rows(keys.table, near)  # (b, blocks, t, d + v)
    logits = (q @ exact[..., :d].mT).masked_fill(~there[:, :, None], LOW)  # (b, blocks, block, t)

    mean = q.mean(2)
    scores = mean @ keys.cells[..., :d].mT + keys.log_counts[:, None]  # (b, blocks, cells): log w_j, of a whole cell
    cell = near // (keys.table.shape[1] // keys.cells.shape[1])
    with torch.no_grad():  # the part of each cell that is left without the exact keys
        counts = keys.log_counts.exp().round()[:, None].expand(scores.shape)
        left = counts.scatter_add(2, cell, -there.to(q.dtype)).gather(2, cell) / counts.gather(2, cell).clamp_min(1)
        log_left = torch.zeros_like(scores).scatter(2, cell, torch.where(left > 0, left.log(), LOW))
    scores = (scores + log_left).unflatten(2, (m, -1))
    highest = scores.amax(-1, keepdim=True)
    weights = scores.softmax(-1)  # (b, blocks, m, cells of a cluster)
    log_mass = torch.where(highest > LOW / 2, highest - weights.amax(-1, keepdim=True).log(), LOW).mT
    far = (weights.transpose(1, 2) @ keys.cells.unflatten(1, (m, -1))).transpose(1, 2)  # (b, blocks, m, d + v)
    far_logits = (q - mean[:, :, None]) @ far[..., :d].mT + log_mass

    t = logits.shape[-1]
    reads = F.dropout(torch.cat([logits, far_logits], -1).softmax(-1), options.dropout_p)
    return reads[..., :t] @ exact[..., d:] + reads[..., t:] @ far[..., d:]
