"""The memory that one call needs beyond what is there before it, measured in a process of its own."""

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_memory_of(make: Callable[..., Callable[[], None]], arguments: tuple[Any, ...], device: str) -> float:
    """Peak extra megabytes while `make(*arguments, False)()` runs, after `make(*arguments, True)()` warmed up.

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
