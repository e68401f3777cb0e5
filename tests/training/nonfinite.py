"""A loop into which a test puts what is not finite."""

import math
from typing import Any

import torch

from karat_scale.data.augmentation.mixing import MixParams
from karat_scale.data.batch import Batch
from karat_scale.training.loop import Loop, Parts
from karat_scale.training.tasks.classification.task import TrainState

# "offset": the loss is infinite and its gradients are as finite as ever.
KINDS = ("data", "loss", "offset", "gradient")


class NonfiniteLoop(Loop):
    """Puts a kind into the next micro batch of this rank, or "loss" into the first of each step in a range."""

    def __init__(self, parts: Parts, state: TrainState, inject_at: int = 0, until: int = 0, inject: str = "") -> None:
        super().__init__(parts, state)
        self.inject = inject
        self._steps = range(inject_at, max(until, inject_at) + 1) if inject_at else range(0)
        task: Any = parts.task
        self._normalize, self._plain_objective = task.normalize, task.objective
        task.normalize, task.objective = self._images, self._loss

    def step(self, micro_batches: list[Batch]) -> None:
        if self._steps:
            self.inject = "loss" if self.state.step + 1 in self._steps else ""
        super().step(micro_batches)

    def _images(self, images: torch.Tensor, *mix: MixParams) -> torch.Tensor:
        normal = self._normalize(images, *mix)
        return torch.full_like(normal, math.nan) if self.inject == "data" else normal

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        kind, self.inject = self.inject, ""
        if kind == "gradient":
            logits.register_hook(lambda gradient: torch.full_like(gradient, math.nan))
        loss = self._plain_objective(logits, targets)
        return loss + {"loss": math.nan, "offset": math.inf}.get(kind, 0.0)
