"""Stand-ins for CUDA's streams and events, for a machine without a GPU: they note what they are told."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


class Streams:
    """The stand-ins. `notes` has what they were told, in order. `is_done` is what an event's `query` returns."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.notes: list[str] = []
        self.is_done = True
        self._current = "compute"
        streams = self

        class Event:
            def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
                self._where = ""
                self._time = 0.0

            def record(self, stream: Any = None) -> None:
                self._where = stream or streams._current
                self._time = float(len(streams.notes))
                streams.notes.append(f"event in {self._where}")

            def query(self) -> bool:
                return streams.is_done

            def synchronize(self) -> None:
                streams.notes.append(f"host waits for {self._where}")

            def elapsed_time(self, end: "Event") -> float:
                return end._time - self._time

        class Stream:
            def __init__(self, device: torch.device) -> None:
                self._device = device

            def __str__(self) -> str:
                return "copies"

        class Compute(Stream):
            def wait_event(self, event: Any) -> None:
                streams.notes.append(f"compute waits for {event._where}")

            def __str__(self) -> str:
                return "compute"

        def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
            streams.notes.append("pin")
            return tensor

        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "stream", self._within)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: Compute(device))
        patch.setattr(torch.Tensor, "pin_memory", pin_memory)
        patch.setattr(torch.Tensor, "record_stream", lambda _, stream: self.notes.append(f"kept for {stream}"))

    @contextmanager
    def _within(self, stream: Any) -> Iterator[None]:
        self._current = str(stream)
        self.notes.append(f"begin {stream}")
        yield
        self.notes.append(f"end {stream}")
        self._current = "compute"


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(monkeypatch)
