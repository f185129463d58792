"""Spectral shifting over a sequence that is split over ranks: the maths of `nystrom.spectral`, stretch by stretch.

The m tokens that give the exact weight on themselves are read on the rank that holds each, and sent to all; what they
read is merged as B V is. The trace of F Z B is that of Z (B F), where B reads F as if it were values.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nystrom._precision import full_precision
from nystrom._stretches import Split
from nystrom.distributed.exchange import Group, total
from nystrom.distributed.functional import Asked, read_keys, summarise, through_landmarks
from nystrom.functional import Summary, core, inverse_of, weights
from nystrom.inverses import Inverse, InverseName
from nystrom.landmarks import middles, places_of_valid, segment_lengths


def sequence_parallel_spectral_shift_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g n d"],
    value: Float[Tensor, "b g n v"],
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
    """`spectral_shift_attention` of a sequence of which this rank holds a stretch, and the other ranks the rest.

    Joined in the order of the ranks, the outputs and the gradients are those of `spectral_shift_attention` on the
    joined inputs, up to rounding. A rank sends O(m (m + d + v)) numbers for each head, sample and rank, forward and
    again backward, whatever the length. Time O(b h n m (d + m) + b h m³), memory O(b h n m), for its own n.

    Args:
        query: as in `sequence_parallel_nystrom_attention`, and so are all that follow.
        key: of this rank's same tokens.
        value: of these tokens.
        attn_mask: which keys take part.
        dropout_p: on F alone.
        is_causal: must be False.
        scale: factor on the logits.
        enable_gqa: let each key/value head serve several query heads.
        group: the ranks that share the sequence.
        query_mask: which queries are real.
        num_landmarks: m (count).
        num_pinv_iters: steps of the inverse (count).
        pinv: how the core is inverted.

    Returns:
        The attended values of this rank's queries, in value's dtype. Gradients are of the sum of all ranks' losses.

    Raises:
        ValueError: a rank's query and key differ in length; and as `sequence_parallel_nystrom_attention`.
        RuntimeError: a rank is gone, or does not come within the group's timeout.

    Source: ours, as `spectral_shift_attention`.
    """
    with full_precision(query.device):
        asked = Asked(
            attn_mask, query_mask, dropout_p, is_causal, scale, enable_gqa, num_landmarks, num_pinv_iters, pinv
        )
        at, own = summarise(query, key, value, asked, group)
        if own is None:
            raise ValueError(
                "query and key must share the length on every rank, for only self-attention has a diagonal to shift: "
                f"got query length {query.shape[2]}, key length {key.shape[2]} on this one"
            )
        core_pinv = inverse_of(pinv, num_pinv_iters)(core(at)).to(at.key_landmarks.dtype)  # (b, h, p, m)
        g = key.shape[1]
        out = through_landmarks(at, core_pinv, value, dropout_p, group).unflatten(1, (g, -1))
        exact_own, nystrom_own = _exact_own(at, own, group), _nystrom_own(at, core_pinv, own, group)
        excess = exact_own - nystrom_own
        room = torch.where(excess > 0, 1 - nystrom_own, 1.0)
        shift = torch.where(excess > 0, excess / room, 0.0).unflatten(1, out.shape[1:3])[..., None, None]
        if own.mask is not None:
            shift = torch.where(own.mask[:, None, None, :, None], shift, 0.0)
        return torch.lerp(out, value[:, :, None].to(out.dtype), shift).flatten(1, 2).to(value.dtype)


def _exact_own(at: Summary, own: Split, group: Group) -> Float[Tensor, "b h"]:
    """As `nystrom.spectral._exact_own`: the mean weight on itself, from the middle token of each segment."""
    b, h, n, d = at.query.shape
    mask = at.query.new_ones(1, n, dtype=torch.bool) if own.mask is None else own.mask
    counts = segment_lengths(own.num_valid, at.query_landmarks.shape[2], mask.device)  # (b2, m)
    rank = middles(counts) - own.before  # among the valid tokens here
    here = (counts > 0) & (rank >= 0) & (rank < mask.sum(-1, keepdim=True))
    index = places_of_valid(mask).gather(1, rank.clamp(0, n)).expand(b, -1)[:, None, :, None].expand(b, h, -1, d)
    wide = torch.promote_types(at.query.dtype, torch.float32)
    query = at.query.gather(2, index).to(wide)
    g = at.key.shape[1]
    key = at.key.gather(2, index[:, :g]).to(wide).repeat_interleave(h // g, dim=1)
    chosen = torch.cat([query, (query * key).sum(-1, keepdim=True)], -1).masked_fill(~here[:, None, :, None], 0.0)
    query, logit = total(chosen, group).split([d, 1], -1)
    _, log_mass = read_keys(at, query, at.key.new_zeros(*at.key.shape[:3], 0), group)
    log_mass = log_mass.masked_fill((counts == 0)[:, None], 0.0)  # of no token; and -inf where there is no key
    weight = (at.scale * logit.squeeze(-1) - log_mass).exp()
    return (weight * counts[:, None]).sum(-1) / own.num_valid.clamp_min(1)


def _nystrom_own(at: Summary, core_pinv: Float[Tensor, "b h p m"], own: Split, group: Group) -> Float[Tensor, "b h"]:
    """As `nystrom.spectral._nystrom_own`: the mean of the diagonal of F Z B, by tr(F Z B) = tr(Z (B F))."""
    left = weights(at.query, at.key_landmarks, at.key_exists, at.scale)
    if own.mask is not None:
        left = left.masked_fill(~own.mask[:, None, :, None], 0.0)
    right_left, _ = read_keys(at, at.query_landmarks, left, group)  # (b, h, m, p)
    return (core_pinv * right_left.mT).sum((-2, -1)) / own.num_valid.clamp_min(1)
