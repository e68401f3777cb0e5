"""What `train.precision` and `train.tf32` mean, in one place: dtypes, autocast, and torch's switches.

Optimizer states, master weights, the EMA and sums of gradients are float32 in every precision.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn

from karat_scale.foundation.errors import RecipeError
from karat_scale.foundation.machine import cpu_has_bf16
from karat_scale.recipe import TrainConfig


@dataclass(frozen=True)
class Precision:
    """What the forward pass computes in, and what the module's parameters and inputs are."""

    compute: torch.dtype
    weights: torch.dtype

    @property
    def autocasts(self) -> bool:
        """Whether autocast rounds the weights on the way, since they are held in more bits."""
        return self.compute != self.weights

    def autocast(self, device_type: str) -> AbstractContextManager[Any]:
        """Autocast as this precision needs it, for code that no DeepSpeed engine surrounds."""
        return torch.autocast(device_type, self.compute if self.autocasts else None, enabled=self.autocasts)


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "bf16": Precision(torch.bfloat16, torch.float32),
    "bf16_weights": Precision(torch.bfloat16, torch.bfloat16),
    "fp16": Precision(torch.float16, torch.float16),
}
"""By `train.precision`, at every ZeRO stage that takes it."""


def pixel_dtype(train: TrainConfig, device: torch.device) -> torch.dtype:
    """What images are made in for a model that is trained on the device.

    On a GPU it is what the model computes in, to which it would round them first. On a CPU it is float32.
    """
    return torch.float32 if device.type == "cpu" else PRECISIONS[train.precision].compute


def cast_images(images: Any, precision: Precision) -> Any:
    """A batch in the dtype of the weights: one tensor [b, 3, H, W], or a list of tensors [3, h, w].

    One that is in what the model computes in stays so: autocast would round it to that.
    """
    if not isinstance(images, torch.Tensor):
        return [cast_images(image, precision) for image in images]
    return images if images.dtype == precision.compute else images.to(precision.weights)


def forward_for_evaluation(model: nn.Module, train: TrainConfig, device: torch.device) -> Callable[[Any], Any]:
    """Move a model to a device, in evaluation mode and its precision; return its forward pass without gradients.

    A recipe's fp16 is computed in fp32 on a CPU.
    """
    slow = train.precision == "fp16" and device.type == "cpu"
    precision = PRECISIONS["fp32" if slow else train.precision]
    allow_tf32(train.tf32)
    model.to(device, precision.weights).eval()

    @torch.no_grad()
    def forward(images: Any) -> Any:
        with precision.autocast(device.type):
            return model(cast_images(images, precision))

    return forward


def check_precision(precision: str, device: torch.device) -> None:
    """Raises RecipeError for fp16 on a CPU, which has few instructions for it."""
    if precision == "fp16" and device.type == "cpu":
        raise RecipeError("train.precision = fp16 needs a GPU; on a CPU use fp32 or bf16")


def slow_precision(precision: str, device: torch.device) -> str:
    """Return a line of advice where the device computes in this precision slowly; "" elsewhere."""
    if device.type == "cpu" and precision.startswith("bf16") and not cpu_has_bf16():
        return (
            f"train.precision = {precision} is several times slower than fp32 on this processor, which has no bf16 "
            "instructions; use train.precision=fp32"
        )
    return ""


def autocast_inside(model: nn.Module, precision: Precision, device_type: str) -> None:
    """Let autocast begin inside the model's own forward pass.

    DeepSpeed switches off, inside its engine, an autocast of CUDA's that began outside.
    """
    if precision.autocasts:
        model.forward = _under_autocast(model.forward, precision, device_type)


def _under_autocast(forward: Callable[..., Any], precision: Precision, device_type: str) -> Callable[..., Any]:
    @wraps(forward)
    def cast(*inputs: Any, **options: Any) -> Any:
        with precision.autocast(device_type):
            return forward(*inputs, **options)

    return cast


def matrix_peak(train: TrainConfig, peaks: Mapping[str, float]) -> float | None:
    """FLOP/s of a GPU's matrix products as a recipe has them, of `hardware.Gpu.peaks`; None where it has no such units.

    A GPU without TF32 computes in fp32 whatever `train.tf32` says.
    """
    if train.precision == "fp32":
        return peaks.get("tf32" if train.tf32 else "fp32", peaks["fp32"])
    return peaks.get("fp16" if train.precision == "fp16" else "bf16")


def compute_the_same_twice() -> None:
    """Keep cuDNN from algorithms that add in no fixed order: a run that resumes must end with the same bits.

    Only patch embeddings and stems are convolutions.
    """
    torch.backends.cudnn.deterministic = True


def allow_tf32(allowed: bool) -> None:
    """Set torch's switches for fp32 matrix products and convolutions on GPUs; the attention kernels read them."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
