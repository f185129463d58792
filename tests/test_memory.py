"""Peaks of memory, and what is kept for the next tensors."""

import os
import statistics
import subprocess
import sys

import pytest
import torch

from nystrom import memory

MIB = 2**20
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's counters are those of Linux")

FAULTS = """
import resource, sys, torch
from nystrom import memory
if "keep" in sys.argv:
    print(memory.keep_freed())
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*[faults() for _ in range(20)])
"""


def told(*arguments: str, **environment: str) -> list[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS, *arguments]
    done = subprocess.run(command, env={**own, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.split()


@LINUX
def test_peak_counts_what_was_held_in_between():
    if torch.cuda.is_available():
        pytest.skip("resident memory is meant")
    torch.ones(2**24).sum()  # the threads' own memory
    before = memory.reset_peak()
    torch.ones(2**26)  # 256 MiB, given back at once
    assert 240 * MIB < memory.peak_above(before) < 300 * MIB
    before = memory.reset_host_peak()
    assert memory.host_peak_above(before) < 16 * MIB
    assert memory.host_peak_above(2**50) == 0


@LINUX
def test_what_is_freed_is_kept_for_the_next_tensor():
    if os.confstr("CS_GNU_LIBC_VERSION") is None:
        pytest.skip("another C library")
    pages = 64 * MIB // os.sysconf("SC_PAGE_SIZE")
    assert all(int(faults) >= pages / 2 for faults in told())
    answer, *kept = told("keep")
    assert answer == "True" and len(kept) == 20
    # where a small block lands behind a tensor, the heap grows by another one: a few times, at any of the rounds
    assert statistics.median(map(int, kept)) < pages / 100


@LINUX
@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_environment_says_of_malloc_stands(name):
    value = "glibc.malloc.mmap_threshold=4096" if name == "GLIBC_TUNABLES" else "4096"
    answer, *_ = told("keep", **{name: value})
    assert answer == "False"
