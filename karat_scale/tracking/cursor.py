"""How far a tracker has got: `RUN/trackers/NAME.json`, replaced atomically after each piece that was sent.

A restart may go back to an older checkpoint, and then writes the steps after it once more. They are sent once, as they
were first: of each kind of event, only steps above the last sent one are new.
"""

import json
import os
import re
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from karat_scale.files import make_folder, open_regular, parse_json, read_text, replace_file
from karat_scale.tracking.tracker import KINDS, Event

# Written by reporting/metrics.py.
FILES = ("metrics.jsonl", "histograms.jsonl")
_MOST_BYTES = 2**20  # read at a time


@dataclass
class Cursor:
    """What a tracker has.

    Attributes:
        id: of the run, at the tracker.
        begin: where this run begins in each of `FILES`, in bytes; mostly at 0.
        offsets: up to where each of them was sent.
        steps: the last step of each kind of event.
        sent: size and time of change of each uploaded file.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    begin: dict[str, int] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    sent: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> "Cursor":
        """Read a cursor; a new one if there is none, or if it is damaged."""
        try:
            content = parse_json(read_text(file))
            known = {one.name: content[one.name] for one in fields(cls)}
        except (OSError, ValueError, TypeError, KeyError):
            return cls()
        is_whole = isinstance(known["id"], str) and all(
            isinstance(known[name], dict) for name in ("begin", "offsets", "steps", "sent")
        )
        return cls(**known) if is_whole else cls()

    def save(self, file: Path) -> None:
        """Replace the file."""
        make_folder(file.parent)
        replace_file(file, json.dumps(asdict(self)) + "\n")

    def take(self, file: Path) -> tuple[list[Event], "Cursor"]:
        """Return the next events of one of `FILES` that were not sent, and the cursor after them.

        A last line without its end is still being written. Lines that are no events are passed over.
        """
        lines, offset = _next_lines(file, self.offsets.get(file.name, 0))
        steps = dict(self.steps)
        new = [event for event in map(_parsed, lines) if event is not None and _is_new(event, steps)]
        return new, replace(self, offsets={**self.offsets, file.name: offset}, steps=steps)

    def back_to(self, steps: Mapping[str, int]) -> "Cursor":
        """Return a cursor at the run's begin that passes over all up to these steps."""
        return replace(self, offsets=dict(self.begin), steps=dict(steps))


def cursor_file(run: Path, name: str) -> Path:
    """Return the file of a tracker's cursor; `name` may be the place of a class."""
    return run / "trackers" / f"{re.sub(r'[^A-Za-z0-9_.]', '.', name)}.json"


def how_to_send(run: Path) -> str:
    """Return what sends the rest of a run, for messages."""
    return f"the run's next start sends the rest, or: karat track {shlex.quote(str(run))}"


def begin_anew(run: Path, name: str) -> None:
    """Let a tracker begin another run at what comes from now on."""
    sizes = {file: (run / file).stat().st_size for file in FILES if (run / file).is_file()}
    Cursor(begin=sizes, offsets=sizes).save(cursor_file(run, name))


def _next_lines(file: Path, offset: int) -> tuple[Sequence[bytes], int]:
    if not file.is_file():
        return [], 0
    with os.fdopen(open_regular(file), "rb") as content:
        if content.seek(0, 2) < offset:  # another file of this name
            offset = 0
        content.seek(offset)
        piece = content.read(_MOST_BYTES)
        if b"\n" not in piece:
            piece += content.readline()
    whole, end, _ = piece.rpartition(b"\n")
    return (whole.split(b"\n"), offset + len(whole) + 1) if end else ([], offset)


def _parsed(line: bytes) -> Event | None:
    try:
        event: Any = parse_json(line)
    except ValueError:
        return None
    return event if isinstance(event, Mapping) and isinstance(event.get("step"), int) else None


def _is_new(event: Event, steps: dict[str, int]) -> bool:
    kind = event.get("event")
    if kind not in KINDS:
        return True
    if event["step"] <= steps.get(kind, -1):
        return False
    steps[kind] = event["step"]
    return True
