"""What varies over training, as pure functions of the step: learning rates, momentum, mask-loss weight.

Steps count from 0; a step's values are those in force while it runs. Section numbers refer to docs/method.md.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from automix_dist.config import Config


class StepValues(NamedTuple):
    """Everything scheduled that one step uses."""

    lr: float
    mix_lr: float
    """The Mix Block's learning rate."""
    momentum: float
    """The share of itself that the momentum encoder keeps."""
    mask_loss_weight: float
    train_generator: bool = True
    """Whether the momentum encoder judges the Mix Block's samples."""


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine wave from start (progress 0) to end (progress 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


@dataclass(frozen=True)
class Schedule:
    """All schedules of a run. `at(step)` depends on nothing but the step, so a resumed run needs no saved state."""

    config: Config
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    def at(self, step: int) -> StepValues:
        """What is in force while the step, counted from 0, runs."""
        return StepValues(
            lr=self._learning_rate(step),
            mix_lr=self._mix_learning_rate(step),
            momentum=self._momentum(step),
            mask_loss_weight=self._mask_loss_weight(step),
            train_generator=not self._mix_block_rests(step) and step % self.config.automix.generator_every == 0,
        )

    def _mix_block_rests(self, step: int) -> bool:
        return step >= self.config.automix.mix_block_until * self.total_steps

    def _progress(self, step: int) -> float:
        if self.config.optimizer.lr_update == "epoch":
            return (step // self.steps_per_epoch) / self.config.epochs
        return step / self.total_steps

    def _learning_rate(self, step: int) -> float:
        """Cosine times a linear warm-up; the warm-up does not shift the cosine (section 2.9)."""
        optimizer = self.config.optimizer
        value = cosine(optimizer.lr, optimizer.min_lr, self._progress(step))
        warmup_steps = optimizer.warmup_epochs * self.steps_per_epoch
        if step >= warmup_steps:
            return value
        return value * (1 - (1 - step / warmup_steps) * (1 - optimizer.warmup_start))

    def _mix_learning_rate(self, step: int) -> float:
        """The Mix Block's own cosine, without warm-up; where it has no rate of its own it follows the main one."""
        optimizer = self.config.optimizer
        if self._mix_block_rests(step):
            return 0.0
        if optimizer.mix_lrs is None:
            return self._learning_rate(step)
        return cosine(*optimizer.mix_lrs, self._progress(step))

    def _momentum(self, step: int) -> float:
        """Constant, then a cosine whose progress is counted from step 0, so that it starts with a small jump
        (section 2.7). Step 0 keeps the base even with momentum_start = 0."""
        automix = self.config.automix
        if self.config.policy.ema_decay:
            return self.config.policy.ema_decay
        if step < int(automix.momentum_start * self.total_steps):
            return automix.momentum
        return cosine(automix.momentum, automix.momentum_end, step / self.total_steps)

    def _mask_loss_weight(self, step: int) -> float:
        automix = self.config.automix
        if self._mix_block_rests(step):
            return 0.0
        if automix.mask_loss_schedule == "constant":
            return automix.mask_loss_weight
        if automix.mask_loss_schedule == "cosine":
            return cosine(automix.mask_loss_weight, 0.0, step / self.total_steps)
        return automix.mask_loss_weight * float(self._compound_cosine[min(step, self.total_steps - 1)])

    @cached_property
    def _compound_cosine(self) -> np.ndarray:
        """Product of (1 + cos(pi t / T)) / 2 over t = 0 .. step, for every step: what the published code computes."""
        return np.cumprod((1 + np.cos(np.pi * np.arange(self.total_steps) / self.total_steps)) / 2)
