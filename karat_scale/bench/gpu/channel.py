"""How a worker process tells the command what it found: one JSON object a line."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any


class Channel:
    """Writes events to a file descriptor. Figures that are not finite become None, which JSON can hold."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def machine(self, facts: Mapping[str, Any]) -> None:
        """What the card and the software are."""
        self._tell("machine", facts)

    def row(self, **figures: Any) -> None:
        """A row of the section's table."""
        self._tell("row", figures)

    def notice(self, text: str) -> None:
        """Something to know beside the figures."""
        self._tell("notice", text)

    def left_out(self, what: str, why: str) -> None:
        """What was not measured, without anything being wrong."""
        self._tell("left_out", {"what": what, "why": why})

    def failed(self, what: str, why: str) -> None:
        """What should have run and did not."""
        self._tell("failed", {"what": what, "why": why})

    def again(self, batch: int) -> None:
        """The section is to run again with at most this batch."""
        self._tell("again", batch)

    def _tell(self, kind: str, content: Any) -> None:
        os.write(self._descriptor, (json.dumps({kind: _finite(content)}) + "\n").encode())


def one_line(error: BaseException) -> str:
    """An exception's class and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return None if isinstance(content, float) and not math.isfinite(content) else content
