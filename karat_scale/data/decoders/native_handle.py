"""One object of a compiled library per thread that uses it, freed with the thread or with its user."""

import threading
import weakref
from collections.abc import Callable

New = Callable[[], int | None]
Free = Callable[[int], None]


class PerThread:
    """`handle()` is the calling thread's own object, which `new` makes at its first call and `free` frees."""

    def __init__(self, new: New, free: Free) -> None:
        self._new, self._free = new, free
        self._own = threading.local()

    def handle(self) -> int:
        """Return the object's address. Raises MemoryError."""
        if not hasattr(self._own, "held"):
            self._own.held = _Held(self._new, self._free)
        pointer: int = self._own.held.pointer
        return pointer


class _Held:
    def __init__(self, new: New, free: Free) -> None:
        pointer = new()
        if not pointer:
            raise MemoryError
        self.pointer = pointer
        weakref.finalize(self, free, pointer)
