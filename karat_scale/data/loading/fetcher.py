"""A process that fetches samples into the node's cache before the data workers need them.

It is only a hint: training does not wait for it or notice its errors, since a worker fetches what is not there.
"""

import contextlib
import mmap
import multiprocessing
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.context import ForkProcess
from typing import Protocol

import numpy as np

from karat_scale.data.loading.assemble import prepare_worker
from karat_scale.data.plan import PADDING, BatchSlice
from karat_scale.foundation.errors import DataError

_POLL_SECONDS = 0.05
_PAUSE_AFTER_ERROR = 1.0
_CLOSE_SECONDS = 2.0


class Fetches(Protocol):
    """A source whose samples can be fetched."""

    def hint(self, sample_ids: Iterable[int]) -> None:
        """Fetch samples into the cache, except those that another process fetches. Raises DataError."""


class FetchedAhead(Iterator[BatchSlice]):
    """Yields `slices` unchanged, while a process fetches the samples of the next ones.

    It stays at most `ahead` samples before what was yielded, and ends with the slices, with `close`, or with this
    process, however that ends.
    """

    def __init__(self, source: Fetches, slices: Iterable[BatchSlice], ahead: int) -> None:
        self._slices = iter(slices)
        self._end: Callable[[], object] | None = None
        self._taken = np.frombuffer(mmap.mmap(-1, 8), dtype=np.int64)
        # Its copy of the slices' iterator goes on by itself after the fork.
        arguments = source, self._slices, self._taken, ahead, os.getpid(), _is_main_thread()
        process = multiprocessing.get_context("fork").Process(
            target=_fetch, args=arguments, name="karat-fetch", daemon=True
        )
        with contextlib.suppress(OSError):  # no more processes: training goes on without it
            process.start()
            self._end = weakref.finalize(self, _stop, process, os.getpid())

    def __next__(self) -> BatchSlice:
        part = next(self._slices)  # after the last, the process still fetches for the workers, and then ends
        self._taken[0] += len(part.sample_ids)
        return part

    def close(self) -> None:
        """End the process."""
        if self._end is not None:
            self._end()


def _stop(process: ForkProcess, parent: int) -> None:
    if os.getpid() != parent:  # a worker has a copy of the object
        return
    process.terminate()
    process.join(_CLOSE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    process.close()


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _fetch(
    source: Fetches,
    slices: Iterator[BatchSlice],
    taken: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    ahead: int,
    parent: int,
    is_of_main_thread: bool,
) -> None:
    prepare_worker(parent, is_of_main_thread, 0)
    fetched = 0
    for part in slices:
        while fetched >= int(taken[0]) + ahead:
            time.sleep(_POLL_SECONDS)
        fetched += len(part.sample_ids)
        if fetched <= int(taken[0]):  # the workers have it already
            continue
        try:
            source.hint(part.sample_ids[part.sample_ids != PADDING].tolist())
        except DataError:  # the worker that needs it says so
            time.sleep(_PAUSE_AFTER_ERROR)
