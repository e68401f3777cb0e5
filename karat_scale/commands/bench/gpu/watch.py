"""Whether a worker still moves. One that waits for ever must not look like one that is slow.

A worker moves while one of its threads is elsewhere in Python than before, tensors are allocated on the device, or a
processor works for it. A thread that waits for a device may keep its core busy, so on CUDA only the other processes of
its group count there. A worker that does not move has its stacks printed.
"""

import faulthandler
import os
import sys
import threading
import time
from contextlib import suppress
from types import FrameType

import psutil
import torch

from karat_scale.commands.bench.gpu.process import HUNG_SECONDS, Channel

_TICK = 1.0
# Of the seconds after which the command ends the process.
_SHOWN_AFTER = 0.8
# Of a core, more than this watch takes.
_BUSY = 0.05


def watch(channel: Channel, device: str, hung: float = HUNG_SECONDS) -> None:
    """Tell about once a second if this process moves, from a thread; print its stacks before it counts as hung."""
    threading.Thread(target=_watch, args=(channel, device, hung), daemon=True, name="karat-watch").start()


def _watch(channel: Channel, device: str, hung: float) -> None:
    places, has_moved = _places(), True
    used: tuple[float, float] | None = None
    while True:
        if has_moved:
            channel.moved()
            faulthandler.dump_traceback_later(_SHOWN_AFTER * hung)  # by a thread that needs no lock of Python's
        time.sleep(_TICK)
        before, places = places, _places()
        has_moved = places != before
        if has_moved:
            used = None
        else:  # only then, since it reads a file of each process of the machine
            used_before, used = used, (_seconds_of_group(device), time.monotonic())
            has_moved = used_before is not None and used[0] - used_before[0] > _BUSY * (used[1] - used_before[1])


def _places() -> tuple[object, ...]:
    """Return where all threads but this one are, and how many tensors the device has been asked for."""
    mine = threading.get_ident()
    frames = {thread: _lines(frame) for thread, frame in sys._current_frames().items() if thread != mine}
    allocated = torch.cuda.memory_stats().get("allocation.all.allocated") if torch.cuda.is_initialized() else 0
    return frames, allocated


def _lines(frame: FrameType | None) -> tuple[tuple[int, int], ...]:
    found = []
    while frame is not None:
        found.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return tuple(found)


def _seconds_of_group(device: str) -> float:
    """Return the processor time of this group of processes; on CUDA without this one's."""
    seconds, group = 0.0, os.getpgrp()
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):  # it has ended
            if os.getpgid(process.pid) == group and (device == "cpu" or process.pid != os.getpid()):
                times = process.cpu_times()
                seconds += times.user + times.system
    return seconds
