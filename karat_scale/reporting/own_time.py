"""The part of a step in which a rank waits for no other: for its data, and in its forward pass."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Forward passes on a GPU that may wait to be added up; those that are done are added before there are more.
MOST_WAITING = 64

_Pass = tuple[torch.cuda.Event, torch.cuda.Event]


class OwnTime:
    """Adds up this rank's own seconds. At ZeRO 3 the forward pass gathers weights, so there it is not all its own.

    A GPU's forward pass is timed by the device, whose clock is read when the sum is taken: nothing waits for it before.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._on_gpu = device.type == "cuda"
        self._clock = clock
        self._seconds = 0.0
        self._waiting: list[_Pass] = []

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
        self._waiting.append((begin, end))
        if len(self._waiting) > MOST_WAITING:
            self._add_up([one for one in self._waiting if one[1].query()])

    @contextmanager
    def _by_host_clock(self) -> Iterator[None]:
        begun = self._clock()
        yield
        self._seconds += self._clock() - begun

    def take(self) -> float:
        """The seconds since they were last taken."""
        for _, end in self._waiting:
            end.synchronize()
        self._add_up(self._waiting)
        taken, self._seconds = self._seconds, 0.0
        return taken

    def _add_up(self, done: list[_Pass]) -> None:
        self._seconds += sum(begin.elapsed_time(end) for begin, end in done) / 1e3
        self._waiting = self._waiting[len(done) :]  # the device does them in order
