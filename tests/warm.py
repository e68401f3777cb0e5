"""Run `python -m MODULE` or `python SCRIPT` in processes forked from one that has imported what `karat` needs.

Imports take most of a small run's time. The process that is forked from is a new one, does nothing but import, and has
one thread.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.imported"])
# The time that ranks have to end after one of them has failed.
GRACE_SECONDS = 30.0


def run_program(
    program: str, arguments: Sequence[str], environments: Sequence[Mapping[str, str]], timeout: float, directory: Path
) -> subprocess.CompletedProcess[str]:
    """Run a module, or a script whose name ends in .py, once in each environment, all at the same time, to their ends.

    When one process fails, the others are terminated, and the return code is 1, as with torchrun. A single process
    keeps its own return code. Raises TimeoutError after `timeout` seconds, and kills all processes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        outs, errs = ([Path(scratch, f"{kind}{n}") for n in range(len(environments))] for kind in ("out", "err"))
        processes = [
            start(program, arguments, environment, directory, out, err)
            for environment, out, err in zip(environments, outs, errs, strict=True)
        ]
        try:
            in_time = _wait(processes, time.monotonic() + timeout)
        finally:  # the test's own time may be over, too
            for process in processes:
                process.kill()
                process.join()
        said, complained = ("".join(file.read_text() for file in files) for files in (outs, errs))
        if not in_time:
            raise TimeoutError(f"{program} {' '.join(arguments)}: {said}{complained}")
        codes = [process.exitcode for process in processes]
        code = codes[0] if len(codes) == 1 else int(any(codes))
        return subprocess.CompletedProcess([program, *arguments], code, said, complained)


def start(
    program: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    directory: Path,
    out: Path,
    err: Path,
    leads: bool = False,
) -> ForkServerProcess:
    """Start one process that writes to these files; with `leads`, it leads a process group of its own."""
    process = PROCESSES.Process(
        target=_run, args=(program, tuple(arguments), dict(environment), str(directory), str(out), str(err), leads)
    )
    process.start()
    return process


def run_code(
    code: str, *arguments: object, environments: Sequence[Mapping[str, str]], directory: Path, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run the text of a program, as `run_program` does."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "code.py")
        file.write_text(code)
        return run_program(str(file), [str(one) for one in arguments], environments, timeout, directory)


def _wait(processes: Sequence[ForkServerProcess], deadline: float) -> bool:
    """Wait until all processes have ended. Return False if one still runs at the deadline and none has failed.

    When one fails, terminate the others and wait GRACE_SECONDS for them at most.
    """
    told = False
    while running := [process for process in processes if process.exitcode is None]:
        wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic()))
        if time.monotonic() >= deadline:
            return told or all(process.exitcode is not None for process in processes)
        if not told and any(process.exitcode for process in processes):
            told, deadline = True, time.monotonic() + GRACE_SECONDS
            for process in processes:
                process.terminate()
    return True


class Started:
    """A program that runs once in each environment, with some of the methods of `subprocess.Popen`.

    All processes write to one file, and each leads a process group of its own.
    """

    def __init__(self, program: str, arguments: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        self._out = Path(self._scratch.name, "out")
        self._out.touch()
        self.processes = [
            start(program, arguments, environment, Path.cwd(), self._out, self._out, leads=True)
            for environment in environments
        ]
        atexit.register(self.send_signal, signal.SIGKILL)  # otherwise a failed test's processes would be waited for

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self.processes]

    @property
    def pid(self) -> int:
        """Return the process id of the only process."""
        (pid,) = self.pids
        return pid

    @property
    def returncode(self) -> int | None:
        """Return the exit code of the first process."""
        return self.processes[0].exitcode

    def poll(self) -> int | None:
        """Return the exit code of a process that has ended; None while all run."""
        return next((one.exitcode for one in self.processes if one.exitcode is not None), None)

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, number)

    def said(self) -> str:
        """Return the output so far."""
        return self._out.read_text()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Return all output once the processes have ended; if they do not end in time, kill them and fail."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for process in self.processes:
            process.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        in_time = all(process.exitcode is not None for process in self.processes)
        self.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.join()
        said = self.said()
        assert in_time, said
        return said, None


def _run(
    program: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    directory: str,
    out: str,
    err: str,
    leads: bool,
) -> None:
    if leads:
        os.setpgid(0, 0)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = [program, *arguments]
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
