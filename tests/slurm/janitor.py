"""Clean up after a cluster: python -m tests.slurm.janitor ROOT NODE...

The janitor waits until its standard input closes. This happens when the process that has the cluster ends, even by
SIGKILL; that process's daemons end with it. The janitor then kills all steps and tasks, and removes all files.
"""

import contextlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil


def kill_processes(root: Path, nodes: Sequence[str]) -> None:
    """Kill these nodes' steps, which hold a node's log open, and tasks, which have its name in their environment."""
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
