"""Shared fixtures: a fixed seed for every test, and one thread so that results do not depend on the machine."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a hub
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("check", max_examples=40, deadline=None, derandomize=True)  # the same cases every time
settings.register_profile("nightly", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile("check")  # `--hypothesis-profile=nightly` chooses the other


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
