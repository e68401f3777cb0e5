"""A trainer into which a test puts what is not finite."""

import math
from typing import Any

import torch

from karat_scale.data.augmentation.mixing import MixParams
from karat_scale.data.batch import Batch
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.trainer import Trainer

# "offset": the loss is infinite and its gradients are as finite as ever.
KINDS = ("data", "loss", "offset", "gradient")


class NonfiniteTrainer(Trainer):
    """Puts `inject` into the next micro batch of this rank, or "loss" into the first of each of `bad_steps`."""

    inject = ""
    bad_steps = range(0)

    def __init__(self, task: Any, directory: RunDirectory) -> None:
        super().__init__(task, directory)
        finish = task.loader.finish
        self._normalize, self._plain_objective = finish.normalize, task.objective
        finish.normalize, task.objective = self._images, self._loss

    def step(self, micro_batches: list[Batch]) -> None:
        if self.bad_steps:
            self.inject = "loss" if self.state.step + 1 in self.bad_steps else ""
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
