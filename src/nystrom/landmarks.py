"""Landmarks: a few vectors that stand for many tokens. `segment_means` is the paper's choice; the others are ours.

Each function takes tokens (b, h, n, d), how many landmarks to make and which tokens are real, and returns the landmarks
in float32 or wider with the number of tokens behind each. A count of 0 marks a landmark that carries no weight.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nystrom import _cpu
from nystrom._precision import full_precision
from nystrom._validate import check_token_mask

Landmarks = Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor]]
"""tokens (b, h, n, d), num_landmarks, mask (b, n) or None, to landmarks (b, h, m, d) and counts (b, m) or (b, h, m)."""

LandmarksName = Literal["segment_means", "strided", "kmeans"]


def segment_means(
    tokens: Float[Tensor, "b h n d"], num_landmarks: int, mask: Bool[Tensor, "b n"] | None = None
) -> tuple[Float[Tensor, "b h m d"], Int[Tensor, "b m"]]:
    """Cut each sample's valid tokens into consecutive segments and average each segment.

    With t valid tokens and l = t // m, the first m - t % m segments hold l tokens and the rest l + 1, so any length
    works and padding moves no boundary. Cost O(b h n d).

    Args:
        tokens: queries or keys, one set per head.
        num_landmarks: m, segments per sample (count); no more than n are made.
        mask: True = takes part; a masked token enters no mean.

    Returns:
        The means, in float32 or wider, and the tokens in each segment (count); 0 marks an empty segment, whose mean
        is zero and which comes only from a mask with fewer than m valid tokens (or from `torch.export`, which makes m
        whatever the length).

    Raises:
        ValueError: num_landmarks or n below 1; mask is not bool (b, n).

    Source: Xiong et al. 2021, arXiv:2102.03902, eq 16; uneven segments as in the authors' T2T-ViT code.

    >>> means, counts = segment_means(torch.arange(5.0).view(1, 1, 5, 1), 2)
    >>> means.flatten().tolist(), counts.tolist()
    ([0.5, 3.0], [[2, 3]])
    """
    return segment_means_sharing(tokens, num_landmarks, mask)[1:]


def strided(
    tokens: Float[Tensor, "b h n d"], num_landmarks: int, mask: Bool[Tensor, "b n"] | None = None
) -> tuple[Float[Tensor, "b h m d"], Int[Tensor, "b m"]]:
    """The middle token of each segment of `segment_means`: real tokens, evenly spaced, not averages.

    Keeps the norm that averaging takes away; sees 1 token of each segment. Cost O(b h m d).

    Args:
        tokens: queries or keys, one set per head.
        num_landmarks: m, landmarks per sample (count); no more than n are made.
        mask: True = takes part; a masked token is never chosen.

    Returns:
        The chosen tokens, in float32 or wider, and the tokens in each one's segment (count); an empty segment's is 0.

    Raises:
        ValueError: num_landmarks or n below 1; mask is not bool (b, n).

    Source: ours; the sampling of columns that Xiong et al. 2021, arXiv:2102.03902, section 3.2 starts from.

    >>> strided(torch.arange(6.0).view(1, 1, 6, 1), 2)[0].flatten().tolist()
    [1.0, 4.0]
    """
    b, h, n, d = tokens.shape
    m, mask = _check(tokens, num_landmarks, mask)
    if mask is None:
        mask = torch.ones(b, n, dtype=torch.bool, device=tokens.device)
    counts = _counts(segment_of_token(mask, m), m)
    index = places_of_valid(mask).gather(1, middles(counts))  # (b, m)
    chosen = tokens.gather(2, index[:, None, :, None].expand(b, h, m, d))
    chosen = chosen.to(torch.promote_types(tokens.dtype, torch.float32))
    return chosen.masked_fill((counts == 0)[:, None, :, None], 0.0), counts


def kmeans(
    tokens: Float[Tensor, "b h n d"], num_landmarks: int, mask: Bool[Tensor, "b n"] | None = None, *, num_steps: int = 2
) -> tuple[Float[Tensor, "b h m d"], Int[Tensor, "b h m"]]:
    """Means of clusters found by a few Lloyd steps from the segment means, each head's own.

    A cluster that loses all its tokens is left empty. Cost O(b h n m d) a step, a few times that of the attention;
    memory O(b h n) beside a block of scores. The assignment is not differentiated, the means are.

    Args:
        tokens: queries or keys, one set per head.
        num_landmarks: m, clusters (count); no more than n are made.
        mask: True = takes part; a masked token joins no cluster.
        num_steps: Lloyd steps (count); with 0 the segment means themselves.

    Returns:
        The means, in float32 or wider, and the tokens in each cluster (count); an empty cluster's mean is zero.

    Raises:
        ValueError: num_landmarks or n below 1; mask is not bool (b, n); num_steps < 0.

    Source: named and set aside in Xiong et al. 2021, arXiv:2102.03902, section 3.2; Lloyd 1982.

    >>> means, counts = kmeans(torch.tensor([0.0, 9.0, 9.0, 9.0]).view(1, 1, 4, 1), 2)
    >>> means.flatten().tolist(), counts.flatten().tolist()
    ([0.0, 9.0], [1, 3])
    """
    b, h = tokens.shape[:2]
    m, mask = _check(tokens, num_landmarks, mask)
    if num_steps < 0:
        raise ValueError(f"num_steps must be at least 0: got {num_steps}")
    means, segment_counts = segment_means(tokens, m, mask)
    counts = segment_counts[:, None].expand(b, h, -1)
    for _ in range(num_steps):
        with torch.no_grad():
            cluster = _nearest(tokens, means, counts > 0)  # (b, h, n)
            if mask is not None:
                cluster = torch.where(mask[:, None], cluster, m)
        by_head = tokens.flatten(0, 1)[:, None]  # each head as a sample of its own: (b h, 1, n, d)
        _, means, counts = _bin_means(by_head, cluster.flatten(0, 1), m)
        means, counts = means.unflatten(0, (b, h)).squeeze(2), counts.unflatten(0, (b, h))
    return means, counts


def grid_means(
    tokens: Float[Tensor, "b h n d"],
    num_landmarks: int,
    mask: Bool[Tensor, "b n"] | None = None,
    *,
    grid: tuple[int, int],
) -> tuple[Float[Tensor, "b h m d"], Int[Tensor, "b m"]]:
    """Cut an image of tokens into rectangles, as square as their number allows, and average each.

    Rectangles are uneven where their number does not divide the side, the smaller first, and keep their place whatever
    is masked. Pass it as ``landmarks=functools.partial(grid_means, grid=(14, 14))``. Cost O(b h n d).

    Args:
        tokens: queries or keys, one set per head, row by row.
        num_landmarks: m, rectangles (count); a product of a number of rows up to the height and of columns up to the
            width.
        mask: True = takes part; a masked token enters no mean.
        grid: height and width of the image (tokens); their product is n.

    Returns:
        The means, in float32 or wider, and the tokens in each rectangle (count); an empty one's mean is zero.

    Raises:
        ValueError: grid does not hold n tokens; num_landmarks cannot be laid out on it; mask is not bool (b, n).

    Source: ours: eq 16 of Xiong et al. 2021, arXiv:2102.03902, in two dimensions.

    >>> grid_means(torch.arange(16.0).view(1, 1, 16, 1), 4, grid=(4, 4))[0].flatten().tolist()
    [2.5, 4.5, 10.5, 12.5]
    """
    b, _, n, _ = tokens.shape
    height, width = grid
    _check(tokens, num_landmarks, mask)
    if min(grid) < 1 or height * width != n:
        raise ValueError(f"grid must hold the n tokens: got {height} x {width} = {height * width} for n = {n}")
    layouts = [(r, num_landmarks // r) for r in range(1, min(num_landmarks, height) + 1) if num_landmarks % r == 0]
    layouts = [(r, c) for r, c in layouts if c <= width]
    if not layouts:
        raise ValueError(
            f"num_landmarks must be a product of at most {height} rows and at most {width} columns: got {num_landmarks}"
        )
    rows, columns = min(layouts, key=lambda rc: abs(height * rc[1] - width * rc[0]))
    device = tokens.device
    row = segment_of_token(torch.ones(1, height, dtype=torch.bool, device=device), rows)[0]
    column = segment_of_token(torch.ones(1, width, dtype=torch.bool, device=device), columns)[0]
    bins = (row[:, None] * columns + column).flatten().expand(b, n)
    if mask is not None:
        bins = torch.where(mask, bins, num_landmarks)
    return _bin_means(tokens, bins, num_landmarks)[1:]


def segment_means_sharing(
    tokens: Float[Tensor, "b h n d"], num_landmarks: int, mask: Bool[Tensor, "b n"] | None
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h m d"], Int[Tensor, "b m"]]:
    """`segment_means`, and before them the tokens: whoever goes on with those returned saves memory backward."""
    m, mask = _check(tokens, num_landmarks, mask)
    b, _, n, _ = tokens.shape
    if mask is not None:
        return _bin_means(tokens, segment_of_token(mask, m), m)
    counts = segment_lengths(n, m, tokens.device)
    if _cpu.usable(tokens):
        tokens, sums = _cpu.run_sums(tokens, _runs(n, m))
        return tokens, sums / counts[:, None], counts.expand(b, m)
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    means = [part.mean(3, dtype=dtype) for part in _cpu.segments(tokens, _runs(n, m))]
    return tokens, torch.cat(means, dim=2), counts.expand(b, m)


def segment_of_token(
    mask: Bool[Tensor, "b n"],
    m: int,
    before: Int[Tensor, "#b 1"] | int = 0,
    num_valid: Int[Tensor, "#b 1"] | None = None,
) -> Int[Tensor, "b n"]:
    """The segment of each valid token (see `segment_means`); m for a masked one.

    Of a stretch of longer samples where `before` says how many valid tokens come earlier, and num_valid how many there
    are in all (count).
    """
    rank = mask.cumsum(-1) - 1 + before  # place among the sample's valid tokens
    if num_valid is None:
        num_valid = mask.sum(-1, keepdim=True)
    length = num_valid // m
    num_short = m - num_valid % m
    in_short = num_short * length  # tokens held by the short segments
    long_segment = num_short + (rank - in_short) // (length + 1)
    segment = torch.where(rank < in_short, rank // length.clamp_min(1), long_segment)
    return torch.where(mask, segment, m)


def segment_lengths(num_valid: Int[Tensor, "b 1"] | int, m: int, device: torch.device) -> Int[Tensor, "*b m"]:
    """How many of so many valid tokens each segment of `segment_means` holds."""
    return num_valid // m + (torch.arange(m, device=device) >= m - num_valid % m)


def middles(counts: Int[Tensor, "b m"]) -> Int[Tensor, "b m"]:
    """The rank, among a sample's valid tokens, of the middle one of each segment of so many tokens."""
    return counts.cumsum(-1) - counts + (counts - 1).clamp_min(0) // 2


