"""`karat launch`: a command on several ranks of this machine. An error is said once, after everything else.

A rank that a signal ended says nothing; the launcher names it and the signal.

torchrun does the same on any number of nodes, but ends with a traceback of its own. Its last lines are the error of
each rank, which `say_to_launcher` leaves there.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from karat_scale.foundation.files import write_atomically
from karat_scale.foundation.machine import LAUNCHED, LAUNCHER, usable_cores

ERRORS = "KARAT_ERRORS"
"""In the environment of each rank: the directory that takes its last error, instead of standard error."""
TORCHRUNS = "TORCHELASTIC_ERROR_FILE"
"""In the environment of each rank that torchrun starts: the file whose message it prints at its end."""
# The other ranks notice that one is gone, and say so, within seconds; then they are told to end, and then killed.
_NOTICE_SECONDS, _END_SECONDS = 30.0, 30.0
_POLL_SECONDS = 0.05
_FORWARDED = (signal.SIGTERM, signal.SIGUSR2)
# CUDA's and ROCm's lists of the GPUs that a process may use. ROCm reads all three.
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_NVIDIA, _AMD = Path("/dev"), Path("/sys/class/kfd/kfd/topology/nodes")


def launch(arguments: Sequence[str], ranks: int) -> int:
    """Run `karat` with these arguments on `ranks` processes; returns the exit code of the first one that failed."""
    with tempfile.TemporaryDirectory(prefix="karat-launch-") as errors:
        command = [sys.executable, "-m", "karat_scale", *arguments]
        processes = [subprocess.Popen(command, env=each) for each in _environments(ranks, errors)]
        with _signals_forwarded(processes):
            ended = _wait(processes)
        code = next((code for _, code in ended if code), 0)
        for text in _messages(Path(errors), ended):
            print(text, file=sys.stderr)
        return code if code >= 0 else 128 - code  # as a shell says that a signal ended it


def say_to_launcher(text: str, rank: str) -> bool:
    """Leave a rank's last error to the launcher; returns whether there is one that takes it."""
    directory, torchruns = os.environ.get(ERRORS, ""), os.environ.get(TORCHRUNS, "")
    try:
        if directory:
            write_atomically(Path(directory) / f"rank-{int(rank):05d}", text)
        elif torchruns:
            write_atomically(Path(torchruns), json.dumps({"message": f"error: {text}", "timestamp": int(time.time())}))
    except (OSError, ValueError):
        return False
    return bool(directory or torchruns)


def default_ranks() -> int:
    """Return one rank for each GPU that this process may use; one if there is none. Does not import torch."""
    lists = [os.environ[name].split(",") for name in _VISIBLE if name in os.environ]
    if lists:  # CUDA and ROCm stop at the first name that is empty or negative
        named = [takewhile(lambda name: name.strip() and not name.strip().startswith("-"), names) for names in lists]
        return max(1, min(len([*names]) for names in named))
    nvidia = sum(1 for path in _NVIDIA.glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal())
    amd = 0
    for path in _AMD.glob("*/gpu_id"):  # processors have id 0; a job reads only its own GPUs
        with suppress(OSError, ValueError):
            amd += int(path.read_text()) != 0
    return max(1, nvidia or amd)


def _environments(ranks: int, errors: str) -> Iterator[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    threads = str(max(1, usable_cores() // ranks))
    shared = {"OMP_NUM_THREADS": threads, **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), ERRORS: errors, LAUNCHED: "1"}
    for rank in range(ranks):
        yield {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}


@contextmanager
def _signals_forwarded(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Pass on the signals that ask for a checkpoint. A terminal sends Ctrl-C to the ranks, too."""

    def forward(number: int, _: object) -> None:
        _send(processes, number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[tuple[int, int]]:
    """Wait for all ranks; returns (rank, exit code) in the order in which they ended."""
    ended: dict[int, int] = {}
    # After so many seconds from the first failure, this signal for those that are left.
    endings = [(_NOTICE_SECONDS + _END_SECONDS, signal.SIGKILL), (_NOTICE_SECONDS, signal.SIGTERM)]
    failed_at: float | None = None
    is_orphaned = False
    while len(ended) < len(processes):
        for rank, process in enumerate(processes):
            if rank not in ended and process.poll() is not None:
                ended[rank] = process.returncode
        if LAUNCHER.is_gone and not is_orphaned:
            is_orphaned = True
            _send(processes, signal.SIGTERM)
        now = time.monotonic()
        if failed_at is None and any(ended.values()):
            failed_at = now
        if failed_at is not None and endings and now - failed_at > endings[-1][0]:
            _, number = endings.pop()
            _send(processes, number)
        time.sleep(_POLL_SECONDS)
    return list(ended.items())


def _send(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _messages(directory: Path, ended: Sequence[tuple[int, int]]) -> list[str]:
    """Return which ranks a signal ended, then each different error once, both in the order in which ranks ended.

    If the first failure is an error, those of ranks that ended with another exit code follow from it, and are left out.
    """
    failed = [(rank, code) for rank, code in ended if code]
    killed = [f"error: rank {rank} was ended by {signal.Signals(-code).name}" for rank, code in failed if code < 0]
    texts: dict[str, int] = {}
    for rank, code in failed:
        path = directory / f"rank-{rank:05d}"
        if path.is_file() and (killed or code == failed[0][1]):
            texts.setdefault(path.read_text(), rank)
    several = len(texts) + len(killed) > 1
    return killed + [f"[rank {rank}] error: {text}" if several else f"error: {text}" for text, rank in texts.items()]
