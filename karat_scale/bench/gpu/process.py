"""A worker's process, from its start to its end, and what it told meanwhile."""

import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import IO, Any

# torchrun ends its ranks on SIGTERM, which are in sessions of their own.
GRACE = 10.0
LINES_OF_LOG = 12


def run_process(command: Sequence[str], hear: Callable[[str, Any], None], seconds: float) -> str | None:
    """Run `command` for at most `seconds`; `hear` gets the kind and the content of each event as it comes.

    Returns why it ended badly, with the last lines of its standard error; None where it ended well.
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
                    hear(kind, content)
            code = process.wait()
        finally:
            timer.cancel()
            _end(process)
        if code == 0:
            return None
        if too_long.is_set():
            return f"stopped after {seconds:.0f} s"
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
