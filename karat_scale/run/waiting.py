"""Waiting on all ranks for what rank 0 does with a store, which may be slow."""

from collections.abc import Callable
from typing import Protocol

from karat_scale.engine.distributed import World

_POLL_SECONDS = 1.0


class Work(Protocol):
    """What rank 0 does in a thread. `moved` grows while the store takes or gives something."""

    moved: int

    def wait(self, seconds: float) -> bool:
        """Wait for its end; whether it has come."""


def follow(
    world: World, work: Work | None, beat: Callable[[], object], is_late: Callable[[], bool] = lambda: False
) -> bool:
    """Wait until rank 0's work is done, or late; whether it is done. Collective.

    While it moves, each rank calls `beat`, so that nobody takes a slow store for a hang.
    """
    seen = -1
    while True:
        told = (work.wait(_POLL_SECONDS), work.moved, is_late()) if work is not None else (False, 0, False)
        is_done, moved, is_over = world.broadcast(told)
        if moved != seen:
            seen = moved
            beat()
        if is_done or is_over:
            return is_done
