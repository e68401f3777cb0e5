"""Ranks of a training run as forks of a process that has imported everything: real processes that start fast."""

import faulthandler
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from karat_scale.commands.cli import main
from karat_scale.foundation.errors import EXIT_INTERRUPTED
from karat_scale.foundation.machine import be_killed_with_parent
from tests.conftest import free_port


class ForkedRanks:
    """`karat ARGUMENTS` on `count` ranks, which communicate through gloo; each leads its own process group.

    Each rank first calls `prepare` with its number. Rank `absent` is not started.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        count: int,
        log: Path,
        prepare: Callable[[int], object] = lambda rank: None,
        absent: int | None = None,
    ) -> None:
        port = str(free_port())
        self.codes: dict[int, int] = {}
        self.ranks: list[int] = []
        for rank in [rank for rank in range(count) if rank != absent]:
            pid = os.fork()
            if pid == 0:
                _be_a_rank(arguments, rank, count, port, log, prepare)
            self.ranks.append(pid)

    def running(self) -> list[int]:
        """Return the process ids of the ranks that have not ended."""
        for pid in self.ranks:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return [pid for pid in self.ranks if pid not in self.codes]

    def all_run(self) -> bool:
        """Return whether no rank has ended."""
        return len(self.running()) == len(self.ranks)

    def kill(self, pids: Sequence[int]) -> None:
        """Send SIGKILL to the processes."""
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def wait(self, seconds: float) -> bool:
        """Wait for the ranks to end, then kill the rest and their children; return whether all ranks ended in time."""
        deadline = time.monotonic() + seconds
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.005)
        left = self.running()
        for pid in left:
            os.kill(pid, signal.SIGUSR1)  # writes into the log where the rank hangs
        time.sleep(0.1 if left else 0.0)
        self.kill(left)
        while self.running():
            time.sleep(0.005)
        for group in self.ranks:
            while _signal_group(group, signal.SIGKILL):
                time.sleep(0.005)
        return not left


def _be_a_rank(
    arguments: Sequence[str], rank: int, count: int, port: str, log: Path, prepare: Callable[[int], object]
) -> None:
    code = 1
    try:
        be_killed_with_parent()  # no rank outlives a test that runs out of time
        os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        if count > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        prepare(rank)
        code = main(arguments)
    except KeyboardInterrupt:  # before the run catches signals
        code = EXIT_INTERRUPTED
    finally:
        os._exit(code)


def _signal_group(group: int, number: signal.Signals) -> bool:
    """Signal a process group; return whether it had a member."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
