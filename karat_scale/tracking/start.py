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
from karat_scale.tracking.follow import FAREWELL

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
        self._ended: dict[str, bool] = {}  # those of which it is known how they ended, and whether it was in good order
        self._lock = threading.Lock()
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
            for name, process in self._processes.items():
                try:
                    process.wait(None if deadline is None else max(deadline - time.monotonic(), 0.0))
                except subprocess.TimeoutExpired:
                    self._kill(name, process)
                    self._say(f"warning: {name}: has not got everything in time; {self._hint}")
        except KeyboardInterrupt:
            for name, process in self._processes.items():
                self._kill(name, process)
            raise
        for listener in self._listeners:
            listener.join(1.0)  # what the library has left running may hold its pipe for ever
        for name, process in self._processes.items():
            self._tell_of_death(name, process)
        late = [name for name, process in self._processes.items() if process.returncode or not self._ended[name]]
        self._processes, self._listeners = {}, []
        return late

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
                if line == FAREWELL:
                    self._note_end(name, in_order=True)
                    continue
                is_warning = line.startswith("warning: ")
                text = line.strip().removeprefix("warning: ")
                self._say(f"{'warning: ' if is_warning else ''}{name}: {text}")
        self._tell_of_death(name, process)

    def _note_end(self, name: str, in_order: bool) -> bool:
        """Note how a process ended; whether that is new."""
        with self._lock:
            is_new = name not in self._ended
            self._ended.setdefault(name, in_order)
            return is_new

    def _tell_of_death(self, name: str, process: subprocess.Popen[str]) -> None:
        """Wait for the end of a process, and say if it has ended without a word."""
        code = process.wait()
        if self._note_end(name, in_order=False):
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self._say(f"warning: {name}: its process has ended ({how}), so it gets no more figures; {self._hint}")

    def _kill(self, name: str, process: subprocess.Popen[str]) -> None:
        self._note_end(name, in_order=False)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes of the library
        process.wait()
