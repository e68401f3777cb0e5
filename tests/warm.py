"""`karat` in a process forked from one that has imported what it needs: imports are most of a small run's time."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

# The process that they are forked from begins anew, runs nothing but these imports, and has one thread.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["karat_scale.train.run", "karat_scale.train.eval_run"])


def run_karat(
    arguments: Sequence[str], environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """`karat ARGUMENTS` to its end, in a process of its own. Raises TimeoutError, and ends it, after `timeout` s."""
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch, "out"), Path(scratch, "err")
        told = (tuple(arguments), dict(environment), str(Path.cwd()), str(out), str(err))
        process = PROCESSES.Process(target=_karat, args=told)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"karat {' '.join(arguments)}: {out.read_text()}{err.read_text()}")
        return subprocess.CompletedProcess(["karat", *arguments], process.exitcode, out.read_text(), err.read_text())


def _karat(arguments: Sequence[str], environment: Mapping[str, str], directory: str, out: str, err: str) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["karat", *arguments]
    from karat_scale.cli import entry_point

    entry_point()
