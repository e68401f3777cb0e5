"""How a run's wall time was spent, over all its starts.

Rank 0's time is divided wherever its heartbeat reports a new activity. So the parts of a start add up to
its wall time, and each event of `metrics.jsonl` has them as `spent`. The work of a start after the checkpoint that the
next start resumes from is lost. A job is in the queue from when SLURM takes it to when it starts. The time without a
job does not count.
"""

import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import psutil

from karat_scale.foundation.console import duration
from karat_scale.foundation.errors import EXIT_LOST_PEER
from karat_scale.foundation.machine import ask_squeue

_WORK = ("training", "waiting for data", "evaluating", "saving")
PARTS = (*_WORK, "compiling", "starting", "lost", "queue")
# The part of each activity that heartbeats name; every other activity is training.
_PART_OF = {**{part: part for part in PARTS}, "fetching": "starting", "snapshot": "saving", "copying": "saving"}


class Stopwatch:
    """Divides the time of this process, from its creation on, into parts."""

    def __init__(self) -> None:
        self.began = psutil.Process().create_time()
        self._since = time.monotonic() - (time.time() - self.began)
        self._part = "starting"
        self._spent: dict[str, float] = {}

    def begin(self, doing: str) -> None:
        """Count the time from now on as `doing`, the activity that the heartbeat names."""
        now = time.monotonic()
        self._spent[self._part] = self._spent.get(self._part, 0.0) + now - self._since
        self._since, self._part = now, _PART_OF.get(doing, "training")

    def read(self) -> dict[str, float]:
        """The seconds of each part until now."""
        self.begin(self._part)
        return {part: round(seconds, 3) for part, seconds in self._spent.items()}


def queued() -> tuple[float, float] | None:
    """Return when SLURM received this job and when it started it, in seconds since the epoch; None if unknown."""
    job = os.environ.get("SLURM_JOB_ID")
    told = ask_squeue(job, "%V,%S") if job else None
    try:
        given, started = (datetime.fromisoformat(one).timestamp() for one in (told or "").split(","))
    except ValueError:
        return None
    return given, started


@dataclass
class WallTime:
    """Adds up the events of a run. Events without `spent`, of earlier versions, do not count."""

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    seconds: float = 0.0
    """The time from the first start, or its submission, to the last event, except the time without a job."""
    failures: int = 0
    """The number of starts that ended without an event, or by an error that is not the user's."""

    def __post_init__(self) -> None:
        self._until: float | None = None
        self._of_start: dict[str, float] = {}
        self._end: int | None = None
        self._marks: list[tuple[int, dict[str, float]]] = []
        """The parts after finished steps, which are kept if training resumes there."""

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in the next event. Raises ValueError, TypeError or KeyError if it is not an event."""
        if event.get("event") == "start":
            self._start(event)
        if not isinstance(event.get("spent"), dict) or self._until is None:
            return
        spent = {part: _number(event["spent"].get(part, 0.0)) for part in PARTS}
        now = _number(event["time"])
        for part, seconds in spent.items():
            self.parts[part] += seconds - self._of_start.get(part, 0.0)
        self._of_start = spent
        self._move(now)
        kind, kept = event["event"], dict(self.parts)
        if kind == "end":
            self._end = event["exit"]
        elif kind == "checkpoint":  # training went on while it was written
            since = _number(event["seconds"]) - _number(event["stall_seconds"])
            kept["training"] = max(kept["training"] - since, 0.0)
        if kind in ("train", "checkpoint"):
            self._marks.append((event["step"], kept))

    def reach(self, now: float, doing: str) -> None:
        """Count the time from the last event until now, in seconds since the epoch, as the last start's `doing`."""
        if self._until is not None and self._end is None and now > self._until:
            self.parts[_PART_OF.get(doing, "training")] += now - self._until
            self._move(now)

    def to_json(self) -> dict[str, float]:
        """Return the seconds, in total and of each part."""
        return {"total": round(self.seconds, 3), **{part: round(self.parts[part], 3) for part in PARTS}}

    def __str__(self) -> str:
        """Return one line, or an empty text if nothing is known."""
        if not self.seconds:
            return ""
        shares = {part: 100 * seconds / self.seconds for part, seconds in self.parts.items()}
        named = ((part, f"{share:.0f}" if share >= 10 else f"{share:.2g}") for part, share in shares.items())
        listed = ", ".join(f"{part} {share} %" for part, share in named if float(share) >= 0.1)
        return f"{duration(self.seconds)}: {listed}"

    def _start(self, event: Mapping[str, Any]) -> None:
        began, step = _number(event["began"]), event["step"]
        asked, started = (began if event.get(key) is None else _number(event[key]) for key in ("submitted", "started"))
        if event["anew"] or self._until is None:
            self.parts, self.seconds = dict.fromkeys(PARTS, 0.0), 0.0
            self._marks, self._end, self.failures = [], None, 0
            self._until = asked
        else:
            if event["last_sign"] is not None:
                self.reach(min(_number(event["last_sign"]), began), "training")
            self._lose(step)
            self.failures += self._end in (None, 1, EXIT_LOST_PEER)
        self._until = max(asked, self._until)
        queue = max(min(started, began) - self._until, 0.0)
        self.parts["queue"] += queue
        self.parts["starting"] += max(began - self._until - queue, 0.0)
        self._move(began)
        self._of_start, self._end = {}, None

    def _lose(self, step: int) -> None:
        """Count the work after `step` as lost: training resumes there."""
        self._marks = [mark for mark in self._marks if mark[0] <= step]
        kept = max(reversed(self._marks), key=lambda mark: mark[0])[1] if self._marks else dict.fromkeys(PARTS, 0.0)
        for part in _WORK:
            self.parts["lost"] += self.parts[part] - kept[part]
            self.parts[part] = kept[part]

    def _move(self, time: float) -> None:
        assert self._until is not None
        self.seconds += max(time - self._until, 0.0)
        self._until = max(time, self._until)


def wall_time(events: Iterable[Mapping[str, Any]]) -> WallTime:
    """Return how the time of a run with these events was spent; skip what is not an event."""
    found = WallTime()
    for event in events:
        try:
            found.add(event)
        except (KeyError, TypeError, ValueError):
            continue
    return found


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a time")
    return float(value)
