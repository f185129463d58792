"""Nyström attention over a sequence that is split over ranks: the maths of `nystrom.functional`, stretch by stretch.

Rank r holds the tokens after those of rank r - 1. With the names of functional.py, for one head,

    Q~, K~       m segments of the whole sequence: each rank sums its part of each, and the sums are added   2 m d
    A⁺           on every rank, from the same Q~ and K~: nothing is sent
    B V          each rank reads its keys, and the results are merged by the masses of their softmaxes     m (v + 2)
    F A⁺ (B V)   each rank's own queries: nothing is sent

so that what a rank sends for a head is as long as the landmarks, however long the sequence; backward as much again.
"""

import struct
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from nystrom._precision import full_precision
from nystrom._stream import read
from nystrom._stretches import Split, means, segment_sums, unmasked
from nystrom._validate import check_attention_inputs, check_options, check_token_mask, key_padding_mask
from nystrom.distributed.exchange import Group, agree, gather, merge, same, total
from nystrom.functional import INVERSES, Summary, attend, core, inverse_of
from nystrom.inverses import Inverse, InverseName


def sequence_parallel_nystrom_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g s d"],
    value: Float[Tensor, "b g s v"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    group: Group = None,
    query_mask: Bool[Tensor, "b n"] | None = None,
    num_landmarks: int = 64,
    num_pinv_iters: int | None = None,
    pinv: InverseName | Inverse = "iterative",
) -> Float[Tensor, "b h n v"]:
    """`nystrom_attention` of a sequence of which this rank holds a stretch, and the other ranks the rest.

    Joined in the order of the ranks, the outputs and the gradients are those of `nystrom_attention` on the joined
    inputs, up to rounding, with segment means for landmarks. A rank sends O(m (d + v)) numbers for each head, sample
    and rank, forward and again backward, whatever the length. Time O(b h (n + s) m d + b h m³) for its own n and s.

    Args:
        query: this rank's stretch of the queries. Batch, heads and widths are the same on all ranks; lengths may
            differ, but no stretch is empty.
        key: this rank's stretch of the keys, of the length of query's stretch in self-attention.
        value: what these keys hold.
        attn_mask: which of these keys take part, as for `nystrom_attention`; None: all, whatever other ranks mask.
        dropout_p: as for `nystrom_attention`; drawn by each rank from its own generator.
        is_causal: must be False.
        scale: factor on the logits; default 1 / √d.
        enable_gqa: let each key/value head serve several query heads.
        group: the ranks that share the sequence, in its order; None: all ranks.
        query_mask: which of these queries are real. Default: the key mask, where every rank holds as many queries as
            keys, else all.
        num_landmarks: m, segments of the whole sequence (count).
        num_pinv_iters: steps of the inverse (count).
        pinv: how the core is inverted; the same on all ranks.

    Returns:
        The attended values of this rank's queries, in value's dtype. Gradients are of the sum of all ranks' losses:
        if one rank runs the backward pass, all must.

    Raises:
        ValueError: as `nystrom_attention`, and where ranks differ in what they must share; on every rank.
        RuntimeError: a rank is gone, or does not come within the group's timeout (raised by torch.distributed).

    Source: ours; the method is that of Xiong et al. 2021, arXiv:2102.03902, eq 13, 14 and 16.
    """
    with full_precision(query.device):
        asked = Asked(
            attn_mask, query_mask, dropout_p, is_causal, scale, enable_gqa, num_landmarks, num_pinv_iters, pinv
        )
        at, _ = summarise(query, key, value, asked, group)
        core_pinv = inverse_of(pinv, num_pinv_iters)(core(at)).to(at.key_landmarks.dtype)  # (b, h, m, m)
        return through_landmarks(at, core_pinv, value, dropout_p, group).to(query.dtype)


class Asked(NamedTuple):
    """What the caller asks for, as in the signatures."""

    attn_mask: Tensor | None
    query_mask: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    num_landmarks: int
    num_pinv_iters: int | None
    pinv: InverseName | Inverse


