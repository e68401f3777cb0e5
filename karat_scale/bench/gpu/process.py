"""A worker process: how it reports what it found, one JSON object a line, and how the command runs and hears it."""

import json
import math
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
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


def run_process(command: Sequence[str], receive: Callable[[str, Any], None], seconds: float) -> str | None:
    """Run `command` for at most `seconds`; `receive` gets the kind and the content of each event as it comes.

    Returns why it ended badly, with the last lines of its standard error; None where it ended well.

    Raises:
        TimeoutError: it was ended, as the time was up.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        too_long = threading.Event()

        def end() -> None:
            too_long.set()
            _end(process)

        timer = threading.Timer(max(0.0, seconds), end)
        timer.start()
        try:
            for line in process.stdout or ():
                for kind, content in _events(line):
                    receive(kind, content)
            code = process.wait()
        finally:
            timer.cancel()
            _end(process)
        if code == 0:
            return None
        if too_long.is_set():
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
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-LINES_OF_LOG:])
