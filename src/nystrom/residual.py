"""Residual-corrected Nyström attention: near keys exactly, all others through their clusters, at linear cost.

The keys are put into m clusters of near ones (_tree.py). The queries of a block attend, in one softmax, to

    the exact keys Ω     the `window` tokens around the block, and the `top_k` others that weigh most for one of them
    m cluster means      each cluster c without Ω, as the block's mean query q̄ reads it: with w_j = exp(q̄·k_j),

        mass_c = Σ w_j,   k_c = Σ w_j k_j / mass_c,   v_c = Σ w_j v_j / mass_c      j in c, not in Ω
        logit of a query q for c:  log mass_c + (q - q̄)·k_c

At q = q̄ this logit has the value and the slope of log Σ exp(q·k_j). The weights are positive and sum to one, and the
result is exact where Ω is every key, or every cluster is a single key: softmax attention, and where the sizes alone
make it so it is computed as that. From 32 m keys on, cells of a few near keys enter these sums as one. The choice of
keys is not differentiated; everything else is.
"""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nystrom import _cpu
from nystrom._choice import LOW, Options, num_candidates, read_heads
from nystrom._opaque import in_compile, opaque
from nystrom._precision import full_precision
from nystrom._tree import grow, keys_per_cell, rows
from nystrom._validate import check_attention_inputs, check_options, check_token_mask, key_padding_mask

CACHE = 2**20
"""Numbers in the short lists at a time, on a CPU: about what stays in its cache."""
NUMBERS = 2**27
"""The same on other devices: half a GiB in float32."""
KEPT = 2**25
"""Numbers in all short lists up to which they are kept for the backward pass, and not made again."""
ALIKE = 32
"""Tokens by which samples differ at most that a CPU works through together (count); others prefer few, large steps."""


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

    On a sentence encoder two (4096 tokens) to nine times (512) closer to exact attention than `nystrom_attention`, at
    several times its cost (docs/results.md): per query top_k + window + num_landmarks keys.

    Time O(b h n (d (top_k + window + m) + log² s)), the choice of keys included; past s = 2048 m the choice looks at
    s / (8 m) candidates and no longer at about 256, so let m grow with the length.
    Memory beyond the output is O(b h n d), in the backward pass as well: it runs each head's forward again, where the
    lists are too long to be kept. Where so few keys are read one by one anyway (with the defaults, up to 96), this is
    softmax attention by definition, and computed so.

    Args:
        query: as in `nystrom_attention`, and so are all that follow unless said.
        key: with s tokens; s may differ from n (cross-attention).
        value: with s tokens; its width may differ from key's.
        attn_mask: which keys take part. Masked ones are in no list, cluster or choice.
        dropout_p: probability with which a weight, on a key or on a cluster, is zeroed.
        is_causal: must be False.
        scale: factor on the logits.
        enable_gqa: let each key/value head serve several query heads.
        query_mask: which queries are real; masked ones get zeros. Default: the key mask where n = s, taken for
            self-attention, otherwise all; give it in cross-attention of equal lengths.
        num_landmarks: m, clusters of keys (count).
        top_k: keys chosen for a block, beside the window (count).
        window: tokens around each block, its own among them, that it reads exactly (count). Default: its own alone
            where n = s, none otherwise.
        block: consecutive queries that share their exact keys (count). Fewer are more accurate and slower.

    Returns:
        The attended values, in value's dtype; all arithmetic is in float32 or wider. A sample without a valid key
        gives zeros. Outside `torch.func` padding changes a sample's result by rounding alone. Inside, where lengths
        cannot be read, cells and candidates follow the padded length: the more padding, the less accurate, also where
        few real keys would make it exact.

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
    key_mask = None if attn_mask is None else key_padding_mask(attn_mask, b, n, s, h)
    if query_mask is not None:
        check_token_mask("query_mask", query_mask, b, n)
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
    n, s = q.shape[3], k.shape[2]
    same_mask = query_mask is None
    if same_mask and n == s:
        query_mask = key_mask
    if _nothing_is_far(options, s, same_mask) and q.shape[:4].numel() * s <= NUMBERS:
        return _softmax(q, k, v, query_mask, key_mask, dropout_p)
    if key_mask is None and query_mask is None:
        return _attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), options).view(*q.shape[:4], v.shape[3])
    if query_mask is None:
        query_mask = torch.ones(len(q), n, dtype=torch.bool, device=q.device)
    if key_mask is None:
        key_mask = torch.ones(len(q), s, dtype=torch.bool, device=q.device)
    if _cpu.eager() and len(q) and q.device.type != "meta":
        return _by_length(q, k, v, query_mask, key_mask, options)
    return _masked(q, k, v, query_mask, key_mask, options)


