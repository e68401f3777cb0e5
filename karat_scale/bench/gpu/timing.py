"""Seconds of a call, by the device's events and by the clock."""

import time
from collections.abc import Callable

import torch

# Of one measurement: long enough for events, and few enough launches for the device's queue, which holds about 1,024.
SECONDS, MOST_CALLS = 0.01, 8
# The device is held back by cycles; no known card runs faster than this.
CYCLES_PER_SECOND = 3e9
LONGEST_HOLD = 0.2


def calls_for(run: Callable[[], object], device: str) -> int:
    """Return how many calls one measurement takes, after two that are not counted."""
    for _ in range(2):
        run()
    return max(1, min(MOST_CALLS, round(SECONDS / max(wall_seconds(run, 1, device), 1e-6))))


def wall_seconds(run: Callable[[], object], calls: int, device: str) -> float:
    """Return the seconds of a call by the clock, from a device that is idle to one that is idle again."""
    _wait(device)
    begun = time.perf_counter()
    for _ in range(calls):
        run()
    _wait(device)
    return (time.perf_counter() - begun) / calls


def device_seconds(run: Callable[[], object], calls: int, device: str) -> float:
    """Return the seconds of a call by the device's own events; by the clock on a CPU.

    The device is first kept busy for as long as the host needs to launch everything. So the events are as far apart as
    the kernels take, however slow the host is.
    """
    if device == "cpu":
        return wall_seconds(run, calls, device)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(calls):
        run()
    launching = time.perf_counter() - begun
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _hold(1.5 * launching)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / calls


def _hold(seconds: float) -> None:
    """Keep the device busy for about this time."""
    spin = getattr(torch.cuda, "_sleep", None)  # what torch's own tests use
    if spin is not None:
        spin(int(min(seconds, LONGEST_HOLD) * CYCLES_PER_SECOND))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
