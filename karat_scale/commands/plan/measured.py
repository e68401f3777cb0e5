"""How long one GPU computes on an image, by what a run has logged: of the same recipe, where speed is concerned."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from karat_scale.commands.plan.communication import compute_seconds, seconds, traffic
from karat_scale.commands.plan.curve import Node
from karat_scale.commands.plan.time import ComputeTime
from karat_scale.commands.status.standing import read_events
from karat_scale.data.plan import micro_batch_of
from karat_scale.engine.deepspeed_config import load_ds_config
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.machine import Gpu, find_gpu
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import flatten
from karat_scale.training.run_directory import RunDirectory

# What sets the speed of a rank: keys, or sections that stand for all their keys.
SPEED_KEYS = (
    "model",
    "attention",
    "optim.name",
    "train.precision",
    "train.compile",
    "train.freeze",
    "train.recompute",
    "augment.run_on",
    "distill.from",
)


@dataclass(frozen=True)
class Measured:
    """A run of `recipe` by `world` ranks: its DeepSpeed config, filled, and images a second, collectives included."""

    recipe: Recipe
    world: int
    config: Mapping[str, Any]
    rate: float
    source: str

    def compute_time(self, parameters: int, node: Node) -> ComputeTime:
        """Seconds of an image without the collectives that the run's own world took, as the plan counts them.

        A plan for that world adds them again, and comes to what was measured; one for another adds its own.
        """
        train = self.recipe.train
        load = traffic(parameters, self.config, self.config["gradient_accumulation_steps"], train.precision)
        communication = seconds(load, self.world, node.gpus, node.links)
        step = compute_seconds(train.global_batch / self.rate, load, communication)
        return ComputeTime(step / (train.global_batch // self.world), self.source)


def find_measured(recipe: Recipe, gpu: Gpu | None) -> Measured | str | None:
    """The rate of the run in the recipe's own directory on this GPU (None: a CPU): the median of its last hundred.

    None where there is no such run; where there is one that says nothing about this recipe, why, in a line.
    """
    directory = RunDirectory(recipe.run.dir)
    rates = _rates(directory.metrics_file)
    if not rates:
        return None
    refused = f"what {directory.path} measured is not used: "
    summary = directory.summary() or {}
    device, world = str(summary.get("device", "")), summary.get("world_size")
    if not world:
        return f"{refused}it has no summary.json, which says on what it ran"
    if find_gpu(device) is not gpu if gpu else not device.startswith("CPU"):
        return f"{refused}it ran on {device}"
    try:
        old = directory.recipe()
        if old.deepspeed.config == recipe.deepspeed.config:  # the user names the file too, so it may be read
            old = old.changed(deepspeed=recipe.deepspeed)
        if differing := _differing(old, recipe):
            return f"{refused}it ran with {differing}"
        config = load_ds_config(old, int(world), micro_batch_of(old, int(world)))
        source = f"measured in {directory.path} on {device}"
        return Measured(old, int(world), config, statistics.median(rates[-100:]), source)
    except UserError as error:
        return f"{refused}{error}"


def _differing(old: Recipe, new: Recipe) -> str:
    """The first key of SPEED_KEYS that differs, with its old value, and how many more do; "" if none."""
    before, after = flatten(old), flatten(new)
    keys = [
        key
        for key in after
        if before.get(key) != after[key] and any(key == speed or key.startswith(f"{speed}.") for speed in SPEED_KEYS)
    ]
    more = f", and {len(keys) - 1} more" if keys[1:] else ""
    if not keys:
        return ""
    value = before.get(keys[0])
    return f"{keys[0]} = {value if value != '' else '(empty)'}{more}"


def _rates(metrics: Path) -> list[float]:
    rates = (event.get("images_per_second") for event in read_events(metrics) if event.get("event") == "train")
    return [float(rate) for rate in rates if rate]
