"""The process of a section, single or a rank of torchrun's, and the objects that a section works with.

    python -m karat_scale.commands.bench.gpu.worker SECTION SETTINGS

A section has the device, its time, the channel to the command, and threads that compile.

A worker that hangs must not look like a slow one. So about once a second it reports whether it makes progress: one of
its threads is elsewhere in Python than before, tensors were allocated on the device, or a processor works for it. A
thread that waits for a device may keep its core busy, so on CUDA only the processor time of the group's other processes
counts. If a worker makes no progress, its stacks are printed.
"""

import faulthandler
import gc
import json
import math
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from karat_scale.commands.bench.gpu.report import SECTIONS
from karat_scale.commands.doctor.machine import OLDEST_CAPABILITY, driver_version, installed_version
from karat_scale.foundation.errors import is_out_of_memory
from karat_scale.foundation.machine import be_killed_with_parent, usable_cores
from karat_scale.foundation.tables import load

if TYPE_CHECKING:
    from karat_scale.engine.distributed import World

# A section that is not hung makes progress more often than this, even if it overruns for longer.
HUNG_SECONDS = 45.0
_TICK = 1.0
# Stacks are printed after this share of the seconds after which the command kills the process.
_SHOWN_AFTER = 0.8
# The share of a core that counts as progress: more than the watch takes.
_BUSY = 0.05
T = TypeVar("T")
MOST_THREADS = 16
PACKAGES = ("torch", "triton", "deepspeed", "timm", "torchvision", "nvidia-dali-cuda130", "torchcodec")


class Channel:
    """Reports events to the command, one JSON object a line, through a file descriptor.

    "machine" is about card and software. "begin" names the part that runs now: it is left out if the time ends, and has
    failed if the process ends. "notice" is about the figures. "again" asks to run the section again with at most this
    batch. "moved" reports progress: a process whose last one is long ago counts as hung. "ended" has the reason why the
    process ends before its section does.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, kind: str, content: Any = None) -> None:
        """Send one event. Figures that are not finite become None, which JSON can hold."""
        os.write(self._descriptor, (json.dumps({kind: _finite(content)}) + "\n").encode())

    def row(self, **figures: Any) -> None:
        """Send a row of the section's table."""
        self.send("row", figures)

    def left_out(self, what: str, why: str) -> None:
        """Report a part that was not measured although nothing is wrong."""
        self.send("left_out", {"what": what, "why": why})

    def late(self, what: str) -> None:
        """Report a part that was left out for lack of time."""
        self.send("left_out", late(what, "there was no time for it"))

    def failed(self, what: str, why: str) -> None:
        """Report a part that should have run and did not."""
        self.send("failed", {"what": what, "why": why})

    def raised(self, what: str, error: Exception) -> None:
        """Report a check that raised: it failed, or if memory ran out, its result is unknown."""
        if is_out_of_memory(error):
            self.send("left_out", {"what": what, "why": "memory ran out", "late": True})
        else:
            self.failed(what, one_line(error))


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return None if isinstance(content, float) and not math.isfinite(content) else content


def late(what: str, why: str) -> dict[str, Any]:
    """Return the content of an event on a part that was left out for lack of time."""
    return {"what": what, "why": f"{why}; give more by --minutes", "late": True}


def one_line(error: BaseException) -> str:
    """Return an exception's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class CompilerThreads(ThreadPoolExecutor):
    """As many threads as cores, up to a limit, if no number is given."""

    def __init__(self, threads: int | None = None) -> None:
        super().__init__(threads or min(MOST_THREADS, max(2, usable_cores())))

    def begin(self, run: Callable[[], T]) -> "Future[T]":
        """Call `run` in a thread, backward passes within it included."""

        def with_own_backward() -> T:
            # Else the backward passes of all threads share the device's one thread, and compile one after another.
            with torch.autograd.set_multithreading_enabled(False):
                return run()

        return self.submit(with_own_backward)


def is_fatal(error: BaseException) -> bool:
    """True if a kernel has crashed: nothing runs on the device any more in this process."""
    return "CUDA error" in str(error) and not is_out_of_memory(error)


class Budget:
    """The seconds left, and how long work of each kind took, so that no work starts that would not end in time."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds
        self._took: dict[str, float] = {}

    @property
    def left(self) -> float:
        """The seconds left, never below 0."""
        return max(0.0, self._ends - time.monotonic())

    def allows(self, kind: str, guess: float, count: int = 1) -> bool:
        """True if there is time for work of a kind; each of `count` takes as long as the last, or `guess` seconds."""
        return self.left >= count * self._took.get(kind, guess)

    def note(self, kind: str, begun: float, count: int = 1) -> None:
        """Remember the time of `count` of a kind, which began at `begun` (`time.monotonic`) and end now."""
        self._took[kind] = (time.monotonic() - begun) / count


