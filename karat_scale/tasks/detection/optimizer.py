"""A detector's optimizer groups, with layer-wise learning rates in its backbone, and its learning rate schedule."""

from dataclasses import dataclass
from typing import Any

from karat_scale.engine.parameter_groups import Groups, parameter_groups
from karat_scale.tasks.detection.recipe import AdamWConfig, DetectionRecipe


def detector_groups(model: Any, optim: AdamWConfig) -> Groups:
    """Return a detector's groups like those of `parameter_groups`.

    The pyramid and the heads are one layer above the last block. So with layer decay d, block n of L has the factor
    d^(L - n), n = 0 .. L - 1, as in ViTDet, and the layers above it have 1. Biases and norms have no weight decay.
    """
    vit = model.backbone.vit
    groups = parameter_groups(vit, optim)
    for group in groups:
        group["lr_scale"] *= optim.layer_decay
    of_vit = set(vit.parameters())
    above = [parameter for parameter in model.parameters() if parameter not in of_vit]
    for decays in (True, False):
        own = [p for p in above if (p.ndim > 1) == decays and p.requires_grad]
        groups.append({"params": own, "weight_decay": optim.weight_decay if decays else 0.0, "lr_scale": 1.0})
    return groups


@dataclass(frozen=True)
class StepSchedule:
    """Linear warm-up to `peak_lr`, which is multiplied by `drop_factor` at each of the steps `drops`.

    It is also multiplied by `epoch_decay` after each of `steps_per_epoch` steps.
    """

    peak_lr: float
    warmup_steps: int
    warmup_factor: float
    drops: tuple[int, ...]
    drop_factor: float
    epoch_decay: float
    steps_per_epoch: int

    def lr(self, step: int) -> float:
        """Return the rate for the update after `step` finished updates."""
        rate = self.peak_lr * self.drop_factor ** sum(step >= drop for drop in self.drops)
        rate *= self.epoch_decay ** (step // self.steps_per_epoch)
        if step < self.warmup_steps:
            rate *= self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup_steps
        return rate


def build_schedule(recipe: DetectionRecipe, steps_per_epoch: int) -> StepSchedule:
    """Return the recipe's schedule in steps."""
    total, config, optim = recipe.train.epochs * steps_per_epoch, recipe.schedule, recipe.optim
    return StepSchedule(
        peak_lr=optim.lr * (recipe.train.global_batch / optim.lr_batch if optim.lr_batch else 1.0),
        warmup_steps=config.warmup_steps,
        warmup_factor=config.warmup_factor,
        drops=tuple(round(share * total) for share in config.drops),
        drop_factor=config.drop_factor,
        epoch_decay=config.epoch_decay,
        steps_per_epoch=steps_per_epoch,
    )
