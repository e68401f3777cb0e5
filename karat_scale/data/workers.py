"""What a data worker process must be: deaf to the signals the trainer handles, gone when the trainer is."""

import mmap
import os
import signal
import threading

import numpy as np
import torch
from torch.utils.data import get_worker_info

from karat_scale.errors import RecipeError

POLL_SECONDS = 1.0
MAX_WORKERS = 1024
# More wait for each other, and each takes memory. The rest leaves room for file systems that are slow to answer.
_WORKERS_PER_CORE, _MORE_WORKERS = 4, 32


def check_worker_count(workers: int) -> None:
    """Raises RecipeError for far more workers than the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = min(_WORKERS_PER_CORE * cores + _MORE_WORKERS, MAX_WORKERS)
    if workers > most:
        raise RecipeError(
            f"data.workers = {workers} are processes of each rank, which may use {cores} cores here; use about "
            f"{cores}, at most {most}"
        )


def prepare_worker(parent: int, worker_id: int) -> None:
    """Set up the calling process as a data worker of process `parent`; for DataLoader's worker_init_fn.

    A signal to the whole process group (Ctrl-C, SLURM) must not end the workers, since the trainer still
    needs its batches until it has written a checkpoint, and a worker's death would interrupt it anywhere. So
    SIGTERM ends a worker only when the parent itself sends it.
    """
    torch.set_num_threads(1)
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    # Blocked here, so that the watching thread alone receives it and can ask who sent it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    # The parent is told, not asked for: killed before this line, it would be taken for the one that adopts orphans,
    # and its connections would stay open in a worker that never leaves.
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, POLL_SECONDS)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)


class Whereabouts:
    """What sample each worker is at, in memory that forked workers share with the trainer.

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
