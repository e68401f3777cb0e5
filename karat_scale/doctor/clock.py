"""Timing of something that is done again and again, on every rank alike."""

import statistics
import time
from collections.abc import Callable

import torch

from karat_scale.train.distributed import World

FEWEST = 2


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    wait_for(device)
    begun = time.perf_counter()
    action()
    wait_for(device)
    return time.perf_counter() - begun


def repeated(action: Callable[[], float], seconds: float, world: World) -> float:
    """The median of what `action` measures in about `seconds`; on the slowest rank, and as often on each.

    The first call pays for warm-up and does not count.
    """
    action()
    begun = time.perf_counter()
    measured: list[float] = []
    while len(measured) < FEWEST or not world.any(time.perf_counter() - begun > seconds):
        measured.append(action())
    return slowest(statistics.median(measured), world)


def slowest(value: float, world: World) -> float:
    """The largest of all ranks' values."""
    return max(world.gather(value))
