"""Autocast kept out of what must not run in half precision."""

from contextlib import AbstractContextManager, nullcontext

import torch

_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla", "privateuseone")
# Asked here, once: up to torch 2.11 torch.compile cannot trace the question, and breaks the graph at it.
_WITH_AUTOCAST = frozenset(name for name in _DEVICES if torch.amp.is_autocast_available(name))


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off: the inverse is ill-conditioned and must not run in half precision."""
    return torch.autocast(device.type, enabled=False) if device.type in _WITH_AUTOCAST else nullcontext()
