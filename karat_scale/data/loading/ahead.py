"""A thread that makes a limited number of batches ahead of their reader."""

import queue
import threading
import weakref
from collections.abc import Callable, Generator, Iterator

from karat_scale.data.batch import Batch
from karat_scale.data.loading.digest import with_digest
from karat_scale.foundation.errors import DataError

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
