"""Cleans up after a cluster: python -m tests.slurm.janitor ROOT NODE...

Waits until its standard input closes, which it does when the process that has the cluster ends, even by SIGKILL. After
that no daemon, step or task is left, and no file.
"""

import contextlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil


def kill_processes(root: Path, nodes: Sequence[str]) -> None:
    """Kill what runs on these nodes: steps hold their node's log open, tasks have its name in their environment."""
    logs = {str(root / "log" / node) for node in nodes}
    configuration = str(root / "etc" / "slurm.conf")
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            is_task = environment.get("SLURM_CONF") == configuration and environment.get("SLURMD_NODENAME") in nodes
            if is_task or logs & _open_files(process.pid):
                process.kill()


def _open_files(pid: int) -> set[str]:
    return {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}


def main(root: str, *nodes: str) -> None:
    sys.stdin.read()
    for _ in range(2):  # a step may start a task while we look
        kill_processes(Path(root), nodes)
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
