"""What takes the bytes of a part of a file while they come."""

import threading
from typing import Protocol

from karat_scale.stores.failures import FinalError


class Sink(Protocol):
    """What takes the bytes of a part of a file, piece by piece. Its own errors are DataErrors."""

    def restart(self) -> None:
        """Forget what was written: the part comes from its start, for the first time or again."""

    def write(self, data: bytes) -> object:
        """Take the next piece."""


class InMemory:
    """See Sink."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def restart(self) -> None:
        """See Sink."""
        self.pieces.clear()

    def write(self, data: bytes) -> None:
        """See Sink."""
        self.pieces.append(data)


class OneTry:
    """Passes the pieces of one try on to a sink, until it is over: the library may go on with one that was given up."""

    def __init__(self, sink: Sink) -> None:
        self._sink, self._lock, self._is_over = sink, threading.Lock(), False
        self.size = 0
        sink.restart()

    def write(self, data: bytes) -> None:
        """Pass on a piece."""
        with self._lock:
            if self._is_over:
                raise FinalError("this try was given up")
            self._sink.write(data)
            self.size += len(data)

    def end(self) -> None:
        """Pass nothing on from here."""
        with self._lock:
            self._is_over = True
