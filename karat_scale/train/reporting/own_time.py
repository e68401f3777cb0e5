"""The part of a step in which a rank waits for no other: for its data, and in its forward pass."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OwnTime:
    """Adds up this rank's own seconds. At ZeRO 3 the forward pass gathers weights, so there it is not all its own.

    A GPU's forward pass is timed by the device, whose clock is read when the sum is taken: nothing waits for it before.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._forwards: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def data(self) -> Iterator[None]:
        """What is inside waits for data."""
        with self._by_host_clock():
            yield

    @contextmanager
    def forward(self) -> Iterator[None]:
        """What is inside is a forward pass."""
        if not self._on_gpu:
            with self._by_host_clock():
                yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._forwards.append((begin, end))

    @contextmanager
    def _by_host_clock(self) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self._seconds += time.monotonic() - begun

    def take(self) -> float:
        """The seconds since they were last taken."""
        for begin, end in self._forwards:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3
        taken = self._seconds
        self._seconds = 0.0
        self._forwards.clear()
        return taken