_compiled = opaque("nystrom::residual_attention", _samples)


def _nothing_is_far(options: Options, s: int, same_mask: bool) -> bool:
    """Whether every block reads each of s keys exactly, or every cluster is one key; then also with fewer keys."""
    missed = s
    if options.window:  # the first block and the last miss most
        last = (s - 1) // options.block * options.block if same_mask else s - 1
        starts = [first - (options.window - options.block) // 2 for first in (0, last)]
        missed = max(max(0, start) + max(0, s - start - options.window) for start in starts)
    return missed <= options.top_k or s <= options.num_landmarks


def _softmax(
    q: Float[Tensor, "b g r n d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s v"],
    query_mask: Bool[Tensor, "b n"] | None,
    key_mask: Bool[Tensor, "b s"] | None,
    dropout_p: float,
) -> Float[Tensor, "b g r n v"]:
    """Softmax attention. Written out, as torch's own has no second derivatives on a CPU, nor is it faster here."""
    if query_mask is not None:
        q = q.masked_fill(~query_mask[:, None, None, :, None], 0.0)
    if key_mask is not None:  # zeros, as a masked token may hold NaN, and a sample may have no other
        k, v = (x.masked_fill(~key_mask[:, None, :, None], 0.0) for x in (k, v))
    logits = q.flatten(2, 3) @ k.mT
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], LOW)
    out = (F.dropout(logits.softmax(-1), dropout_p) @ v).unflatten(2, q.shape[2:4])
    return out if query_mask is None else out.masked_fill(~query_mask[:, None, None, :, None], 0.0)


def _by_length(
    q: Float[Tensor, "b g r n d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s v"],
    query_mask: Bool[Tensor, "b n"],
    key_mask: Bool[Tensor, "b s"],
    options: Options,
) -> Float[Tensor, "b g r n v"]:
    """Samples of about the same length together, so that few slots are empty, and in the cells that each has alone."""
    lengths = list(zip(key_mask.sum(1).tolist(), query_mask.sum(1).tolist(), strict=True))
    order = sorted((i for i, pair in enumerate(lengths) if min(pair)), key=lengths.__getitem__)
    apart = ALIKE if q.device.type == "cpu" else max(q.shape[3], k.shape[2]) + 1
    outs, place = [], torch.full((len(q),), len(order), device=q.device)  # the last: zeros
    while order:
        group = sorted(i for i in order if _alike(lengths[i], lengths[order[0]], options.num_landmarks, apart))
        order = [i for i in order if i not in group]
        index = torch.tensor(group, device=q.device)
        place[index] = torch.arange(len(group), device=q.device) + sum(len(out) for out in outs)
        parts = q, k, v, query_mask, key_mask
        if len(group) < len(q):
            parts = (x.index_select(0, index) for x in parts)
        keys, queries = zip(*(lengths[i] for i in group), strict=True)
        outs.append(_masked(*parts, options=options, lengths=(max(queries), max(keys), min(keys))))
    return torch.cat([*outs, v.new_zeros(1, *q.shape[1:4], v.shape[3])]).index_select(0, place)


