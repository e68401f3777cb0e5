"""Where figures go: `metrics.jsonl`, one event a line, and `histograms.jsonl`. The trackers follow these files."""

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from karat_scale.foundation.errors import not_written, one_line
from karat_scale.foundation.files import append_to, open_regular


class MetricsLog:
    """Appends events; every line is on disk before the next step can be lost.

    Raises:
        RunDirectoryError: the disk does not take the file.
    """

    def __init__(self, file: Path) -> None:
        try:
            self._file: IO[str] = append_to(file)
        except OSError as error:
            raise not_written(file, error) from error
        self._histograms = file.with_name("histograms.jsonl")
        # A disk that was full has left half a line: the next event must not join it.
        self._begins_line = not _ends_with_newline(file)

    def write(self, event: str, step: int, **figures: Any) -> None:
        """One event. A figure that is not finite is written as null: JSON has no NaN.

        Raises RunDirectoryError when the disk does not take it.
        """
        try:
            self._file.write(("\n" if self._begins_line else "") + _line(event, step, figures))
            self._file.flush()
        except OSError as error:
            raise not_written(self._file.name, error) from error
        self._begins_line = False

    def histograms(self, step: int, histograms: Mapping[str, Mapping[str, Any]]) -> str:
        """Append distributions by name, which only trackers read. Returns why the disk does not take them, if so."""
        try:
            is_whole = not self._histograms.exists() or _ends_with_newline(self._histograms)
            with append_to(self._histograms) as file:
                file.write(("" if is_whole else "\n") + _line("histograms", step, {"histograms": histograms}))
        except OSError as error:
            return f"{self._histograms}: {one_line(error)}"
        return ""

    def close(self) -> None:
        """Flush and close the file."""
        with suppress(OSError):  # a write that failed was reported when it happened
            self._file.close()


def _line(event: str, step: int, figures: Mapping[str, Any]) -> str:
    record = {"event": event, "step": step, "time": round(time.time(), 3), **figures}
    return json.dumps(_finite_or_none(record), allow_nan=False) + "\n"


def _ends_with_newline(file: Path) -> bool:
    with os.fdopen(open_regular(file), "rb") as content:
        content.seek(0, 2)
        if content.tell() == 0:
            return True
        content.seek(-1, 2)
        return content.read(1) == b"\n"


def _finite_or_none(value: Any) -> Any:
    """Return plain data with None in place of figures that are not finite."""
    if isinstance(value, Mapping):
        return {key: _finite_or_none(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_none(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
