"""Bytes to what the model sees, on whatever device the batch is: normalised, mixed, and in the dtype it computes in."""

from collections.abc import Sequence

import torch

from karat_scale.data.augmentation import device_fused
from karat_scale.data.augmentation.mixing import MixParams, mixed


class Normalize:
    """uint8 [b, 3, H, W] to (images / 255 - mean) / std in `dtype`; mean and std are fractions of 1.

    Where Triton runs, one kernel reads the bytes and writes the result. Elsewhere torch computes it in passes. Both
    compute in float32, with the same operations in the same order, and round once to `dtype`: the bits are the same.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32) -> None:
        mean_, std_ = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self._scale = (1 / (255 * std_)).float().view(-1, 1, 1)
        self._shift = (-mean_ / std_).float().view(-1, 1, 1)
        self._numbers = self._scale.flatten().tolist(), self._shift.flatten().tolist()
        self._dtype = dtype

    def __call__(self, images: torch.Tensor, mix: MixParams | None = None) -> torch.Tensor:
        """Normalise images, and mix their pairs as `mix` says. Raises ValueError if an odd number shall mix."""
        mix = mix or MixParams("none")
        if mix.kind != "none" and len(images) % 2:
            raise ValueError(f"cannot mix pairs of an odd batch of {len(images)}")
        if device_fused.can_run(images.device):
            return device_fused.model_input(images, *self._numbers, mix, self._dtype)
        if self._scale.device != images.device:
            self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        return mixed(images.float().mul_(self._scale).add_(self._shift), mix).to(self._dtype)
