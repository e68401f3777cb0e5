"""Processes that work for the trainer: data workers, whose results come in order, and one that fetches samples ahead.

They ignore the signals that the trainer handles, and end when it ends. They share no lock, so killing one cannot leave
a lock that another waits for.
"""

import copyreg
import errno
import faulthandler
import gc
import io
import mmap
import multiprocessing.process
import os
import pickle
import queue
import signal
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.context import ForkProcess
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.data.plan import BatchSlice
from karat_scale.data.shards.shard_files import ImageSource
from karat_scale.foundation.errors import DataError, RecipeError
from karat_scale.foundation.machine import be_killed_with_parent, usable_cores

POLL_SECONDS = 1.0
MAX_WORKERS = 1024
# How long a worker may take to begin, at each try.
_PATIENCE = (2.0, 4.0, 8.0, 16.0, 32.0)
# More would wait for each other, and each takes memory. The extra ones are for slow file systems.
_WORKERS_PER_CORE, _MORE_WORKERS = 4, 32
# On this signal a worker prints its Python stack, wherever it hangs; and how long to wait for that.
_SHOW_STACK, _SHOW_SECONDS = signal.SIGRTMAX - 3, 0.2
_STANDARD_ERROR = 2
_FORK = get_context("fork")
_number: int | None = None
T = TypeVar("T")


def worker_number() -> int | None:
    """Return the number of the calling data worker; None in any other process."""
    return _number


def check_worker_count(workers: int) -> None:
    """Raise RecipeError for far more workers than the cores that this process may use."""
    cores = usable_cores()
    most = min(_WORKERS_PER_CORE * cores + _MORE_WORKERS, MAX_WORKERS)
    if workers > most:
        raise RecipeError(
            f"data.workers = {workers} processes for each rank, but the cores that it may use here are {cores}; use "
            f"about {cores}, at most {most}"
        )


def start_worker(number: int, run: Callable[..., None], *arguments: Any) -> ForkProcess:
    """Fork a process that calls `run`, and that ends when this one ends. Raises OSError.

    If another thread, such as one of gloo's, holds CPython's lock of its threads during the fork, that lock stays held
    in the child, which hangs before its first line. So a child that does not begin is killed, and the fork is tried
    again.
    """
    of_main_thread = threading.current_thread() is threading.main_thread()
    for patience in _PATIENCE:
        ours, theirs = _FORK.Pipe(duplex=False)
        with ours, theirs:
            told = os.getpid(), of_main_thread, number, theirs, run, *arguments
            process = _FORK.Process(target=_run, args=told, name=f"karat-worker-{number}", daemon=True)
            # Until the child ignores it. It shares the pipe into which Python writes the signals of the trainer.
            mask, begun = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}), False
            try:
                process.start()
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                begun = bool(connection.wait([ours, process.sentinel], patience))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                if process.pid is not None and not begun:  # also after Ctrl-C, when nobody else knows of it
                    process.kill()
                    process.join()
            if begun:
                return process
    raise TimeoutError(errno.ETIMEDOUT, f"each of {len(_PATIENCE)} hung before its first line")


def _run(
    parent: int,
    of_main_thread: bool,
    number: int,
    begun: connection.Connection,
    run: Callable[..., None],
    *arguments: Any,
) -> None:
    """Set up the calling process as a worker of process `parent`, whose main thread may have started it.

    A signal to the whole process group (Ctrl-C, SLURM) must not end the workers, since the trainer still
    needs its batches until it has written a checkpoint. So SIGTERM ends a worker only when the parent itself sends it:
    Python does so at its end, and then waits for the worker. Programs that a transform starts ignore the same signals,
    for a batch may need their output, and SIGTERM is blocked in them: only SIGKILL ends them. A handler in Python would
    write to the trainer's pipe, too.
    """
    global _number
    _number = number
    begun.send_bytes(b"")
    begun.close()
    gc.freeze()  # what a library's destructor does to an object of the trainer is not for this process
    torch.set_num_threads(1)
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    # Blocked here, so that only the watching thread receives it and can read its sender.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if of_main_thread:  # the kernel goes by the thread
        be_killed_with_parent()
    # The parent's id is an argument. If it were read here, a parent that was killed before this line would be mistaken
    # for the process that adopts orphans, and its connections would stay open in a worker that never ends.
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    run(*arguments)


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, POLL_SECONDS)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)


