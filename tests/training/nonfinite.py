"""A trainer in which a test makes values of a step non-finite."""

import math
from typing import Any

import torch

from karat_scale.data.augmentation.mixing import MixParams
from karat_scale.data.batch import Batch
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.trainer import Trainer

# "offset": the loss is infinite, but its gradients are finite.
KINDS = ("data", "loss", "offset", "gradient")


class NonfiniteTrainer(Trainer):
    """A trainer that spoils this rank's next micro batch by `inject`, or the loss at the start of each of `bad_steps`.

    `inject` is one of KINDS. In each of `bad_steps`, the first micro batch has a loss that is NaN.
    """

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
