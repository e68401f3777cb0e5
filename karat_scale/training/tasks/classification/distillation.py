"""The loss of a student that learns from a teacher's outputs, and the frozen teacher.

Soft: Hinton, Vinyals and Dean, arXiv 1503.02531. Hard, and the distillation token: DeiT (Touvron et al., arXiv
2012.12877).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from karat_scale.engine.precision import forward_for_evaluation
from karat_scale.recipe import Recipe
from karat_scale.recipe.train import DistillConfig
from karat_scale.training.tasks.classification.distillation_teacher import DistillationTeacher

ClassLoss = Callable[[Tensor, Tensor], Tensor]


class Distillation:
    """Adds a teacher to the classification loss of a recipe; the teacher is moved to the device."""

    def __init__(self, recipe: Recipe, teacher: DistillationTeacher, device: torch.device) -> None:
        self._config = recipe.distill
        self.teacher = teacher
        self._forward = forward_for_evaluation(teacher.network, recipe.train, device)
        # From the student's normalised pixels to the teacher's: x * scale + shift.
        mean, std = (torch.tensor(values, device=device) for values in (recipe.augment.mean, recipe.augment.std))
        their_mean, their_std = (torch.tensor(values, device=device) for values in (teacher.mean, teacher.std))
        self._scale = (std / their_std).view(1, 3, 1, 1)
        self._shift = ((mean - their_mean) / their_std).view(1, 3, 1, 1)

    def losses(self, output: Any, images: Tensor, targets: Tensor, of_labels: ClassLoss) -> dict[str, Tensor]:
        """Return the loss of a micro batch as `loss`, and its parts `label_loss` and `teacher_loss`.

        Args:
            output: the student's logits [b, classes], or those of the class token and of the distillation token.
            images: float [b, 3, H, W], as the student sees them.
            targets: float [b, classes], of the labels.
            of_labels: the loss of logits and targets.
        """
        logits, distilled = (part.float() for part in (output if isinstance(output, tuple) else (output, output)))
        label_loss = of_labels(logits, targets)
        teacher_loss = distillation_loss(distilled, self.teacher_logits(images), self._config)
        weight = self._config.weight
        loss = (1 - weight) * label_loss + weight * teacher_loss
        return {"loss": loss, "label_loss": label_loss, "teacher_loss": teacher_loss}

    def teacher_logits(self, images: Tensor) -> Tensor:
        """Return the teacher's logits [b, classes] for the student's images, resized to the teacher's size."""
        views = images.float() * self._scale + self._shift
        size = self.teacher.image_size
        if views.shape[-1] != size:
            views = functional.interpolate(views, (size, size), mode="bilinear", antialias=True)
        logits: Tensor = self._forward(views)
        return logits


def distillation_loss(student: Tensor, teacher: Tensor, config: DistillConfig) -> Tensor:
    """Return the mean loss of logits [b, classes] against a teacher's, computed in float32 at least.

    Soft: T^2 KL(softmax(teacher / T) || softmax(student / T)). Hard: the cross-entropy with the teacher's argmax.
    """
    student, teacher = (logits if logits.dtype == torch.float64 else logits.float() for logits in (student, teacher))
    if config.kind == "hard":
        return functional.cross_entropy(student, teacher.argmax(-1))
    temperature = config.temperature
    ours, theirs = (functional.log_softmax(logits / temperature, -1) for logits in (student, teacher))
    return temperature**2 * functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def use_distillation_token(model: nn.Module) -> bool:
    """Let a model with DeiT's distillation token return both tokens' logits in training; return whether it has one."""
    learn_apart = getattr(model, "set_distilled_training", None)
    if learn_apart is None:
        return False
    learn_apart()
    return True
