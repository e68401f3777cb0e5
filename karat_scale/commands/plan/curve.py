"""Throughput from 1 to 1,024 GPUs, on paper: docs/scaling.md explains the model and what it misses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from karat_scale.commands.plan.communication import Links, seconds, step_seconds, traffic
from karat_scale.commands.plan.time import ComputeTime
from karat_scale.data.plan import micro_batch_of
from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe import Recipe

GPUS = tuple(2**power for power in range(11))


@dataclass(frozen=True)
class Node:
    """How many GPUs a node has, and the links between GPUs."""

    gpus: int
    links: Links


@dataclass(frozen=True)
class Point:
    """A number of GPUs, and images a second.

    weak: each GPU has the same micro batch, and so the global batch grows. efficiency: of that, over as many times one
    GPU. strong: the recipe's global batch is shared by all; None where it does not divide.
    """

    gpus: int
    weak: float
    efficiency: float
    strong: float | None


def curve(
    recipe: Recipe, parameters: int, config: Mapping[str, Any], micro_batch: int, time: ComputeTime, node: Node
) -> list[Point]:
    """A point for each of GPUS. config: DeepSpeed's, filled. time: of one GPU, on a micro batch."""

    def rate(gpus: int, images: int, accumulation: int) -> float:
        load = traffic(parameters, config, accumulation, recipe.train.precision)
        communication = seconds(load, gpus, node.gpus, node.links)
        return gpus * images * accumulation / step_seconds(time.seconds(images, accumulation), load, communication)

    def strong(gpus: int) -> float | None:
        try:
            part = micro_batch_of(recipe.changed(train__micro_batch=None), gpus)
        except RecipeError:
            return None
        even = recipe.augment.mixes
        sizes = (m for m in range(1, min(part, micro_batch) + 1) if part % m == 0 and not (even and m % 2))
        images = max(sizes, default=part)
        return rate(gpus, images, part // images)

    one = rate(1, micro_batch, 1)
    points = []
    for gpus in GPUS:
        weak = rate(gpus, micro_batch, 1)
        points.append(Point(gpus, weak, weak / (gpus * one), strong(gpus)))
    return points
