"""The method written a second time, independently: float64, plain loops over samples, the inverse through an SVD.

Shares no code and no formulation with the library: landmarks come from explicit token lists, attention from the full
softmax matrices, and k steps of the inverse iteration from their effect on each singular value.
"""

import torch
from torch import Tensor


def segments(tokens: list[int], num_landmarks: int) -> list[list[int]]:
    """Cut a list of token positions into min(m, len) consecutive segments, the shorter ones first."""
    m = min(num_landmarks, len(tokens))
    lengths = [len(tokens) // m + (i >= m - len(tokens) % m) for i in range(m)] if m else []
    starts = [sum(lengths[:i]) for i in range(m)]
    return [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def pinv(matrix: Tensor, num_iters: int | None) -> Tensor:
    """Exact Moore-Penrose inverse, or what `num_iters` steps make of each singular value sigma.

    x = sigma z obeys x <- x (13 - x (15 - x (7 - x))) / 4 from x = sigma^2 / (norm_1 norm_inf).
    """
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    if num_iters is None:
        keep = sigma > 1e-12 * sigma.max()
        z = torch.where(keep, 1 / sigma.where(keep, torch.ones_like(sigma)), torch.zeros_like(sigma))
    else:
        norm = torch.linalg.matrix_norm(matrix, 1) * torch.linalg.matrix_norm(matrix, torch.inf)
        x = sigma**2 / norm
        for _ in range(num_iters):
            x = x * (13 - x * (15 - x * (7 - x))) / 4
        z = x / sigma
    return vh.mT @ torch.diag(z) @ u.mT


def nystrom_matrix(
    query: Tensor,
    key: Tensor,
    *,
    num_landmarks: int,
    num_iters: int | None,
    scale: float,
    query_tokens: list[int],
    key_tokens: list[int],
) -> Tensor:
    """The approximate attention matrix (n, s) of one head, with zero columns for masked keys."""
    full = query.new_zeros(len(query), len(key))
    if not query_tokens or not key_tokens:
        return full
    query_landmarks = torch.stack([query[seg].mean(0) for seg in segments(query_tokens, num_landmarks)])
    key_landmarks = torch.stack([key[seg].mean(0) for seg in segments(key_tokens, num_landmarks)])
    left = torch.softmax(scale * query @ key_landmarks.T, -1)
    core = torch.softmax(scale * query_landmarks @ key_landmarks.T, -1)
    right = torch.softmax(scale * query_landmarks @ key[key_tokens].T, -1)
    columns = torch.nn.functional.one_hot(torch.tensor(key_tokens), len(key)).to(query.dtype)
    return left @ pinv(core, num_iters) @ right @ columns


def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    *,
    num_landmarks: int,
    num_iters: int | None = 6,
    scale: float | None = None,
) -> Tensor:
    """(b, h, n, d), (b, g, s, d), (b, g, s, v) -> (b, h, n, v), head by head."""
    b, h, n, d = query.shape
    g, s = key.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    if query_mask is None and n == s:
        query_mask = key_mask
    samples = []
    for i in range(b):
        key_tokens = list(range(s)) if key_mask is None else key_mask[i].nonzero().flatten().tolist()
        query_tokens = list(range(n)) if query_mask is None else query_mask[i].nonzero().flatten().tolist()
        heads = []
        for j in range(h):
            group = j // (h // g)
            matrix = nystrom_matrix(
                query[i, j],
                key[i, group],
                num_landmarks=num_landmarks,
                num_iters=num_iters,
                scale=scale,
                query_tokens=query_tokens,
                key_tokens=key_tokens,
            )
            heads.append(matrix @ value[i, group])
        samples.append(torch.stack(heads))
    return torch.stack(samples)
