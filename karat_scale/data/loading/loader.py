"""Batches, or other results, in plan order from parallel worker processes, with digests of the data.

Forked workers leave the images of their batches in shared memory that is reused. torch would give each tensor a new
file in /dev/shm, whose pages must be mapped again in both processes. For an image of 224 px that costs 0.2 ms, up to a
fifth of its decoding, and containers often have a small /dev/shm.

One digest is of a data set's classes. The other is one number for the training samples and the augmentation of each. It
is a sum over samples, so it is the same for any world size, micro batch, number of workers and backend, and for a run
that was stopped and resumed. Two runs with the same digest trained on the same data.
"""

import errno
import faulthandler
import itertools
import json
import math
import mmap
import os
import signal
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from hashlib import blake2b, sha256
from typing import Any, Generic, Protocol, TypeVar

import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from karat_scale.data.batch import BadSample, Batch, Draw, Streamed
from karat_scale.data.loading.assemble import check_worker_count, prepare_worker
from karat_scale.data.plan import BatchSlice
from karat_scale.foundation.errors import DataError, UserError

Shape = tuple[int, ...]
Small = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]
Rest = tuple[tuple[BadSample, ...], tuple[Draw, ...], int, int, int | None, Streamed | None]


class ImageSlots:
    """Memory for `count` batches of images, uint8 of `shape`, for each worker. Create it before the workers are forked.

    A worker fills its slots in turn. The images are copied when a batch is received, so a worker may be up to
    `count` batches ahead. Raises DataError if there is not enough memory.
    """

    def __init__(self, workers: int, count: int, shape: Shape) -> None:
        self._count, self._room = count, math.prod(shape)
        size = workers * count * self._room
        try:
            memory = mmap.mmap(-1, max(1, size))
        except (OSError, OverflowError) as error:
            raise DataError(
                f"no {size / 2**30:.1f} GiB of memory for prefetched batches; lower data.prefetch or data.workers"
            ) from error
        self._slots = torch.frombuffer(memory, dtype=torch.uint8)
        self._filled = 0
        self._key = next(_KEYS)
        _IN_USE[self._key] = self

    def next(self, shape: Shape) -> torch.Tensor:
        """Return the calling worker's next slot. Raises ValueError for more images than fit."""
        worker = get_worker_info()
        assert worker is not None
        if math.prod(shape) > self._room:
            raise ValueError("a loader's first batch must be its largest")
        slot = worker.id * self._count + self._filled % self._count
        self._filled += 1
        return self._at(slot * self._room, shape)

    def send(self, batch: Batch) -> "Sent":
        """Return a batch with images in a slot, as an object that is small when pickled and becomes a Batch again."""
        return Sent(self._key, int(batch.images.storage_offset()), batch)

    def take(self, offset: int, shape: Shape) -> torch.Tensor:
        """Return a copy of a slot, page-locked if this process uses a GPU."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_initialized()).copy_(
            self._at(offset, shape)
        )

    def _at(self, offset: int, shape: Shape) -> torch.Tensor:
        return self._slots[offset : offset + math.prod(shape)].view(shape)


class Sent:
    """See ImageSlots.send."""

    def __init__(self, key: int, offset: int, batch: Batch) -> None:
        self._key, self._offset, self._batch = key, offset, batch

    def __reduce__(self) -> tuple[Any, ...]:
        batch = self._batch
        # As arrays, since torch would also pass each small tensor as a file.
        small = batch.labels.numpy(), batch.sample_ids.numpy(), batch.valid.numpy()
        rest = batch.bad, batch.draws, batch.epoch, batch.batch, batch.digest, batch.streamed
        return _received, (self._key, self._offset, tuple(batch.images.shape), small, rest)


def _received(key: int, offset: int, shape: Shape, small: Small, rest: Rest) -> Batch:
    labels, sample_ids, valid = (torch.from_numpy(column) for column in small)
    return Batch(_IN_USE[key].take(offset, shape), labels, sample_ids, valid, *rest)


_KEYS = itertools.count()
_IN_USE: "weakref.WeakValueDictionary[int, ImageSlots]" = weakref.WeakValueDictionary()


BITS = 40  # sums over thousands of ranks stay exact in float64


def batch_digest(batch: Batch) -> int:
    """Return the batch's part of the sum, below 2^40: global batch, id, label and draw of each sample."""
    if batch.digest is not None:
        return batch.digest
    total = 0
    draws = batch.draws or (None,) * len(batch.labels)
    for sample_id, label, draw in zip(batch.sample_ids.tolist(), batch.labels.tolist(), draws, strict=True):
        text = repr((batch.epoch, batch.batch, sample_id, label, draw))
        total += int.from_bytes(blake2b(text.encode(), digest_size=BITS // 8).digest(), "little")
    digest: int = total % 2**BITS
    return digest


def with_digest(batch: Batch) -> Batch:
    """Return the batch with its digest. It takes about 10 us a sample, so the maker of the batch should call this."""
    return batch if batch.digest is not None else replace(batch, digest=batch_digest(batch))


def class_order_digest(names: Sequence[str]) -> str:
    """Return the SHA-256, as hex, of the names of classes in the order of their labels."""
    return sha256(json.dumps(list(names)).encode()).hexdigest()


def classes_digest(names: Iterable[str]) -> str:
    """Return the SHA-256, as hex, of the names of classes, in any order."""
    return sha256(json.dumps(sorted(names)).encode()).hexdigest()


# How often a wait for a batch checks whether the workers are alive.
POLL_SECONDS = 2.0
_NO_SEMAPHORES = (errno.EROFS, errno.EACCES, errno.ENOENT, errno.ENOSPC, errno.ENOSYS)
# `check_worker_count` and `karat doctor` say it in a line.
warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
# DataLoader's message when that time is over.
TIMED_OUT = "DataLoader timed out"
# On this signal a worker prints its Python stack, wherever it hangs; and how long to wait for that.
_SHOW_STACK, _SHOW_SECONDS = signal.SIGRTMAX - 3, 0.5
_STANDARD_ERROR = 2
T = TypeVar("T")


class MakesBatches(Protocol):
    """An object that turns a slice into its batch."""

    def shape(self, part: BatchSlice) -> Shape:
        """Return the shape of the images, [b, 3, H, W]."""

    def fill(self, part: BatchSlice, images: torch.Tensor) -> Batch:
        """Return the batch; its pixels are written to `images`, uint8 of that shape."""

    def whereabouts(self, workers: int) -> str:
        """Return the last sample of each worker."""


class OrderedResults(Iterator[T], Generic[T]):
    """Iterates over `work(part)` of each of `slices`, in their order, whatever the number of workers.

    One slice is one work item. Each worker prepares at most `prefetch` of them ahead, so memory is bounded.
    Workers start at once and run until the slices end or `close`. With 0 workers everything happens in this
    process. A UserError in a worker is raised here unchanged. A worker that dies raises DataError, and so do
    workers that return nothing for `timeout` seconds; they print their stacks, and `whereabouts(workers)` gives the
    last sample of each. Far more workers than cores raise RecipeError.
    """

    def __init__(
        self,
        work: Callable[[BatchSlice], Any],
        slices: Iterable[BatchSlice],
        workers: int,
        prefetch: int,
        timeout: float,
        whereabouts: Callable[[int], str],
    ) -> None:
        check_worker_count(workers)
        if workers:  # which they inherit
            faulthandler.register(_SHOW_STACK, file=_STANDARD_ERROR)
        loader = DataLoader(
            _Guarded(work),
            batch_size=None,
            sampler=slices,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            timeout=min(POLL_SECONDS, timeout) if workers else 0,
            collate_fn=_unchanged,
            worker_init_fn=partial(prepare_worker, os.getpid(), threading.current_thread() is threading.main_thread()),
            pin_memory=torch.cuda.is_initialized(),  # not for a run on the CPU of a machine with GPUs
            # Without its own generator, the loader would draw from the global one.
            generator=torch.Generator(),
            multiprocessing_context="fork" if workers else None,
        )
        self._whereabouts, self._workers, self._timeout = whereabouts, workers, timeout
        self._kill: Callable[[], object] = tuple
        try:
            with _child_signal_kept():
                self._results: Iterator[T | UserError] | None = iter(loader)
            if isinstance(self._results, _MultiProcessingDataLoaderIter):
                self._kill = _without_shared_locks(self._results)
        except OSError as error:
            _leave_half_made(error)
            if error.errno not in _NO_SEMAPHORES:
                raise
            raise DataError(
                f"data.workers = {workers}: worker processes need semaphores in /dev/shm: {error.strerror}; make it "
                "writable and larger, or use data.workers=0"
            ) from error

    def __next__(self) -> T:
        if self._results is None:
            raise StopIteration
        try:
            result = self._wait(self._results)
        except StopIteration:
            self.close()
            raise
        except (RuntimeError, OSError, EOFError) as error:
            if self._workers and TIMED_OUT in str(error):
                _show_stacks(self._results)
            self.close()
            if self._workers and _tells_of_a_dead_worker(error):
                raise DataError(
                    f"a data worker died ({str(error) or type(error).__name__}); if memory is short, "
                    "lower data.workers or data.prefetch"
                ) from error
            if self._workers and TIMED_OUT in str(error):
                raise DataError(
                    f"no batch came for data.timeout = {self._timeout:g} s: {self._whereabouts(self._workers)}; "
                    "look there, and at the workers' stacks above, or raise data.timeout if it is only slow"
                ) from error
            raise
        if isinstance(result, UserError):
            self.close()
            raise result
        return result

    def _wait(self, results: "Iterator[T | UserError]") -> T | UserError:
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return next(results)
            except RuntimeError as error:
                if TIMED_OUT not in str(error) or time.monotonic() >= deadline:
                    raise

    def __del__(self) -> None:
        if getattr(self, "_results", None) is not None:
            self.close()

    def close(self) -> None:
        """Stop the workers."""
        results, self._results = self._results, None
        # The DataLoader's iterator stops its workers when it is freed, but an exception's traceback may keep it alive.
        if results is not None:
            self._kill()


class OrderedLoader(OrderedResults[Batch]):
    """Return the batches of `slices`, none of which is larger than the first. See OrderedResults."""

    def __init__(
        self, make: MakesBatches, slices: Iterable[BatchSlice], workers: int, prefetch: int, timeout: float
    ) -> None:
        self._slices = slices  # kept until the last batch: a process may fetch ahead for them
        parts = iter(slices)
        first = list(itertools.islice(parts, 1))
        slots = ImageSlots(workers, prefetch, make.shape(first[0])) if workers and first else None
        work = partial(_fill, make, slots)
        super().__init__(work, itertools.chain(first, parts), workers, prefetch, timeout, make.whereabouts)


def _fill(make: MakesBatches, slots: ImageSlots | None, part: BatchSlice) -> Batch | Sent:
    shape = make.shape(part)
    if slots is None:
        return with_digest(make.fill(part, torch.empty(shape, dtype=torch.uint8)))
    return slots.send(with_digest(make.fill(part, slots.next(shape))))


def _without_shared_locks(results: _MultiProcessingDataLoaderIter) -> Callable[[], None]:
    """Let an iterator end its workers by killing them; they have nothing to tidy up. Returns what does that.

    Its own way asks and sets an event that it shares with them, and would wait for ever for the lock of one that was
    killed while it held it.
    """
    iterator: Any = results
    iterator._workers_done_event = threading.Event()  # the workers keep the shared one, which is never set
    pinning = getattr(iterator, "_pin_memory_thread", None), getattr(iterator, "_pin_memory_thread_done_event", None)
    queues = iterator._worker_result_queue, *iterator._index_queues
    kill = partial(_kill_workers, id(iterator), list(iterator._workers), queues, *pinning)
    iterator._shutdown_workers = kill
    return kill


def _kill_workers(
    iterator: int,
    workers: list[Any],
    queues: Sequence[Any],
    pinning: threading.Thread | None,
    pinning_ends: threading.Event | None,
) -> None:
    if not workers:  # the iterator asks once more when it is freed
        return
    signal_handling._remove_worker_pids(iterator)  # or the next wait for a batch would be told of their deaths
    if pinning is not None and pinning_ends is not None and pinning.is_alive():
        pinning_ends.set()
        queues[0].put((None, None))  # which it may wait for
        pinning.join(POLL_SECONDS)
    for worker in workers:
        _kill_with_its_commands(worker)
    while workers:
        workers.pop().join(POLL_SECONDS)  # one in a system call that does not end stays
    for queue in queues:
        queue.cancel_join_thread()
        queue.close()


def _show_stacks(results: Any) -> None:
    for worker in results._workers:
        with suppress(ProcessLookupError):
            os.kill(worker.pid, _SHOW_STACK)
    time.sleep(_SHOW_SECONDS)


def _kill_with_its_commands(worker: Any) -> None:
    """Kill a worker; if it leads a group of processes, all of these."""
    try:
        if worker.is_alive() and os.getpgid(worker.pid) == worker.pid:
            os.killpg(worker.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended
        return
    worker.kill()


def _tells_of_a_dead_worker(error: Exception) -> bool:
    if "Caught" in str(error):  # raised by a worker that is alive
        return False
    # It may die while it sends.
    return isinstance(error, (OSError, EOFError)) or "exited unexpectedly" in str(error)


def _leave_half_made(error: OSError) -> None:
    """Keep an iterator whose making failed from printing a traceback when it is freed; its workers end with us."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        iterator = frame.f_locals.get("self")
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown = True


@contextmanager
def _child_signal_kept() -> Iterator[None]:
    """Undo DataLoader's handler of SIGCHLD, which raises anywhere in the program, even during a checkpoint.

    Without it, the next wait for a batch detects a worker's death.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)


class _Guarded(Dataset[Any]):
    """Passes a UserError as a value, since DataLoader would wrap a raised one in a traceback."""

    def __init__(self, work: Callable[[BatchSlice], Any]) -> None:
        self._work = work

    def __getitem__(self, part: BatchSlice) -> Any:
        try:
            return self._work(part)
        except UserError as error:
            return error.with_traceback(None)


def _unchanged(result: Any) -> Any:
    return result
