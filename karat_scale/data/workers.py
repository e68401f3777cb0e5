"""What a data worker process must be: deaf to the signals the trainer handles, gone when the trainer is."""

import os
import signal
import threading

import torch

POLL_SECONDS = 1.0


def prepare_worker(worker_id: int) -> None:
    """Set up the calling process as a data worker; for DataLoader's worker_init_fn.

    A signal to the whole process group (Ctrl-C, SLURM) must not end the workers, since the trainer still
    needs its batches until it has written a checkpoint, and a worker's death would interrupt it anywhere. So
    SIGTERM ends a worker only when the parent itself sends it.
    """
    torch.set_num_threads(1)
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    # Blocked here, so that the watching thread alone receives it and can ask who sent it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, POLL_SECONDS)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