def _alike(one: tuple[int, int], other: tuple[int, int], num_clusters: int, apart: int) -> bool:
    """Whether samples of so many keys and queries differ by fewer than `apart` and have cells of the same size."""
    near = all(abs(x - y) < apart for x, y in zip(one, other, strict=True))
    return near and keys_per_cell(one[0], num_clusters) == keys_per_cell(other[0], num_clusters)


def _masked(
    q: Float[Tensor, "b g r n d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s v"],
    query_mask: Bool[Tensor, "b n"],
    key_mask: Bool[Tensor, "b s"],
    options: Options,
    lengths: tuple[int, int, int] | None = None,
) -> Float[Tensor, "b g r n v"]:
    """Valid tokens first, and empty slots for the rest, as samples differ in length.

    `lengths` are the most queries that a sample has, and the most and the fewest keys (counts), where they are known.
    """
    b, g, r, n, _ = q.shape
    most_queries, most_keys, fewest = lengths or (n, k.shape[2], None)
    queries, keys = _valid_first(query_mask)[:, :most_queries], _valid_first(key_mask)[:, :most_keys]
    last = (query_mask.sum(1, keepdim=True) - 1).clamp_min(0)
    queries = queries.gather(1, torch.arange(most_queries, device=q.device).minimum(last))  # repeated, as in `_attend`
    before = torch.zeros_like(queries[:, :: options.block])
    if n == key_mask.shape[1]:
        before = (key_mask.cumsum(1) - key_mask.long()).gather(1, queries[:, :: options.block])
    q = rows(q.flatten(0, 2), queries.repeat_interleave(g * r, dim=0)).unflatten(0, (b * g, r))
    k, v = (rows(x.flatten(0, 1), keys.repeat_interleave(g, dim=0)) for x in (k, v))
    counts = None if fewest == most_keys else key_mask.sum(1).repeat_interleave(g)
    out = _attend(q, k, v, options, before.repeat_interleave(g, dim=0), counts, fewest).flatten(0, 1)
    place = (query_mask.cumsum(1) - 1).clamp_min(0).repeat_interleave(g * r, dim=0)
    out = rows(out, place).unflatten(0, (b, g, r))
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
    fewest: int | None = None,
) -> Float[Tensor, "b r n v"]:
    """Cut queries into blocks and read the keys, a few heads at a time."""
    b, r, n, d = q.shape
    s, size = k.shape[1], options.block
    blocks = -(-n // size)
    if n % size:  # fill the last block with its last query
        q = q[:, :, torch.arange(blocks * size, device=q.device).clamp_max(n - 1)]
    q = q.unflatten(2, (blocks, size)).flatten(1, 2)  # (b, r blocks, block, d)
    if before is None:
        before = (torch.arange(blocks, device=q.device) * size).expand(b, -1)
    before = before.repeat(1, r)
    m, exact = options.num_landmarks, options.top_k + options.window
    short = s <= num_candidates(options.top_k, options.window) and keys_per_cell(s, m) == 1
    with torch.no_grad():
        tree = grow(k.detach(), m, counts, fewest, leaves=not short)
    numbers = 2 * size * s if short else (exact + m) * (d + v.shape[2] + size)
    if not _cpu.eager():
        out = read_heads(q, k, v, before, tree, options, r * blocks * b)
    else:
        at_once = max(1, (CACHE if q.device.type == "cpu" else NUMBERS) // numbers)
        heads = max(1, at_once // (r * blocks))
        again = b * r * blocks * numbers > KEPT and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        work = partial(checkpoint, read_heads, use_reentrant=False) if again else read_heads
        parts = zip(*(x.split(heads) for x in (q, k, v, before)), tree.split(heads), strict=True)
        out = torch.cat([work(*part, options=options, at_once=at_once) for part in parts])
    return out.unflatten(1, (r, blocks)).flatten(2, 3)[:, :, :n]
