"""Peaks of memory."""

import sys

import pytest
import torch

from nystrom import memory

MIB = 2**20
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's counters are those of Linux")


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