@dataclass(frozen=True)
class Task:
    """A section's device, time, channel and a directory of its own.

    On a CPU, sizes are toys and another implementation replaces the GPU's.
    """

    device: str
    budget: Budget
    channel: Channel
    scratch: Path
    largest_batch: int | None = None

    @property
    def toy(self) -> bool:
        """True if this only tries the command and measures nothing."""
        return self.device == "cpu"

    @property
    def implementation(self) -> str:
        """The operator's implementation: on a card that is too old for the kernels, the one that a run takes."""
        if self.toy:
            return "streaming"
        return "triton" if torch.cuda.get_device_capability() >= OLDEST_CAPABILITY else "auto"

    def part(
        self, what: str, kind: str, guess: float, run: Callable[[], None], count: int = 1, world: "World | None" = None
    ) -> None:
        """Run a part of the section if there is time for `count` of its kind. The ranks of a world decide together."""
        too_late = not self.budget.allows(kind, guess, count)
        if world.any(too_late) if world else too_late:
            if world is None or world.is_main:
                self.channel.late(what)
            return
        if world is None or world.is_main:
            self.channel.send("begin", what)
        begun = time.monotonic()
        run()
        self.free()
        self.budget.note(kind, begun, count)

    def halving(self, what: str, batch: int, attempt: Callable[[int], None], least: int = 1) -> None:
        """Call `attempt(batch)`, with half of it when memory runs out. Report a failure and let the section continue.

        Raises:
            Exception: one that `is_fatal`.
        """
        while True:
            try:
                attempt(batch)
                return
            except Exception as error:
                if is_fatal(error):
                    raise
                if not is_out_of_memory(error) or batch // 2 < least:
                    traceback.print_exc()
                    self.channel.failed(what, one_line(error))
                    return
            self.free()  # after the exception is gone, which held what it had built
            batch //= 2
            self.channel.send("notice", f"{what}: out of memory with a batch of {2 * batch}, so it is {batch}")

    def free(self) -> None:
        """Free unused memory."""
        gc.collect()
        if not self.toy:
            torch.cuda.empty_cache()


def machine_facts(device: str) -> dict[str, Any]:
    """Return card, driver, CUDA and versions. On CUDA, this process then holds the card."""
    versions = {name: installed for name in PACKAGES if (installed := installed_version(name))}
    versions["torch"] = torch.__version__  # a build's own version says more, such as 2.13.0+cu130
    facts = {"cores": usable_cores(), "python": platform.python_version(), "versions": versions}
    if device == "cpu":
        return {"card": f"CPU with {torch.backends.cpu.get_cpu_capability()}", **facts}
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "cards": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_mb": round(properties.total_memory / 1e6),
        "processors": properties.multi_processor_count,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **facts,
    }


def watch(channel: Channel, device: str, hung: float = HUNG_SECONDS) -> None:
    """Report progress about once a second, from a thread; print this process's stacks before it counts as hung."""

    def run() -> None:
        places, has_moved = _places(), True
        used: tuple[float, float] | None = None
        while True:
            if has_moved:
                channel.send("moved")
                faulthandler.dump_traceback_later(_SHOWN_AFTER * hung)  # by a thread that needs no lock of Python's
            time.sleep(_TICK)
            before, places = places, _places()
            has_moved = places != before
            if has_moved:
                used = None
            else:  # only then, since it reads a file of each process of the machine
                used_before, used = used, (_seconds_of_group(device), time.monotonic())
                has_moved = used_before is not None and used[0] - used_before[0] > _BUSY * (used[1] - used_before[1])

    threading.Thread(target=run, daemon=True, name="karat-watch").start()


def _places() -> tuple[object, ...]:
    """Return where all threads but this one are, and how many tensors were allocated on the device."""
    frames: dict[int, list[tuple[int, int]]] = {}
    for thread, innermost in sys._current_frames().items():
        frame = None if thread == threading.get_ident() else innermost
        while frame is not None:
            frames.setdefault(thread, []).append((id(frame.f_code), frame.f_lasti))
            frame = frame.f_back
    return frames, torch.cuda.memory_stats().get("allocation.all.allocated") if torch.cuda.is_initialized() else 0


def _seconds_of_group(device: str) -> float:
    """Return the processor time of this group of processes; on CUDA without this one's."""
    ticks, group = 0, os.getpgrp()
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            # After the name, which may hold spaces: state, parent, group, ...; user and system time are the 12th, 13th.
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and (device == "cpu" or int(directory.name) != os.getpid()):
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main(section: str, settings: str) -> None:
    """Measure; on a failure, report it and exit with code 1."""
    be_killed_with_parent()
    channel = Channel(os.dup(1))
    os.dup2(2, 1)  # libraries print to standard output
    given = json.loads(settings)
    task = Task(given["device"], Budget(given["seconds"]), channel, Path(given["scratch"]), given["batch"])
    watch(channel, task.device)
    code = 0
    try:
        if os.environ.get("RANK", "0") == "0":
            channel.send("machine", machine_facts(task.device))
        load(f"karat_scale.commands.bench.gpu.{SECTIONS[section].place}")(task)
    except Exception as error:
        traceback.print_exc()
        channel.send("ended", one_line(error))
        code = 1
    sys.stderr.flush()
    os._exit(code)  # the shutdown of CUDA and NCCL may hang


if __name__ == "__main__":
    main(*sys.argv[1:])
