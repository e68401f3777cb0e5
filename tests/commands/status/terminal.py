"""`karat` on a terminal, as a person sees it and types into it."""

import os
import pty
import re
import select
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from tests.conftest import karat_command, karat_environment, wait_until

SECONDS = 120
_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass
class Terminal:
    """A process on a terminal, and all that it has shown."""

    process: "subprocess.Popen[bytes]"
    keyboard: int
    shown: str = ""

    def wait_for(self, text: str) -> None:
        """Read what the process shows until `text` is there; colours and movements of the cursor are left out."""

        def is_there() -> bool:
            if select.select([self.keyboard], [], [], 0)[0]:
                self.shown += self._read()
            return text in self.shown

        wait_until(is_there, SECONDS, self)

    def type(self, text: str) -> None:
        os.write(self.keyboard, text.encode())

    def _read(self) -> str:
        try:
            return _ESCAPES.sub(b"", os.read(self.keyboard, 1 << 16)).decode(errors="replace")
        except OSError:  # the process has ended, and with it its side of the terminal
            return ""


@contextmanager
def on_a_terminal(*arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Terminal]:
    """Start `karat ARGUMENTS` on a terminal of its own."""
    keyboard, screen = pty.openpty()
    process = subprocess.Popen(
        karat_command(arguments),
        env={**(environment or karat_environment()), "TERM": "xterm", "COLUMNS": "200", "LINES": "50"},
        stdin=screen,
        stdout=screen,
        stderr=screen,
    )
    os.close(screen)
    try:
        yield Terminal(process, keyboard)
    finally:
        process.kill()
        process.wait()
        os.close(keyboard)
