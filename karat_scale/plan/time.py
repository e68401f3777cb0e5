"""How long one GPU computes on an image, from operations and bytes, or from what a run measured."""

import contextlib
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from karat_scale.hardware import Gpu, find_gpu
from karat_scale.models.flops import flops_per_image
from karat_scale.plan.footprint import Footprint
from karat_scale.recipe import Recipe
from karat_scale.train.run_directory import RunDirectory

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


def measured(recipe: Recipe, gpu: Gpu | None) -> ImageTime | None:
    """What the recipe's own run logged on this GPU (None: a CPU): the median of its last hundred rates, a rank's part.

    None where there is no such run, or it ran on something else.
    """
    directory = RunDirectory(recipe.run.dir)
    summary = directory.summary() or {}
    device, world = str(summary.get("device", "")), summary.get("world_size")
    rates = _rates(directory.metrics_file)
    if not rates or not world or (find_gpu(device) is not gpu if gpu else not device.startswith("CPU")):
        return None
    return ImageTime(int(world) / statistics.median(rates[-100:]), f"measured in {directory.path} on {device}")


def _rates(metrics: Path) -> list[float]:
    if not metrics.is_file():
        return []
    rates = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a run that goes on may not be whole
            event = json.loads(line)
            rates.append(event.get("images_per_second") if event.get("event") == "train" else None)
    return [float(rate) for rate in rates if rate]
