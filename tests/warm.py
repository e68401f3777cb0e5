"""`python -m MODULE` in a process forked from one that has imported what `karat` needs.

Imports are most of a small run's time. The process that others are forked from begins anew, does nothing but import,
and has one thread.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["karat_scale.train.run", "karat_scale.train.eval_run", "torch.distributed.launcher.api"]
)


def run_module(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run to its end. Raises TimeoutError, and ends it, after `timeout` seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch, "out"), Path(scratch, "err")
        told = (module, tuple(arguments), dict(environment), str(Path.cwd()), str(out), str(err))
        process = PROCESSES.Process(target=_run, args=told)
        process.start()
        try:
            process.join(timeout)
            in_time = process.exitcode is not None
        finally:  # the test's own time may be over, too
            process.kill()
            process.join()
        if not in_time:
            raise TimeoutError(f"{module} {' '.join(arguments)}: {out.read_text()}{err.read_text()}")
        return subprocess.CompletedProcess([module, *arguments], process.exitcode, out.read_text(), err.read_text())


def _run(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], directory: str, out: str, err: str
) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
