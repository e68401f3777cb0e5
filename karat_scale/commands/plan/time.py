"""How long one GPU and its host work on a step, estimated from operations, bytes and kernels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from karat_scale.commands.plan.attention_tiles import written_by_rows
from karat_scale.commands.plan.footprint import Footprint
from karat_scale.commands.plan.launches import StepLaunches
from karat_scale.engine.precision import matrix_peak
from karat_scale.foundation.machine import Gpu
from karat_scale.models.flops import flops_by_block, flops_per_image
from karat_scale.recipe import Recipe

# Fitted to three measured models on one card, and tested on others: docs/scaling.md.
MATRIX_EFFICIENCY = 0.75
TRAFFIC_PER_BYTE = 3.0
BANDWIDTH_EFFICIENCY = 0.75


@dataclass(frozen=True)
class ComputeTime:
    """What a rank spends on a step beside collectives, and where the figures come from.

    image: seconds of the GPU's work on an image, forward and backward. launches: None where `image` is measured, and
    holds what launches cost.
    """

    image: float
    source: str
    launches: StepLaunches | None = None

    def device(self, images: int, accumulation: int) -> float:
        """Seconds of the GPU on a step of `accumulation` micro batches of `images`, if the host is ahead of it."""
        gaps = self.launches.gaps(accumulation) if self.launches else 0.0
        return accumulation * images * self.image + gaps

    def host(self, accumulation: int) -> float:
        """Seconds of the host to launch it all."""
        return self.launches.host(accumulation) if self.launches else 0.0

    def seconds(self, images: int, accumulation: int) -> float:
        """Of a step: host and GPU work at once, and the slower of them sets the time."""
        return max(self.device(images, accumulation), self.host(accumulation))

    def is_bound_by_launches(self, images: int, accumulation: int) -> bool:
        """Whether the GPU waits for the host."""
        return self.host(accumulation) > self.device(images, accumulation)

    def least_micro_batch(self, accumulation: int) -> int:
        """The smallest power of two of images that keeps the GPU as busy as the host."""
        idle = max(self.host(accumulation) - self.device(0, accumulation), 0.0)
        return int(2 ** math.ceil(math.log2(max(idle / (accumulation * self.image), 1.0))))


def estimate(
    recipe: Recipe,
    gpu: Gpu,
    footprint: Footprint,
    config: Mapping[str, Any],
    parameters: Sequence[int],
    teacher_flops: int = 0,
) -> ComputeTime | None:
    """Matrix products at a share of the peak, all else at a share of the memory's bandwidth, and launches.

    Each byte that a pass allocates is written once and read about twice. None where the GPU lacks the precision.
    footprint: of a training step. config: DeepSpeed's, filled. parameters: elements of each tensor that learns.
    teacher_flops: of a teacher's forward pass for an image, of which only matrix products count.
    """
    peak = matrix_peak(recipe.train, gpu.peaks)
    if peak is None:
        return None
    flops = flops_per_image(recipe.model, recipe.attention, recipe.train.freeze).training + teacher_flops
    products = flops / (MATRIX_EFFICIENCY * peak)
    blocks = len(flops_by_block(recipe.model, recipe.attention))
    written = footprint.written(2) - footprint.written(1) + written_by_rows(recipe, on_gpu=True)
    bytes_ = TRAFFIC_PER_BYTE * written
    return ComputeTime(
        image=products + bytes_ / (BANDWIDTH_EFFICIENCY * gpu.bandwidth),
        source="estimated from operations, bytes and launches",
        launches=StepLaunches.of(footprint.launches, recipe.train, config, parameters, blocks),
    )
