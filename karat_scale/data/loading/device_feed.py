"""Make batches ahead of their reader, and copy them to the device before they are needed.

A thread makes a limited number of batches ahead. The copy overlaps with the device's computation: it runs on a separate
stream, from page-locked memory. Events order the two streams; the host waits for neither.
"""

import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar, cast

import torch

from karat_scale.data.batch import Batch, with_digest
from karat_scale.foundation.errors import DataError

# The host launches at most this many batches before the device has done the oldest of them. More would fill the
# device's memory with batches that wait, and delay whoever reads a result.
LAUNCHED_AHEAD = 2


B = TypeVar("B")


class DeviceFeed(Iterator[B], Generic[B]):
    """Yields `batches`, in their order, on `device`.

    On a CPU it passes on each batch as it comes, of any type. On a GPU the batches are `Batch`es; call
    `fetch_ahead` when the work on a batch is launched: it fetches the next one and begins to copy it. An error of
    `batches` is raised by the `next` that would have met it without fetching ahead. `waiting()` is a context in which
    this process waits for the next of `batches`.
    """

    def __init__(
        self,
        batches: Iterable[B],
        device: torch.device,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._batches, self._waiting, self._device = iter(batches), waiting, device
        self._copies = None if device.type == "cpu" else torch.cuda.Stream(device)
        self._launched: deque[torch.cuda.Event] = deque()
        self._ahead: Any = None  # a batch on the device with the event after which it is there, or an error

    def __next__(self) -> B:
        if self._copies is None:
            return self._fetch()
        self.fetch_ahead()
        ahead, self._ahead = self._ahead, None
        if isinstance(ahead, Exception):
            raise ahead
        copy, copied = ahead
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for tensor in copy.tensors:
            tensor.record_stream(current)  # its memory is the other stream's until this one is done with it, too
        return cast(B, copy)

    def fetch_ahead(self) -> None:
        """Begin to copy the next batch, if there is one and its copy has not begun.

        First it waits until the device has done all launched batches except the last LAUNCHED_AHEAD.
        """
        if self._copies is None or self._ahead is not None:
            return
        self._launched.append(torch.cuda.Event(blocking=True))
        self._launched[-1].record(torch.cuda.current_stream(self._device))
        if len(self._launched) > LAUNCHED_AHEAD and not (oldest := self._launched.popleft()).query():
            oldest.synchronize()
        try:
            batch: Any = self._fetch()
            pinned, copied = batch.pin_memory(), torch.cuda.Event()
            with torch.cuda.stream(self._copies):
                copy = pinned.to(self._device)
            copied.record(self._copies)
            self._ahead = copy, copied
        except Exception as error:
            self._ahead = error

    def _fetch(self) -> B:
        with self._waiting():
            return next(self._batches)


# How long `close` waits for the batch in progress.
CLOSE_SECONDS = 10.0

Made = Batch | BaseException | None


class RunAhead(Iterator[Batch]):
    """Yields the items of `batches`, and makes at most `ahead` of them before they are needed.

    The thread starts at once and ends with the batches, with `close`, or when this iterator is no longer referenced.
    An exception of `batches` is raised here, at its place in the order. Raises DataError when no batch comes for
    `timeout` seconds; `whereabouts()` says what it waits for.
    """

    def __init__(
        self, batches: Generator[Batch, None, None], ahead: int, timeout: float, whereabouts: Callable[[], str]
    ) -> None:
        self._timeout, self._whereabouts = timeout, whereabouts
        self._made: queue.SimpleQueue[Made] = queue.SimpleQueue()
        self._room, self._stopping = threading.Semaphore(ahead), threading.Event()
        arguments = (batches, self._made, self._room, self._stopping)
        # A daemon, since a thread that waits for a dead file system cannot be stopped.
        thread = threading.Thread(target=_make, args=arguments, name="karat-ahead", daemon=True)
        self._end = weakref.finalize(self, _stop, self._stopping, self._room, thread)
        thread.start()

    def __next__(self) -> Batch:
        if not self._end.alive:
            raise StopIteration
        try:
            made = self._made.get(timeout=self._timeout)
        except queue.Empty:
            self._stopping.set()
            self._room.release()
            self._end.detach()
            raise DataError(
                f"no batch came for data.timeout = {self._timeout:g} s: {self._whereabouts()} "
                "(raise data.timeout if it is only slow)"
            ) from None
        if isinstance(made, Batch):
            self._room.release()
            return made
        self.close()
        raise StopIteration if made is None else made

    def close(self) -> None:
        """Stop the thread; there are no more batches."""
        self._end()


def _make(
    batches: Generator[Batch, None, None],
    made: "queue.SimpleQueue[Made]",
    room: threading.Semaphore,
    stopping: threading.Event,
) -> None:
    last: BaseException | None = None
    try:
        while room.acquire() and not stopping.is_set():
            batch = next(batches, None)
            if batch is None:
                break
            made.put(with_digest(batch))
            del batch  # or it would stay alive longer than its reader
    except BaseException as error:
        last = error
    finally:
        batches.close()
        made.put(last)


def _stop(stopping: threading.Event, room: threading.Semaphore, thread: threading.Thread) -> None:
    stopping.set()
    room.release()
    # The garbage collector may run this in any thread.
    if thread is not threading.current_thread():
        thread.join(CLOSE_SECONDS)
