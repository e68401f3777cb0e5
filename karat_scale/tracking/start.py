"""The trainer's side: check that trackers are installed, start a process for each, and end them in a bounded time."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from karat_scale.errors import UserError
from karat_scale.tables import EXTRAS, TRACKERS, how_to_install, is_installed
from karat_scale.tracking.cursor import begin_anew, how_to_send

# What the trainer waits for its trackers at its end; less where somebody wants it to stop.
END_SECONDS, STOP_SECONDS = 30.0, 5.0
# How long a process may go on alone after a trainer that was killed.
_ORPHAN_SECONDS = 60.0
# The path comes first: a module of that name in the working directory must not be imported in place of one of ours.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv.pop(1).split(':'); from karat_scale.tracking.follow import main; "
    "sys.exit(main(sys.argv[1:]))"
)


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for the first tracker of a recipe whose package or module is not installed."""
    for name in names:
        row = TRACKERS.get(name)
        if row is None:
            _check_place(name)
        elif row.extra and not is_installed(EXTRAS[row.extra].module):
            raise UserError(f"log.trackers = {name}: {name} is not installed; {how_to_install(row.extra)}")


def _check_place(place: str) -> None:
    module = place.partition(":")[0]
    try:
        found = find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise UserError(f"log.trackers = {place}: no module {module}; put its directory on PYTHONPATH")


class Trackers:
    """One process for each tracker of a run. A process that cannot be started is told in `messages`."""

    def __init__(
        self,
        run: Path,
        names: Sequence[str],
        anew: bool = False,
        patient: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Start the processes.

        Args:
            run: a directory with recipe.yaml.
            names: of the table, or places of classes.
            anew: the run begins again from its start, so it is another run to its trackers.
            patient: a process may take as long as it needs, once `finish` is called.
            say: is called with each message at once, by another thread; without it, `messages` returns them.
        """
        self._hint = how_to_send(run)
        self._messages: deque[str] = deque()
        self._say = say or self._messages.append
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._listeners: list[threading.Thread] = []
        for name in names:
            try:
                if anew:
                    begin_anew(run, name)
                self._processes[name] = self._start(run, name, 0.0 if patient else _ORPHAN_SECONDS)
            except OSError as error:
                self._say(f"warning: {name}: cannot be started, so it gets no figures: {error.strerror}")

    def messages(self) -> list[str]:
        """Return what the processes have said since the last call."""
        return [self._messages.popleft() for _ in range(len(self._messages))]

    def finish(self, seconds: float | None) -> list[str]:
        """Let all send what is left, for at most so long. Return the trackers that have not got everything."""
        for process in self._processes.values():
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.write("\n")  # another process may hold this end of the pipe, too
                process.stdin.close()
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            late = [name for name, process in self._processes.items() if not self._ends_well(name, process, deadline)]
        except KeyboardInterrupt:
            for process in self._processes.values():
                _kill(process)
            raise
        for listener in self._listeners:
            listener.join(1.0)
        self._processes, self._listeners = {}, []
        return late

    def _ends_well(self, name: str, process: subprocess.Popen[str], deadline: float | None) -> bool:
        try:
            return process.wait(None if deadline is None else max(deadline - time.monotonic(), 0.0)) == 0
        except subprocess.TimeoutExpired:
            _kill(process)
            self._say(f"warning: {name}: has not got everything in time; {self._hint}")
            return False

    def _start(self, run: Path, name: str, seconds: float) -> subprocess.Popen[str]:
        place = TRACKERS[name].place if name in TRACKERS else name
        command = [sys.executable, "-c", _PROGRAM, ":".join(sys.path), str(run), name, place, str(seconds)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
        listener = threading.Thread(target=self._listen, args=(name, process), daemon=True)
        listener.start()
        self._listeners.append(listener)
        return process

    def _listen(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                is_warning = line.startswith("warning: ")
                text = line.strip().removeprefix("warning: ")
                self._say(f"{'warning: ' if is_warning else ''}{name}: {text}")


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with the processes of the library
    process.wait()
