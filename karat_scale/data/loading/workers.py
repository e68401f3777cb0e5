"""Set-up of a data worker process: it ignores the signals that the trainer handles, and ends when the trainer ends."""

import contextlib
import ctypes
import mmap
import os
import signal
import threading

import numpy as np
import torch
from torch.utils.data import get_worker_info

from karat_scale.foundation.errors import RecipeError
from karat_scale.foundation.machine import usable_cores

POLL_SECONDS = 1.0
MAX_WORKERS = 1024
_PR_SET_PDEATHSIG = 1
# More would wait for each other, and each takes memory. The extra ones are for slow file systems.
_WORKERS_PER_CORE, _MORE_WORKERS = 4, 32


def check_worker_count(workers: int) -> None:
    """Raise RecipeError for far more workers than the cores that this process may use."""
    cores = usable_cores()
    most = min(_WORKERS_PER_CORE * cores + _MORE_WORKERS, MAX_WORKERS)
    if workers > most:
        raise RecipeError(
            f"data.workers = {workers} processes for each rank, but the cores that it may use here are {cores}; use "
            f"about {cores}, at most {most}"
        )


def prepare_worker(parent: int, is_of_main_thread: bool, worker_id: int) -> None:
    """Set up the calling process as a data worker of process `parent`; for DataLoader's worker_init_fn.

    Args:
        is_of_main_thread: the parent's main thread started it.

    A signal to the whole process group (Ctrl-C, SLURM) must not end the workers, since the trainer still
    needs its batches until it has written a checkpoint, and a worker's death would interrupt it anywhere. So
    SIGTERM ends a worker only when the parent itself sends it.
    """
    torch.set_num_threads(1)
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    # Blocked here, so that only the watching thread receives it and can read its sender.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if is_of_main_thread:  # the kernel goes by the thread
        be_killed_with_parent()
    # The parent's id is an argument. If it were read here, a parent that was killed before this line would be mistaken
    # for the process that adopts orphans, and its connections would stay open in a worker that never ends.
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def be_killed_with_parent() -> None:
    """Let the kernel end this process with the thread that started it, even while it is stopped (SIGSTOP)."""
    with contextlib.suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, POLL_SECONDS)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)


def lead_own_commands() -> None:
    """Let a worker that starts commands lead a group of processes, so that the loader can end them with the worker.

    Ctrl-C does not reach them then: the trainer needs their output until it has saved.
    """
    if get_worker_info() is not None and os.getpgrp() != os.getpid():
        os.setpgid(0, 0)


class Whereabouts:
    """The current sample of each worker, in memory that forked workers share with the trainer.

    A worker that hangs on a file system cannot be asked, but its last note can be read.
    """

    def __init__(self) -> None:
        self._samples = np.frombuffer(mmap.mmap(-1, 8 * MAX_WORKERS), dtype=np.int64)

    def tell(self, sample_id: int) -> None:
        """The calling worker is at this sample now."""
        worker = get_worker_info()
        # Counted from one: the memory starts as zeros.
        self._samples[worker.id if worker else 0] = sample_id + 1

    def of(self, worker: int) -> int | None:
        """The sample that a worker told of last."""
        sample = int(self._samples[worker])
        return sample - 1 if sample else None
