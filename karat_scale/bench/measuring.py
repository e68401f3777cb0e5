"""Times of several contenders in turn, so that a machine's drift falls on all alike, and the memory of one call."""

import ctypes
import functools
import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def interleaved(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return what each contender measures of itself in each of `rounds` rounds, after a warm-up round.

    Every other round runs in reverse order, so that it does not matter which contender follows which.
    """
    found: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds + 1):
        names = list(measures) if number % 2 else list(measures)[::-1]
        for name in names:
            figure = measures[name]()
            if number:
                found[name].append(figure)
    return found


def interleaved_seconds(
    contenders: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Return the seconds of each contender in each of `rounds` rounds of `interleaved`."""

    def timed(run: Callable[[], object]) -> float:
        begun = clock()
        run()
        return clock() - begun

    return interleaved({name: functools.partial(timed, run) for name, run in contenders.items()}, rounds)


def median_ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """Return the median over rounds of `name`'s seconds over `base`'s in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def processor_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak_memory_of(make: Callable[..., Callable[[], None]], arguments: tuple[Any, ...], device: str) -> float:
    """Return the peak of extra megabytes of `make(*arguments, False)()`, after the warm-up `make(*arguments, True)()`.

    `make` is a module's function, since a new process imports it. On CUDA this is the allocator's peak; on the CPU
    the peak of the resident set (Linux).
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (make, arguments, device))


def _measure(make: Callable[..., Callable[[], None]], arguments: tuple[Any, ...], device: str) -> float:
    torch.set_num_threads(1)
    make(*arguments, True)()
    run = make(*arguments, False)
    return _cuda_peak(run) if device == "cuda" else _resident_peak(run)


def _cuda_peak(run: Callable[[], None]) -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _resident_peak(run: Callable[[], None]) -> float:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_mb("VmRSS")
    run()
    return _status_mb("VmHWM") - before


def _status_mb(key: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024 / 1e6
