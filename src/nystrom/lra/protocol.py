"""How a run goes: learning rates by steps or by the clock, and the end of a time budget."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from transformers import TrainerCallback

START = 25
"""The learning rate begins at this fraction of its peak, as OneCycleLR's does."""
LOOKS = 8
"""Looks at the dev set within a time budget (count)."""


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW as the authors have it: betas 0.9 and 0.999, eps 1e-6, no weight decay."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)


def one_cycle(optimizer: torch.optim.AdamW, lr: float, steps: int, warmup: int) -> OneCycleLR:
    """The authors' schedule: up and down in straight lines, and beta1 the other way, 0.95 to 0.85 and back.

    That beta1 moves is OneCycleLR's default, which the authors' code leaves on, over the betas that it gives to AdamW.
    """
    rise = max(warmup, 2) / steps  # with less it divides by zero
    return OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=rise, anneal_strategy="linear")


def up_and_down(optimizer: torch.optim.AdamW, rise: float, done: Callable[[], float]) -> LRScheduler:
    """The same lines for the learning rate, and beta1 left alone.

    Args:
        optimizer: with the peak as its rate.
        rise: part of the run in which the rate rises.
        done: part of the run that is over, by steps or by the clock.
    """

    def factor(_: int) -> float:
        x = min(done(), 1.0)
        if x < rise:
            return 1 / START + (1 - 1 / START) * x / rise
        return max((1 - x) / (1 - rise), 0.0)

    return LambdaLR(optimizer, factor)


class Budget(TrainerCallback):
    """Stop after so many seconds of training, and look at the dev set at equal times on the way.

    Args:
        seconds: of training steps; looking at the dev set is not counted.
        elapsed: those that are over.
    """

    def __init__(self, seconds: float, elapsed: Callable[[], float]) -> None:
        self.seconds, self.elapsed = seconds, elapsed
        self._looks = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._looks = min(int(self.elapsed() / self.seconds * LOOKS), LOOKS)  # those before a resume

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        over = 1.0 if state.global_step >= state.max_steps else self.elapsed() / self.seconds
        before, self._looks = self._looks, min(int(over * LOOKS), LOOKS)
        if self._looks > before:
            control.should_evaluate = control.should_save = True
        if over >= 1:
            control.should_training_stop = True
