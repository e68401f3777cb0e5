"""Bytes to floats, on whatever device the batch is."""

from collections.abc import Sequence

import torch


class Normalize:
    """uint8 [b, 3, H, W] to float32 (images / 255 - mean) / std; mean and std are fractions of 1."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        mean_, std_ = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self._scale = (1 / (255 * std_)).float().view(-1, 1, 1)
        self._shift = (-mean_ / std_).float().view(-1, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self._scale.device != images.device:
            self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        return images.float().mul_(self._scale).add_(self._shift)
