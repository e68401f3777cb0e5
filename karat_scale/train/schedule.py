"""The learning rate as a pure function of the step."""

import math
from dataclasses import dataclass

from karat_scale.recipe import Recipe


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up from `warmup_lr` to `peak_lr`, then half a cosine down to `min_lr` at `total_steps`."""

    peak_lr: float
    min_lr: float
    warmup_lr: float
    warmup_steps: int
    total_steps: int

    def lr(self, step: int) -> float:
        """The rate for the update that follows `step` finished updates."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.peak_lr - self.warmup_lr) * step / self.warmup_steps
        if step >= self.total_steps:
            return self.min_lr
        return self.min_lr + 0.5 * (self.peak_lr - self.min_lr) * (1 + math.cos(math.pi * step / self.total_steps))


def build_schedule(recipe: Recipe, steps_per_epoch: int) -> CosineSchedule:
    """The recipe's schedule in steps (paper, training recipe: lr * batch / 512, cosine per step)."""
    batches = recipe.train.global_batch / recipe.optim.lr_batch if recipe.optim.lr_batch else 1.0
    return CosineSchedule(
        peak_lr=recipe.optim.lr * batches,
        min_lr=recipe.schedule.min_lr,
        warmup_lr=recipe.schedule.warmup_lr,
        warmup_steps=round(recipe.schedule.warmup_epochs * steps_per_epoch),
        total_steps=recipe.train.epochs * steps_per_epoch,
    )
