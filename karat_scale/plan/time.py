"""How long one GPU computes on an image, estimated from operations and bytes."""

from dataclasses import dataclass

from karat_scale.hardware import Gpu
from karat_scale.models.flops import flops_per_image
from karat_scale.plan.footprint import Footprint
from karat_scale.recipe import Recipe

# Fitted to three measured models on one card, and tested on others: docs/scaling.md.
MATRIX_EFFICIENCY = 0.75
TRAFFIC_PER_BYTE = 3.0
BANDWIDTH_EFFICIENCY = 0.75


@dataclass(frozen=True)
class ImageTime:
    """Seconds that one GPU spends on an image, forward and backward, and where the figure comes from."""

    seconds: float
    source: str


def estimate(recipe: Recipe, gpu: Gpu, footprint: Footprint) -> ImageTime | None:
    """Matrix products at a share of the peak, and all else at a share of the memory's bandwidth.

    Each byte that a pass allocates is written once and read about twice. None where the GPU lacks the precision.
    """
    peak = gpu.peaks.get(recipe.train.precision)
    if peak is None:
        return None
    products = flops_per_image(recipe.model, recipe.attention).training / (MATRIX_EFFICIENCY * peak)
    bytes_ = TRAFFIC_PER_BYTE * (footprint.written(2) - footprint.written(1))
    return ImageTime(products + bytes_ / (BANDWIDTH_EFFICIENCY * gpu.bandwidth), "estimated from operations and bytes")
