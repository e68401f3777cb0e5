"""Timing of repeated actions, on every rank at the same time."""

import statistics
import time
from collections.abc import Callable

import torch

from karat_scale.engine.distributed import World

FEWEST = 2


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, including the device's work."""
    wait_for(device)
    begun = time.perf_counter()
    action()
    wait_for(device)
    return time.perf_counter() - begun


def repeated(action: Callable[[], float], seconds: float, world: World) -> float:
    """Return the median of `action` over about `seconds`; of the slowest rank, with the same count on each.

    The first call is the warm-up and does not count.
    """
    action()
    begun = time.perf_counter()
    measured: list[float] = []
    while len(measured) < FEWEST or not world.any(time.perf_counter() - begun > seconds):
        measured.append(action())
    return slowest(statistics.median(measured), world)


def slowest(value: float, world: World) -> float:
    """Return the largest of all ranks' values."""
    return max(world.gather(value))
