"""What ranks send, by formula."""

from typing import Literal

from nystrom.distributed.exchange import MOST


def traffic(
    kind: Literal["nystrom", "shift"],
    *,
    batch: int,
    heads: int,
    head_dim: int,
    value_dim: int,
    num_landmarks: int,
    bytes_per_number: int = 4,
    masked: bool = False,
) -> tuple[int, int]:
    """Bytes of the tensors that one rank gives to collectives, for one attention, forward and backward.

    The length is not among the arguments: no tensor that is sent grows with it. How often a tensor travels is the
    collective's business: a ring of P ranks moves 2 (P - 1) / P of it through each.

    Args:
        kind: which attention.
        batch: samples (count).
        heads: h; grouped key/value heads count as query heads (count).
        head_dim: d, width of query and key.
        value_dim: v, width of value.
        num_landmarks: m (count).
        bytes_per_number: of what is computed with: 4 for float32 and all that is narrower, 8 for float64.
        masked: some rank has a mask.
    """
    d, v, m = head_dim, value_dim, num_landmarks
    sizes = 8 * (MOST + (3 * batch if masked else 0))
    # landmark sums of queries and keys; of what landmarks read the largest masses, then outputs and masses
    forward, backward = m * 2 * d + m + m * (v + 1), m * 2 * d + m * (v + 1)
    if kind == "shift":  # m chosen queries and their own logits; what they read; B F
        forward += m * (d + 1) + (m + m) + (m + m * (m + 1))
        backward += m * (d + 1) + m + m * (m + 1)
    each = batch * heads * bytes_per_number
    return sizes + each * forward, each * backward