def summarise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    asked: Asked,
    group: Group,
) -> tuple[Summary, Split | None]:
    """This rank's tokens and the landmarks of all (eq 16); and where its tokens with a weight on themselves stand.

    The second is None in cross-attention, where there are none.
    """
    found = _check(query, key, value, asked, group)
    (b, h, n, d), (g, s) = query.shape, key.shape[1:3]
    key_mask = None if asked.attn_mask is None else key_padding_mask(asked.attn_mask, b, n, s, h)
    self_attention = all(one["n"] == one["s"] for one in found)
    query_mask = asked.query_mask
    if query_mask is None and self_attention:
        query_mask = key_mask
    queries, keys, own = _splits(query_mask, key_mask, found, self_attention, query.device, group)
    m, p = (min(asked.num_landmarks, sum(one[name] for one in found)) for name in "ns")
    query, query_sums = segment_sums(query, queries, m)
    key, key_sums = segment_sums(key, keys, p)
    # one message for both; in two, each with its own start, they cost twice the wait
    sums = total(torch.cat([query_sums.flatten(), key_sums.flatten()]), group)
    query_sums, key_sums = sums[: query_sums.numel()].view_as(query_sums), sums[query_sums.numel() :].view_as(key_sums)
    query_landmarks, query_exists = means(query_sums, queries, m)
    key_landmarks, key_exists = means(key_sums, keys, p)
    if h != g:
        key_landmarks = key_landmarks.repeat_interleave(h // g, dim=1)
    factor = d**-0.5 if asked.scale is None else asked.scale
    summary = Summary(query, key, key_mask, query_landmarks, key_landmarks, query_exists, key_exists, factor)
    return summary, own


def through_landmarks(
    at: Summary, core_pinv: Float[Tensor, "b h p m"], value: Float[Tensor, "b g s v"], dropout_p: float, group: Group
) -> Float[Tensor, "b h n v"]:
    """``F (A⁺ (B V))`` (eq 13)."""
    right_value, _ = read_keys(at, at.query_landmarks, value, group)  # landmarks read the tokens of all ranks
    return attend(at.query, at.key_landmarks, core_pinv @ right_value, at.key_exists, at.scale, dropout_p)


def read_keys(
    at: Summary, query: Float[Tensor, "b h m d"], value: Float[Tensor, "b g2 s v"], group: Group
) -> tuple[Float[Tensor, "b h m v"], Float[Tensor, "b h m"]]:
    """Exact attention of a few queries, the same on all ranks, to the keys of all ranks, and the logs of their masses.

    Values are those of the key heads, g2 = g, or of the query heads, g2 = h.
    """
    h, g = query.shape[1], value.shape[1]
    key = at.key if g == at.key.shape[1] else at.key.repeat_interleave(g // at.key.shape[1], dim=1)
    wide = torch.promote_types(query.dtype, at.key.dtype)
    by_group = query.unflatten(1, (g, h // g)).flatten(2, 3)  # as in `nystrom.functional.through_landmarks`
    out, log_mass = merge(*read(by_group, key.to(wide), value.to(wide), at.key_mask, at.scale), group)
    return out.unflatten(2, (h // g, -1)).flatten(1, 2), log_mass.unflatten(2, (h // g, -1)).flatten(1, 2)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    asked: Asked,
    group: Group,
) -> list[dict[str, int]]:
    """The sizes of every rank's input, once all have been found right and to fit together."""

    def check() -> dict[str, int]:
        check_attention_inputs(query, key, value, asked.enable_gqa)
        check_options(asked.dropout_p, asked.is_causal, asked.scale, asked.num_landmarks, asked.num_pinv_iters)
        inverse_of(asked.pinv, asked.num_pinv_iters)
        b, h, n, d = query.shape
        s = key.shape[2]
        if asked.attn_mask is not None:
            key_padding_mask(asked.attn_mask, b, n, s, h)
        if asked.query_mask is not None:
            check_token_mask("query_mask", asked.query_mask, b, n)
        grads = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        sizes = b, h, key.shape[1], d, value.shape[3], DTYPES.index(query.dtype)
        pinv = list(INVERSES).index(asked.pinv) if isinstance(asked.pinv, str) else -1
        scale = struct.unpack("<q", struct.pack("<d", asked.scale or 0.0))[0]
        numbers = *sizes, asked.num_landmarks, asked.num_pinv_iters or 0, pinv, scale, int(grads)
        masks = sum(x is not None for x in (asked.attn_mask, asked.query_mask))
        return {**dict(zip(SHARED, numbers, strict=True)), "n": n, "s": s, "masks": masks}

    found = agree(check, query.device, group)
    same(found, SHARED)
    return found


SHARED = {
    "b": "the batch size",
    "h": "the number of query heads",
    "g": "the number of key heads",
    "d": "the width of query and key",
    "v": "the width of value",
    "dtype": "the dtype (by its number in nystrom.distributed.functional.DTYPES)",
    "m": "num_landmarks",
    "iters": "num_pinv_iters (0: default)",
    "pinv": "pinv (by its number among the names, -1 for a function)",
    "scale": "scale (as the bits of a float64)",
    "grads": "whether gradients are asked for (1 or 0)",
}
"""What all ranks must share."""
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def _splits(
    query_mask: Bool[Tensor, "b n"] | None,
    key_mask: Bool[Tensor, "b s"] | None,
    found: list[dict[str, int]],
    self_attention: bool,
    device: torch.device,
    group: Group,
) -> tuple[Split, Split, Split | None]:
    """Of the queries, of the keys, and of the tokens that take part as both (in self-attention).

    `found` are the sizes of each rank's input: b, n, s and its number of masks.
    """
    rank = dist.get_rank(group)
    if not any(one["masks"] for one in found):
        lengths = ([one[name] for one in found] for name in "ns")
        queries, keys = (unmasked(sum(every[:rank]), sum(every), device) for every in lengths)
        return queries, keys, queries if self_attention else None
    b, n, s = (found[rank][name] for name in "bns")
    masks = [
        torch.ones(b, length, dtype=torch.bool, device=device) if mask is None else mask
        for mask, length in ((query_mask, n), (key_mask, s))
    ]
    if self_attention:
        masks.append(masks[0] & masks[1])
    counts = gather(torch.stack([mask.sum(1) for mask in masks]), group)[..., None]  # (ranks, masks, b, 1)
    queries, keys, *own = (Split(*one, None) for one in zip(masks, counts[:rank].sum(0), counts.sum(0), strict=True))
    return queries, keys, own[0] if own else None
