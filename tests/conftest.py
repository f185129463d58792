"""Shared fixtures: a fixed seed for every test, and one thread so that results do not depend on the machine."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a hub
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