def kill_workers(processes: list[ForkProcess], parent: int) -> None:
    """Kill workers of process `parent`, and the whole group of one that leads a group. They tidy up nothing.

    In a worker, which has a copy of the list, do nothing.
    """
    if os.getpid() != parent:
        return
    for process in processes:
        with suppress(ProcessLookupError):  # it has ended
            if process.pid is not None and process.is_alive() and os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    while processes:
        process = processes.pop()
        process.join(POLL_SECONDS)
        if process.is_alive():  # it is in a system call that does not end, and Python would wait for it at its own end
            multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]


def lead_own_commands() -> None:
    """Let a worker that starts commands lead a group of processes, so that the loader can end them with the worker.

    Ctrl-C does not reach them then: the trainer needs their output until it has saved.
    """
    if worker_number() is not None and os.getpgrp() != os.getpid():
        os.setpgid(0, 0)


class Whereabouts:
    """The current sample of each worker, in memory that forked workers share with the trainer.

    A worker that hangs on a file system cannot be asked, but its last note can be read.
    """

    def __init__(self) -> None:
        self._samples = np.frombuffer(mmap.mmap(-1, 8 * MAX_WORKERS), dtype=np.int64)

    def tell(self, sample_id: int) -> None:
        """Note that the calling worker is at this sample now."""
        # Counted from one: the memory starts as zeros.
        self._samples[worker_number() or 0] = sample_id + 1

    def told(self, workers: int, describe: Callable[[int], str]) -> str:
        """Return where each worker was last, `describe(sample)`, for the message of a loader that gets no batch."""
        at = enumerate(self._samples[:workers].tolist())
        return ", ".join(f"worker {worker} {describe(i - 1)}" for worker, i in at if i) or "no worker had started"


@dataclass(frozen=True)
class _Failure:
    error: Exception
    stack: str


class OrderedResults(Iterator[T], Generic[T]):
    """Iterates over `work(part)` of each of `slices`, in their order, whatever the number of workers.

    One slice is one work item. The workers take them in turn, and each prepares at most `prefetch` of them ahead, so
    memory is bounded. Workers start at once and run until the slices end or `close`. With 0 workers everything happens
    in this process. An error in a worker is raised here unchanged. A worker that dies raises DataError, and so do
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
        self._work, self._slices, self._open = work, iter(slices), True
        self._timeout, self._whereabouts = timeout, whereabouts
        self._processes: list[ForkProcess] = []
        self._lines: list[connection.Connection] = []  # to each worker
        self._asked: deque[int] = deque()  # the workers that make the next results, in order
        self._kill = weakref.finalize(self, kill_workers, self._processes, os.getpid())
        if workers:  # which they inherit
            faulthandler.register(_SHOW_STACK, file=_STANDARD_ERROR)
        try:
            for number in range(workers):
                ours, theirs = _FORK.Pipe()
                self._lines.append(ours)
                with theirs:
                    self._processes.append(start_worker(number, _serve, work, theirs))
        except OSError as error:
            self.close()
            fix = "start again, or set it to 0" if isinstance(error, TimeoutError) else "lower it"
            raise DataError(
                f"data.workers = {workers}: no more processes can be started here ({error.strerror}); {fix}"
            ) from error
        for _ in range(prefetch):
            for number in range(workers):
                self._ask(number)

    def _ask(self, worker: int) -> None:
        for part in self._slices:
            with suppress(OSError):  # the wait for its result finds that it has died
                self._lines[worker].send(part)
            self._asked.append(worker)
            break

    def __next__(self) -> T:
        if not self._open:
            raise StopIteration
        try:
            return self._receive() if self._processes else self._work(next(self._slices))
        except BaseException:
            self.close()
            raise

    def _receive(self) -> T:
        if not self._asked:
            raise StopIteration
        worker = self._asked.popleft()
        line, process = self._lines[worker], self._processes[worker]
        if not connection.wait([line, process.sentinel], self._timeout):
            for one in self._processes:
                if one.pid is not None and one.is_alive():
                    os.kill(one.pid, _SHOW_STACK)
                    time.sleep(_SHOW_SECONDS)  # or their stacks mix
            raise DataError(
                f"no batch came for data.timeout = {self._timeout:g} s: {self._whereabouts(len(self._processes))}; "
                "look there, and at the workers' stacks above, or raise data.timeout if it is only slow"
            )
        try:
            if not line.poll():
                raise EOFError
            answer = pickle.loads(line.recv_bytes())
        except (OSError, EOFError) as error:  # it may die while it sends
            process.join(POLL_SECONDS)
            raise DataError(
                f"a data worker died (exit code {process.exitcode}); if memory is short, lower data.workers or "
                "data.prefetch"
            ) from error
        if isinstance(answer, _Failure):
            raise answer.error from RuntimeError(f"in data worker {worker}:\n{answer.stack}")
        result = self._received(answer)
        self._ask(worker)
        return result

    def _received(self, answer: Any) -> T:
        """Return the result from a worker's answer; the worker is asked for more after this."""
        result: T = answer
        return result

    def close(self) -> None:
        """Stop the workers."""
        self._open, self._slices = False, iter(())
        self._kill()
        while self._lines:
            self._lines.pop().close()