def places_of_valid(mask: Bool[Tensor, "b n"]) -> Int[Tensor, "b n_plus_1"]:
    """Where a sample's first valid token stands, its second, and so on; then zeros."""
    b, n = mask.shape
    rank = torch.where(mask, mask.cumsum(-1) - 1, n)  # masked ones go to a place of their own
    places = torch.arange(n, device=mask.device).expand(b, n)
    return places.new_zeros(b, n + 1).scatter(1, rank, places)


def bin_sums(
    tokens: Float[Tensor, "b h n d"], bins: Int[Tensor, "b n"], m: int
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h m d"]]:
    """The tokens, and the sums of those in each of m bins; bin m is "none"."""
    if _cpu.usable(tokens):
        return _cpu.bin_sums(tokens, bins, m)
    b, h, _, d = tokens.shape
    flat = (bins + (m + 1) * torch.arange(b, device=tokens.device)[:, None]).flatten()  # (b n)
    # Token-major rows: (b, n, h d) is how projections lie in memory, so this adds whole rows without a copy.
    rows = tokens.transpose(1, 2).flatten(0, 1).to(torch.promote_types(tokens.dtype, torch.float32))  # (b n, h, d)
    sums = rows.new_zeros(b * (m + 1), h, d).index_add(0, flat, rows).unflatten(0, (b, m + 1))[:, :m]
    return tokens, sums.transpose(1, 2)


def _runs(n: int, m: int) -> _cpu.Runs:
    """The segments of n unmasked tokens: the short ones, and the long ones, if any."""
    length, num_long = n // m, n % m  # not divmod, which torch.compile cannot trace
    return [(m - num_long, length), (num_long, length + 1)] if num_long else [(m, length)]


def _check(tokens: Tensor, num_landmarks: int, mask: Tensor | None) -> tuple[int, Tensor | None]:
    """How many landmarks to make, and the mask, after the rules that all kinds share."""
    b, _, n, _ = tokens.shape
    if num_landmarks < 1 or n < 1:
        raise ValueError(f"num_landmarks and the length must be at least 1: got {num_landmarks} and {n}")
    if mask is not None:
        check_token_mask("mask", mask, b, n)
    if torch.compiler.is_exporting():  # a graph for every length: fixed m, no question about n
        return num_landmarks, tokens.new_ones(b, n, dtype=torch.bool) if mask is None else mask
    return min(num_landmarks, n), mask


def _counts(bins: Int[Tensor, "b n"], m: int) -> Int[Tensor, "b m"]:
    """How many tokens lie in each of m bins; bin m is "none"."""
    return torch.zeros_like(bins[:, :1]).repeat(1, m + 1).scatter_add(1, bins, torch.ones_like(bins))[:, :m]


def _bin_means(
    tokens: Float[Tensor, "b h n d"], bins: Int[Tensor, "b n"], m: int
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h m d"], Int[Tensor, "b m"]]:
    """The tokens, the mean of those in each of m bins (zero for an empty one), and how many there are (m: no bin)."""
    counts = _counts(bins, m)
    tokens, sums = bin_sums(tokens, bins, m)
    return tokens, sums / counts.clamp_min(1)[:, None, :, None], counts


def _nearest(
    tokens: Float[Tensor, "b h n d"], means: Float[Tensor, "b h m d"], exists: Bool[Tensor, "b h m"]
) -> Int[Tensor, "b h n"]:
    """The nearest existing mean of each token, by blocks of tokens so that no n x m array is made."""
    b, h, m, _ = means.shape
    length = max(1, _cpu.BLOCK // max(1, b * h * m))
    blocks = [tokens] if torch.compiler.is_exporting() else tokens.split(length, dim=2)  # no loop over an open length
    # argmin of |x - c|^2 = argmax of x.c - |c|^2 / 2
    bias = torch.where(exists, -0.5 * means.square().sum(-1), -torch.inf)[:, :, None]  # (b, h, 1, m)
    with full_precision(tokens.device):
        return torch.cat([(part.to(means.dtype) @ means.mT + bias).argmax(-1) for part in blocks], dim=2)
