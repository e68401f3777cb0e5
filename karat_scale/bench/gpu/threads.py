"""Running in threads what compiles Triton's kernels: Triton compiles without Python's lock, so side by side.

Threads, not processes: in exclusive compute mode a second process cannot have the card.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from karat_scale.machine import usable_cores

T = TypeVar("T")
MOST_THREADS = 16


class CompilerThreads(ThreadPoolExecutor):
    """As many as there are cores, up to a limit."""

    def __init__(self) -> None:
        super().__init__(min(MOST_THREADS, max(2, usable_cores())))

    def begin(self, run: Callable[[], T]) -> "Future[T]":
        """Call `run` in a thread, backward passes within it included."""
        return self.submit(_with_own_backward, run)


def _with_own_backward(run: Callable[[], T]) -> T:
    # Else the backward passes of all threads share the device's one thread, and compile one after another.
    with torch.autograd.set_multithreading_enabled(False):
        return run()
