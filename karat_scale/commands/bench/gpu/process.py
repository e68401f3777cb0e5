"""A worker process: how it reports what it found, one JSON object a line, and how the command runs and hears it."""

import json
import math
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import IO, Any


class Channel:
    """Writes events to a file descriptor. Figures that are not finite become None, which JSON can hold."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def machine(self, facts: Mapping[str, Any]) -> None:
        """Send the facts about card and software."""
        self._send("machine", facts)

    def begin(self, what: str) -> None:
        """Say what runs from here on: it is left out if the time ends, and failed if the process does."""
        self._send("begin", what)

    def row(self, **figures: Any) -> None:
        """Send a row of the section's table."""
        self._send("row", figures)

    def notice(self, text: str) -> None:
        """Send a note about the figures."""
        self._send("notice", text)

    def left_out(self, what: str, why: str) -> None:
        """Report what was not measured although nothing is wrong."""
        self._send("left_out", {"what": what, "why": why})

    def late(self, what: str) -> None:
        """Report what was left out as there was no time for it."""
        self._send("left_out", late(what, "there was no time for it"))

    def failed(self, what: str, why: str) -> None:
        """Report what should have run and did not."""
        self._send("failed", {"what": what, "why": why})

    def again(self, batch: int) -> None:
        """Ask to run the section again with at most this batch."""
        self._send("again", batch)

    def moved(self) -> None:
        """Say that this process still moves; it counts as hung when it was the last to say so, and that is long ago."""
        self._send("moved", None)

    def ended(self, why: str) -> None:
        """Say why this process ends before its section does."""
        self._send("ended", why)

    def _send(self, kind: str, content: Any) -> None:
        os.write(self._descriptor, (json.dumps({kind: _finite(content)}) + "\n").encode())


def late(what: str, why: str) -> dict[str, Any]:
    """Return the content of an event on what the time did not suffice for."""
    return {"what": what, "why": f"{why}; give more by --minutes", "late": True}


def one_line(error: BaseException) -> str:
    """Return an exception's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return None if isinstance(content, float) and not math.isfinite(content) else content


# torchrun ends its ranks on SIGTERM, which are in sessions of their own.
GRACE = 10.0
LINES_OF_LOG = 12
# Nothing that ends takes so long without moving (see `watch`). What overruns may take more.
HUNG_SECONDS = 45.0
_POLL_SECONDS = 0.2
_STACK = "(most recent call first):"


class HungError(Exception):
    """A process did not move any more."""


class _Watch(threading.Thread):
    """Ends a process that takes too long, or that said once that it moves, and for `hung` seconds not again."""

    def __init__(self, process: subprocess.Popen[str], seconds: float, hung: float) -> None:
        super().__init__(daemon=True)
        self._process, self._seconds, self._hung = process, seconds, hung
        self.moved: float | None = None
        self.is_late = self.is_hung = False
        self.over = threading.Event()

    def run(self) -> None:
        """Wait for one of them."""
        ends = time.monotonic() + self._seconds
        while not (self.is_late or self.is_hung or self.over.wait(_POLL_SECONDS)):
            now = time.monotonic()
            self.is_hung = self.moved is not None and now - self.moved > self._hung
            self.is_late = now > ends
        if not self.over.is_set():
            _end(self._process)


def run_process(
    command: Sequence[str], receive: Callable[[str, Any], None], seconds: float, hung: float = HUNG_SECONDS
) -> str | None:
    """Run `command` for at most `seconds`; `receive` gets the kind and the content of each event as it comes.

    Returns why it ended badly, with the last lines of its standard error; None where it ended well.

    Raises:
        TimeoutError: it was ended, as the time was up.
        HungError: it was ended, as for `hung` seconds it had not moved; with its stack.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        watch = _Watch(process, seconds, hung)
        watch.start()
        try:
            for line in process.stdout or ():
                for kind, content in _events(line):
                    if kind == "moved":
                        watch.moved = time.monotonic()
                    else:
                        receive(kind, content)
            code = process.wait()
        finally:
            watch.over.set()
            _end(process)
        if code == 0:
            return None
        if watch.is_hung:
            raise HungError(f"hung: it has not moved for {hung:.0f} s\n{_stack(log)}".strip())
        if watch.is_late:
            raise TimeoutError(f"it was stopped after {seconds:.0f} s")
        return f"{_ending(code)}\n{_last_lines(log)}".strip()


def _events(line: str) -> Iterable[tuple[str, Any]]:
    """None where a library wrote the line."""
    try:
        event = json.loads(line)
    except ValueError:
        return ()
    return event.items() if isinstance(event, dict) else ()


def _end(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            return


def _ending(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _last_lines(log: IO[bytes]) -> str:
    return "\n".join(_lines(log)[-LINES_OF_LOG:])


def _stack(log: IO[bytes]) -> str:
    """Return the last stack that faulthandler wrote, which is that of a main thread, with its last call at the end."""
    lines = _lines(log)
    begins = max((number for number, line in enumerate(lines) if line.endswith(_STACK)), default=len(lines))
    calls = list(takewhile(lambda line: line.startswith("  File "), lines[begins + 1 :]))
    return "\n".join(call.strip() for call in calls[:LINES_OF_LOG][::-1])


def _lines(log: IO[bytes]) -> list[str]:
    log.seek(0)
    return [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
