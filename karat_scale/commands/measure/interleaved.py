"""Times of several contenders in turn, so that a machine's drift affects all alike; time and memory of one call."""

import functools
import resource
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from karat_scale.engine.distributed import wait_for

# One measurement is long enough for events, and has few enough launches for the device's queue, which holds about
# 1,024.
SECONDS, MOST_CALLS = 0.01, 8
# The device is kept busy for a number of cycles; no known card runs faster than this.
CYCLES_PER_SECOND = 3e9
LONGEST_HOLD = 0.2


class Rounds(dict[str, list[float]]):
    """The figures of each contender in each round, by name."""

    def median(self, name: str) -> float:
        return statistics.median(self[name])

    def ratio(self, name: str, base: str) -> float:
        """Return the median over rounds of `name`'s figure over `base`'s in the same round."""
        return statistics.median(a / b for a, b in zip(self[name], self[base], strict=True))


def interleaved(measures: Mapping[str, Callable[[], float]], rounds: int) -> Rounds:
    """Return the figure of each contender in each of `rounds` rounds, after a warm-up round.

    Every other round runs in reverse order, so that it does not matter which contender follows which.
    """
    found = Rounds({name: [] for name in measures})
    for number in range(rounds + 1):
        for name in list(measures) if number % 2 else list(measures)[::-1]:
            figure = measures[name]()
            if number:
                found[name].append(figure)
    return found


def interleaved_seconds(
    contenders: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> Rounds:
    """Return the seconds of each contender in each of `rounds` rounds of `interleaved`."""
    return interleaved({name: functools.partial(timed, run, clock) for name, run in contenders.items()}, rounds)


def timed(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of a call."""
    begun = clock()
    run()
    return clock() - begun


def calls_for(run: Callable[[], object], device: str) -> int:
    """Return how many calls one measurement takes, after two that are not counted."""
    for _ in range(2):
        run()
    return max(1, min(MOST_CALLS, round(SECONDS / max(wall_seconds(run, 1, device), 1e-6))))


def wall_seconds(run: Callable[[], object], calls: int, device: str | torch.device) -> float:
    """Return the seconds of a call by the clock, from an idle device to an idle device."""
    wait_for(device)
    begun = time.perf_counter()
    for _ in range(calls):
        run()
    wait_for(device)
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
    if spin := getattr(torch.cuda, "_sleep", None):  # what torch's own tests use
        spin(int(min(1.5 * launching, LONGEST_HOLD) * CYCLES_PER_SECOND))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / calls


def processor_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    return time.process_time() + children_seconds()


def children_seconds() -> float:
    """Return the processor time of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cuda_peak(run: Callable[[], object]) -> float:
    """Return the most megabytes that `run` allocates on the GPU beyond what is there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
