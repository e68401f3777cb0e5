"""How much of a device's arithmetic training uses: FLOP/s of the model's equations, and MFU where the peak is known."""

from functools import cached_property

import torch

from karat_scale.engine.precision import matrix_peak
from karat_scale.machine import find_gpu
from karat_scale.models.flops import flops_per_image
from karat_scale.recipe import Recipe, TrainConfig


def device_peak(device: torch.device, train: TrainConfig) -> float | None:
    """The most FLOP/s that a device has in a recipe's precision; None for a CPU and for a GPU not in the table."""
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return matrix_peak(train, gpu.peaks) if gpu is not None else None


class Efficiency:
    """What a rate of images is in FLOP/s of one device (arXiv 2204.02311, appendix B, defines MFU).

    Args:
        devices: how many devices the images are shared by.
        peak: FLOP/s of one, or None when nobody knows.
    """

    def __init__(self, recipe: Recipe, devices: int, peak: float | None) -> None:
        self._recipe, self._devices, self._peak = recipe, devices, peak

    def figures(self, images_per_second: float | None) -> dict[str, float | None]:
        """`tflops`, 1e12 FLOP/s a device, and `mfu`, a fraction of the peak if that is known."""
        achieved = self._flops * images_per_second / self._devices if images_per_second else None
        figures = {"tflops": achieved / 1e12 if achieved else None}
        if self._peak:
            figures["mfu"] = achieved / self._peak if achieved else None
        return figures

    @cached_property
    def _flops(self) -> int:
        # Counted at the first report: a start need not wait for it.
        return flops_per_image(self._recipe.model, self._recipe.attention, self._recipe.train.freeze).training
