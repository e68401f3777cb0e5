"""A section's own process, alone or a rank of torchrun's, and what the section works with.

    python -m karat_scale.commands.bench.gpu.worker SECTION SETTINGS

A section has the device, its time, the channel to the command, and threads that compile.
"""

import gc
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch

from karat_scale.commands.bench.gpu.process import Channel, one_line
from karat_scale.commands.bench.gpu.report import SECTIONS
from karat_scale.commands.bench.gpu.watch import watch
from karat_scale.commands.doctor.machine import driver_version, installed_version
from karat_scale.foundation.errors import is_out_of_memory
from karat_scale.foundation.machine import be_killed_with_parent, usable_cores


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
        """True if there is time for work of a kind; each of `count` takes as the last did, or `guess` seconds."""
        return self.left >= count * self._took.get(kind, guess)

    def note(self, kind: str, begun: float, count: int = 1) -> None:
        """Remember work on `count` of a kind that began at `begun` of `time.monotonic` and ends now."""
        self._took[kind] = (time.monotonic() - begun) / count


T = TypeVar("T")
MOST_THREADS = 16


class CompilerThreads(ThreadPoolExecutor):
    """As many threads as cores, up to a limit, if no number is given."""

    def __init__(self, threads: int | None = None) -> None:
        super().__init__(threads or min(MOST_THREADS, max(2, usable_cores())))

    def begin(self, run: Callable[[], T]) -> "Future[T]":
        """Call `run` in a thread, backward passes within it included."""
        return self.submit(_with_own_backward, run)


def _with_own_backward(run: Callable[[], T]) -> T:
    # Else the backward passes of all threads share the device's one thread, and compile one after another.
    with torch.autograd.set_multithreading_enabled(False):
        return run()


def is_fatal(error: BaseException) -> bool:
    """True if a kernel has crashed: nothing runs on the device any more in this process."""
    return "CUDA error" in str(error) and not is_out_of_memory(error)


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
        """The operator's implementation."""
        return "streaming" if self.toy else "triton"

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
            self.channel.notice(f"{what}: out of memory with a batch of {2 * batch}, so it is {batch}")

    def free(self) -> None:
        """Free unused memory."""
        gc.collect()
        if not self.toy:
            torch.cuda.empty_cache()


PACKAGES = ("torch", "triton", "deepspeed", "timm", "torchvision", "nvidia-dali-cuda130", "torchcodec")


def machine_facts(device: str) -> dict[str, Any]:
    """Card, driver, CUDA and versions. On CUDA this process takes the card up."""
    found = {name: installed for name in PACKAGES if (installed := installed_version(name))}
    # A build's own version says more, such as 2.13.0+cu130.
    facts = {"cores": usable_cores(), "python": platform.python_version()}
    versions = {**found, "torch": torch.__version__}
    if device == "cpu":
        return {"card": f"CPU with {torch.backends.cpu.get_cpu_capability()}", **facts, "versions": versions}
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
        "versions": versions,
    }


def main(section: str, settings: str) -> None:
    """Measure; on a failure, report it and exit with code 1."""
    be_killed_with_parent()
    channel = Channel(os.dup(1))
    os.dup2(2, 1)  # libraries talk on standard output
    given = json.loads(settings)
    task = Task(given["device"], Budget(given["seconds"]), channel, Path(given["scratch"]), given["batch"])
    watch(channel, task.device)
    try:
        if os.environ.get("RANK", "0") == "0":
            channel.machine(machine_facts(task.device))
        import_module(f"karat_scale.commands.bench.gpu.{SECTIONS[section].module}").measure(task)
    except Exception as error:
        traceback.print_exc()
        channel.ended(one_line(error))
        sys.stderr.flush()
        os._exit(1)  # what CUDA and NCCL do on the way out may wait for ever


if __name__ == "__main__":
    main(*sys.argv[1:])