def _serve(work: Callable[[BatchSlice], Any], line: connection.Connection) -> None:
    # Other threads read and write, so that neither process waits for the other to read, and the work goes on.
    asked: queue.SimpleQueue[BatchSlice] = queue.SimpleQueue()
    threading.Thread(target=_hear, args=(line, asked), daemon=True).start()
    telling = ThreadPoolExecutor(1)
    while True:
        telling.submit(line.send_bytes, _answer(work, asked.get()))


def _hear(line: connection.Connection, asked: "queue.SimpleQueue[BatchSlice]") -> None:
    with suppress(OSError, EOFError):
        while True:
            asked.put(line.recv())
    os._exit(0)  # the trainer has ended


def _answer(work: Callable[[BatchSlice], Any], part: BatchSlice) -> bytes:
    try:
        answer = io.BytesIO()
        pickler = pickle.Pickler(answer)
        pickler.dispatch_table = {**copyreg.dispatch_table, torch.Tensor: _without_the_rest}
        pickler.dump(work(part))
        return answer.getvalue()
    except Exception as error:
        failure = _Failure(error, traceback.format_exc())
    try:
        sent = pickle.dumps(failure)
        pickle.loads(sent)
    except Exception:  # not every error can be sent
        sent = pickle.dumps(_Failure(RuntimeError(f"{type(failure.error).__name__}: {failure.error}"), failure.stack))
    return sent


def _without_the_rest(tensor: torch.Tensor) -> Any:
    """Reduce a tensor for pickle, which would write all of a storage for a tensor that is a small part of it."""
    is_part = tensor.layout == torch.strided and tensor.untyped_storage().nbytes() > tensor.nbytes
    return (tensor.clone() if is_part else tensor).__reduce_ex__(pickle.DEFAULT_PROTOCOL)


# The process that fetches ahead: how often it looks how far the workers are, and how long it waits after an error.
_LOOK_SECONDS, _PAUSE_AFTER_ERROR = 0.05, 1.0


class FetchedAhead(Iterator[BatchSlice]):
    """Yields `slices` unchanged, while a process fetches the samples of the next ones into the node's cache.

    The process is at most `ahead` samples ahead of what was yielded. It ends with the slices, with `close`, or with the
    calling process, however that ends. It is only a hint: training does not wait for it or notice its errors, since a
    worker fetches what is not there.
    """

    def __init__(self, source: ImageSource, slices: Iterable[BatchSlice], ahead: int) -> None:
        self._slices = iter(slices)
        self._taken = np.frombuffer(mmap.mmap(-1, 8), dtype=np.int64)
        processes: list[ForkProcess] = []
        self.close = weakref.finalize(self, kill_workers, processes, os.getpid())
        with suppress(OSError):  # no more processes: training goes on without it
            # Its copy of the slices' iterator goes on by itself after the fork.
            processes.append(start_worker(0, _fetch, source, self._slices, self._taken, ahead))

    def __next__(self) -> BatchSlice:
        part = next(self._slices)  # after the last, the process still fetches for the workers, and then ends
        self._taken[0] += len(part.sample_ids)
        return part


def _fetch(source: ImageSource, slices: Iterator[BatchSlice], taken: npt.NDArray[np.int64], ahead: int) -> None:
    fetched = 0
    for part in slices:
        while fetched >= int(taken[0]) + ahead:
            time.sleep(_LOOK_SECONDS)
        fetched += len(part.sample_ids)
        if fetched <= int(taken[0]):  # the workers have it already
            continue
        try:
            source.hint(part.ids)
        except DataError:  # the worker that needs it says so
            time.sleep(_PAUSE_AFTER_ERROR)
