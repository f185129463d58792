"""Memory of this process: how much it holds at its most, and whether what tensors give back is kept for the next ones.

Functions of the name peak are of the GPU where there is one, those of host_peak of resident memory.
"""

import ctypes
import os
import sys
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Names that glibc's malloc.h gives to what mallopt sets."""


def keep_freed() -> bool:
    """Let the C library keep what tensors on the CPU give back, for the tensors that come next; True where it does.

    glibc gives every block of 32 MiB or more back to the system at once, and the next one comes page by page, each one
    faulted in and cleared: a training step of long sequences may take twice as long. Kept, the process holds until it
    ends what it needed at its most, and more where tensors of many sizes leave holes between each other.

    Only glibc is told so, and not where the environment already tells it something about its malloc (MALLOC_...,
    GLIBC_TUNABLES).
    """
    told = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if not sys.platform.startswith("linux") or told:
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: 64 * 2**20}  # no block apart, nothing back, few steps
    return all(libc.mallopt(name, value) == 1 for name, value in settings.items())


def reset_peak() -> int:
    """Let `peak` forget what was before, and return what is held now (bytes)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return reset_host_peak()


def peak() -> int:
    """Most memory that this process has held at a time (bytes)."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else host_peak()


def peak_above(before: int) -> int:
    """By how much `peak` exceeds what `reset_peak` returned (bytes).

    Linux counts pages on each core and adds them up late: where little was needed, the peak may seem to lie below.
    """
    return max(0, peak() - before)


def reset_host_peak() -> int:
    """Let `host_peak` forget what was before (on Linux alone), and return the resident bytes now."""
    import psutil

    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return psutil.Process().memory_info().rss


def host_peak() -> int:
    """Most resident bytes so far, or since `reset_host_peak` where the system can forget."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def host_peak_above(before: int) -> int:
    """By how much `host_peak` exceeds what `reset_host_peak` returned (bytes); see `peak_above`."""
    return max(0, host_peak() - before)
