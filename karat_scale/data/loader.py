"""Batches in plan order from parallel worker processes."""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from karat_scale.data.batch import Batch
from karat_scale.data.plan import BatchSlice
from karat_scale.data.workers import prepare_worker
from karat_scale.errors import DataError, UserError


class MakesBatches(Protocol):
    """Something that turns a slice into its batch."""

    def __getitem__(self, part: BatchSlice) -> Batch: ...

    def whereabouts(self, workers: int) -> str:
        """What each worker was last at."""


class OrderedLoader(Iterator[Batch]):
    """Iterates over the batches of `slices`, in their order, whatever the number of workers.

    One slice is one work item; each worker has at most `prefetch` of them under way, so memory is bounded.
    Workers start at once and serve until the slices end or `close`. With 0 workers everything happens in this
    process. A UserError raised in a worker is raised here as it is; a worker that dies is a DataError, and so are
    workers that bring no batch for `timeout` seconds.
    """

    def __init__(
        self, make: MakesBatches, slices: Iterable[BatchSlice], workers: int, prefetch: int, timeout: float
    ) -> None:
        loader = DataLoader(
            _Guarded(make),
            batch_size=None,
            sampler=slices,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            timeout=timeout if workers else 0,
            collate_fn=_unchanged,
            worker_init_fn=prepare_worker,
            pin_memory=torch.cuda.is_available(),
            # Without a generator of its own the loader draws from the global one.
            generator=torch.Generator(),
            multiprocessing_context="fork" if workers else None,
        )
        self._make, self._workers, self._timeout = make, workers, timeout
        with _child_signal_kept():
            self._results: Iterator[Batch | UserError] | None = iter(loader)

    def __next__(self) -> Batch:
        if self._results is None:
            raise StopIteration
        try:
            result = next(self._results)
        except StopIteration:
            self.close()
            raise
        except (RuntimeError, OSError, EOFError) as error:
            self.close()
            if self._workers and _tells_of_a_dead_worker(error):
                raise DataError(
                    f"a data worker died ({str(error) or type(error).__name__}); if memory or /dev/shm is short, "
                    "lower data.workers or data.prefetch"
                ) from error
            if self._workers and "timed out" in str(error):
                raise DataError(
                    f"no batch came for data.timeout = {self._timeout:g} s: {self._make.whereabouts(self._workers)}; "
                    "does that file system still answer? Raise data.timeout if it is only slow"
                ) from error
            raise
        if isinstance(result, UserError):
            self.close()
            raise result
        return result

    def close(self) -> None:
        """Stop the workers."""
        results, self._results = self._results, None
        # The DataLoader's iterator ends its workers when it is collected, but an exception's traceback may hold it.
        if results is not None and hasattr(results, "_shutdown_workers"):
            results._shutdown_workers()


def _tells_of_a_dead_worker(error: Exception) -> bool:
    if "Caught" in str(error):  # raised by a worker that lives
        return False
    # A batch's memory is fetched from its worker, so a dead one may first show as a broken connection.
    return isinstance(error, (OSError, EOFError)) or "exited unexpectedly" in str(error)


@contextmanager
def _child_signal_kept() -> Iterator[None]:
    """Undo DataLoader's handler of SIGCHLD, which raises wherever the program is, even amid a checkpoint.

    Without it a worker's death is noticed by the next wait for a batch.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)


class _Guarded(Dataset["Batch | UserError"]):
    """Hands a UserError over as a value: DataLoader would wrap a raised one in a traceback."""

    def __init__(self, make: MakesBatches) -> None:
        self._make = make

    def __getitem__(self, part: BatchSlice) -> Batch | UserError:
        try:
            return self._make[part]
        except UserError as error:
            return error.with_traceback(None)


def _unchanged(result: Any) -> Any:
    return result
