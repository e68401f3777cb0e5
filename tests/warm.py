"""`python -m MODULE` or `python SCRIPT` in processes forked from one that has imported what `karat` needs.

Imports are most of a small run's time. The process that others are forked from begins anew, does nothing but import,
and has one thread.
"""

import multiprocessing
import os
import runpy
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
# What ranks get to end in after one of them has failed.
GRACE_SECONDS = 30.0


def run_program(
    program: str, arguments: Sequence[str], environments: Sequence[Mapping[str, str]], timeout: float, directory: Path
) -> subprocess.CompletedProcess[str]:
    """Run a module, or a script whose name ends in .py, once in each environment, all at the same time, to their ends.

    When one process fails the others are told to end, and the return code is 1, as with torchrun; that of a single
    process is its own. Raises TimeoutError, and kills them all, after `timeout` seconds.
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
    program: str, arguments: Sequence[str], environment: Mapping[str, str], directory: Path, out: Path, err: Path
) -> ForkServerProcess:
    """Start one process, with files for what it writes."""
    process = PROCESSES.Process(
        target=_run, args=(program, tuple(arguments), dict(environment), str(directory), str(out), str(err))
    )
    process.start()
    return process


def run_code(
    code: str, *arguments: object, environments: Sequence[Mapping[str, str]], directory: Path, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """The same for the text of a program."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "code.py")
        file.write_text(code)
        return run_program(str(file), [str(one) for one in arguments], environments, timeout, directory)


def _wait(processes: Sequence[ForkServerProcess], deadline: float) -> bool:
    """Until all have ended. False: one had not at the deadline."""
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


def _run(
    program: str, arguments: Sequence[str], environment: Mapping[str, str], directory: str, out: str, err: str
) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = [program, *arguments]
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
