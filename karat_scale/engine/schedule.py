"""The learning rate as a pure function of the step."""

import math
from dataclasses import dataclass

from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe import Recipe


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up from `warmup_lr` to `peak_lr`, then half a cosine down to `min_lr` at `total_steps`.

    The half cosine begins at step `cosine_from`.
    """

    peak_lr: float
    min_lr: float
    warmup_lr: float
    warmup_steps: int
    total_steps: int
    cosine_from: int = 0

    def lr(self, step: int) -> float:
        """The rate for the update that follows `step` finished updates."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.peak_lr - self.warmup_lr) * step / self.warmup_steps
        if step >= self.total_steps:
            return self.min_lr
        done = (step - self.cosine_from) / (self.total_steps - self.cosine_from)
        return self.min_lr + 0.5 * (self.peak_lr - self.min_lr) * (1 + math.cos(math.pi * done))


def build_schedule(recipe: Recipe, steps_per_epoch: int) -> CosineSchedule:
    """The recipe's schedule in steps (paper, training recipe: lr * batch / 512, cosine per step).

    Raises:
        RecipeError: the warm-up has more steps than training.
    """
    batches = recipe.train.global_batch / recipe.optim.lr_batch if recipe.optim.lr_batch else 1.0
    schedule = recipe.schedule
    total_steps = recipe.train.epochs * steps_per_epoch
    warmup_steps = schedule.warmup_steps
    if warmup_steps is None:
        warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
    elif warmup_steps > total_steps:
        raise RecipeError(
            f"schedule.warmup_steps = {warmup_steps} are more than the {total_steps} steps of train.epochs = "
            f"{recipe.train.epochs}; shorten the warm-up"
        )
    return CosineSchedule(
        peak_lr=recipe.optim.lr * batches,
        min_lr=schedule.min_lr,
        warmup_lr=schedule.warmup_lr,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        cosine_from=warmup_steps if schedule.cosine_after_warmup else 0,
    )
