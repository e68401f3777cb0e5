"""Signals that ask for a checkpoint: SIGTERM, SIGINT and SIGUSR2 set a flag that the loop reads.

SIGUSR1 is left alone: NCCL may use it. srun sends a signal to a rank's whole process group, where SIGUSR2 would kill
the compiler that the rank waits for. So it is blocked, which children inherit, and a thread waits for it.

The end of the launcher, if one started this process, counts as SIGTERM. Otherwise the rank would train on, and the next
start would find its run in use.
"""

import os
import signal
import threading
import time
from types import FrameType

from karat_scale.foundation.machine import LAUNCHER

_POLL_SECONDS = 1.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopSignals:
    """Remembers the first stop signal. The first Ctrl-C is answered at once, and a second one quits at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def install(self) -> "StopSignals":
        """Catch the stop signals from here on, in this process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        threading.Thread(target=self._wait_for_usr2, name="signals", daemon=True).start()
        if LAUNCHER.is_there:
            threading.Thread(target=self._stop_with_launcher, name="launcher", daemon=True).start()
        return self

    def _stop_with_launcher(self) -> None:
        while not LAUNCHER.is_gone:
            time.sleep(_POLL_SECONDS)
        os.write(2, b"the launcher has ended; this rank stops, too\n")
        self._remember(signal.SIGTERM, None)

    def _wait_for_usr2(self) -> None:
        while True:
            self._remember(signal.sigwait({signal.SIGUSR2}), None)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            os.write(2, b"\nquit at once; the last checkpoint stays\n")
            os._exit(1)
        if self.received is None:
            self.received = signal.Signals(number)
            if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nstopping: the state is saved first; Ctrl-C again quits at once\n")


class StoppedError(Exception):
    """All ranks agreed to stop on a signal; `saved` says whether the state is in a checkpoint."""

    saved = False
