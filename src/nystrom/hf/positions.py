"""Longer tables of learnt positions, from shorter ones."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

How = Literal["tile", "interpolate"]


def extended(table: nn.Embedding, offset: int, length: int, how: How) -> nn.Embedding:
    """A table that reaches `length` positions, with the same rows before the first and the same dtype and device.

    Args:
        table: learnt positions.
        offset: rows before the first position's (count); they are kept as they are.
        length: positions that the new table is to have (count).
        how: "tile" repeats the rows from the first on, as often as needed; "interpolate" puts new rows between them,
            on straight lines from each to the next.

    Raises:
        ValueError: length is below what the table has already; an unknown `how`.
    """
    before, rows = table.weight.detach().split([offset, table.num_embeddings - offset])
    if how not in get_args(How):
        raise ValueError(f"how must be 'tile' or 'interpolate': got {how!r}")
    if length < len(rows):
        raise ValueError(f"length must be at least the {len(rows)} positions that there are: got {length}")
    if how == "tile":
        rows = rows[torch.arange(length, device=rows.device) % len(rows)]
    else:
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32)).mT[None]
        rows = F.interpolate(wide, length, mode="linear", align_corners=True)[0].mT.to(rows.dtype)
    weight = torch.cat([before, rows])
    longer = nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight)
    longer.weight.requires_grad_(table.weight.requires_grad)
    return longer.train(table.training)
