"""torchrun, `karat launch` or `karat sweep`, where it started this process: a run must not go on without it."""

import os

LAUNCHED = "KARAT_LAUNCHED"
"""`karat launch` sets it for its ranks, `karat sweep` for its runs."""


class Launcher:
    """The parent process, if it is one of those. Any other parent may end: a shell, or `nohup`."""

    def __init__(self) -> None:
        self._pid = os.getppid() if {"TORCHELASTIC_RUN_ID", LAUNCHED} & os.environ.keys() else None

    @property
    def is_there(self) -> bool:
        """Whether such a launcher started this process."""
        return self._pid is not None

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, which leaves this process to another parent."""
        return self._pid is not None and os.getppid() != self._pid


# Made when `karat` starts: a launcher that is killed while torch is imported must be missed too.
LAUNCHER = Launcher()
