"""The heartbeat of each rank, and what it shows: which rank has stalled, and which is slow.

RUN/heartbeats/rank-00003.json      {"rank": 3, "host": "node2", "beats": 812, "doing": "backward", "step": 203, ...}

This small file has a rank's current work, and is rewritten while the process lives. `beats` counts the places in the
program that a rank has passed. Ranks train in step. So if no rank makes progress, the others wait for the one with the
fewest beats. `moves` also counts progress within long work that a single rank may do, such as verifying a file.

KARAT_STALL_SECONDS says how long a rank may do the same before it counts as stalled: `900`, or
`900,compile=3600,save=1800`. The first number holds for the phases that are not named. 0 turns the alarm off.

A slow rank makes all others wait, so whole steps take equally long on each. Only a rank's own time differs: waiting for
its data, and its forward pass, in which it waits for no other rank.

This module needs only the standard library.
"""

import faulthandler
import json
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from karat_scale.foundation.files import parse_json, read_text
from karat_scale.foundation.machine import number_in, this_node

PHASES = ("start", "compile", "data", "step", "save")
# The phase of each activity that heartbeats name; every other activity is part of a step.
_PHASE_OF = {
    "starting": "start",
    "fetching": "start",
    "compiling": "compile",
    "waiting for data": "data",
    "saving": "save",
    "snapshot": "save",
    "copying": "save",
}


@dataclass(frozen=True)
class StallLimits:
    """Seconds for each phase; 0 or infinity means that a phase has no limit."""

    general: float = 0.0
    by_phase: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "StallLimits":
        """Read KARAT_STALL_SECONDS. Raises ValueError with a line that names the mistake."""
        general, by_phase = 0.0, {}
        for number, part in enumerate(text.split(",") if text else ()):
            phase, equals, seconds = part.strip().rpartition("=")
            if equals and phase not in PHASES:
                raise ValueError(f"{phase!r} is not a phase; use {', '.join(PHASES)}")
            try:
                value = float(seconds)
            except ValueError:
                value = -1.0
            if not (value >= 0 and math.isfinite(value)) or (not equals and number):
                raise ValueError(f"{part.strip()!r} should be seconds, or PHASE=seconds after the first")
            if equals:
                by_phase[phase] = value
            else:
                general = value
        return cls(general, by_phase)

    def of(self, doing: str) -> float:
        """Return the limit for the activity that a heartbeat names; infinity if it has none."""
        seconds = self.by_phase.get(_PHASE_OF.get(doing, "step"), self.general)
        return seconds or math.inf

    def plus(self, grace: float) -> "StallLimits":
        """Return limits that are longer by `grace` seconds, where there are any."""
        longer = {phase: seconds + grace if seconds else 0.0 for phase, seconds in self.by_phase.items()}
        return StallLimits(self.general + grace if self.general else 0.0, longer)

    def __bool__(self) -> bool:
        return bool(self.general or any(self.by_phase.values()))


WRITE_SECONDS = 2.0


def pause(deadline: float) -> float:
    """Return WRITE_SECONDS, or less if a deadline of the monotonic clock comes before."""
    left = deadline - time.monotonic()
    return left if 0 < left < WRITE_SECONDS else WRITE_SECONDS


# Moving the alarm costs a thread, so do not move it at each beat of a fast step.
_ARM_SECONDS = 1.0
# The dump of the stacks also reads those of running threads, and crashes if they change. So the writer waits a little.
_AFTER_STACKS = 0.3
_STANDARD_ERROR = 2
_KINDS: Mapping[Any, Any] = {int: int, str: str, float: int | float}


@dataclass
class Sign:
    """The content of a heartbeat file.

    since_beat: seconds from the last beat to the writing of the file.
    own_seconds: the part of a step in which the rank waits for no other.
    """

    rank: int
    host: str
    pid: int
    start: str
    beats: int = 0
    doing: str = "starting"
    step: int = 0
    written: float = 0.0
    since_beat: float = 0.0
    device: str = ""
    own_seconds: float = 0.0
    moves: int = 0


def heartbeat_file(directory: Path, rank: int) -> Path:
    """Return the heartbeat file of a rank of the run in `directory`."""
    return directory / "heartbeats" / f"rank-{rank:05d}.json"


START = "KARAT_START"
"""The environment variable with a name, chosen by the launcher, that no other start of the run has.

Only the name of a start that a launcher repeats has a dot."""


def this_start() -> str:
    """Return the name of this start; without our launchers SLURM's job and restart count, else an empty text."""
    job = os.environ.get("SLURM_JOB_ID", "")
    of_slurm = f"{job}-{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""
    return os.environ.get(START, of_slurm)


def is_restart() -> bool:
    """Return whether SLURM or a launcher has started the run again."""
    return number_in(os.environ, "SLURM_RESTART_COUNT", "0") > 0 or "." in os.environ.get(START, "")


class Heartbeat:
    """Writes this rank's file. If no beat comes for too long, it dumps all Python stacks to standard error.

    KARAT_STALL_SECONDS of the environment says how long that is (`StallLimits`); without it, nothing is dumped.

    `on_stall` is called once at each stall, in the writing thread, with a directory for what it writes and the rank.
    """

    def __init__(
        self, directory: Path, rank: int, device: str = "", on_stall: Callable[[Path, int], object] | None = None
    ) -> None:
        self._file = heartbeat_file(directory, rank)
        self._sign = Sign(rank, this_node(), os.getpid(), this_start(), device=device)
        self._limits = StallLimits.parse(os.environ.get("KARAT_STALL_SECONDS", ""))
        self._armed, self._armed_for = 0.0, 0.0
        self._on_stall, self._diagnostics = on_stall, directory / "diagnostics"
        self._last_beat, self._told_of = 0.0, -1
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write_until_ended, name="heartbeat", daemon=True)

    def start(self) -> "Heartbeat":
        """Write the first heartbeat and start the thread that writes the next ones."""
        self.beat("starting")
        self._write()
        self._writer.start()
        return self

    def beat(self, doing: str, step: int = 0) -> None:
        """Record progress: this rank now starts `doing`."""
        self._sign.beats += 1
        self._sign.step = step or self._sign.step
        self.move(doing)

    def move(self, doing: str) -> None:
        """Record progress within `doing`."""
        self._last_beat = now = time.monotonic()  # first, as the other thread checks how long it has been `doing` this
        self._sign.moves += 1
        self._sign.doing = doing
        limit = self._limits.of(doing)
        if self._limits and (now - self._armed >= _ARM_SECONDS or limit != self._armed_for):
            self._armed, self._armed_for = now, limit
            if limit < math.inf:
                faulthandler.dump_traceback_later(limit, file=_STANDARD_ERROR)
            else:
                faulthandler.cancel_dump_traceback_later()

    def pace(self, own_seconds: float) -> None:
        """Record the seconds of this rank's own work in a step."""
        self._sign.own_seconds = round(own_seconds, 6)

    def stop(self) -> None:
        """Write the last heartbeat; there is no alarm after it."""
        if self._limits:
            faulthandler.cancel_dump_traceback_later()
        self._ended.set()
        self._writer.join()

    def _write_until_ended(self) -> None:
        has_ended = False
        while not has_ended:
            moves, late = self._sign.moves, time.monotonic() - self._last_beat > self._limits.of(self._sign.doing)
            if self._on_stall is not None and late and moves != self._told_of:
                self._told_of = moves
                self._on_stall(self._diagnostics, self._sign.rank)
            has_ended = self._ended.wait(pause(self._last_beat + self._limits.of(self._sign.doing) + _AFTER_STACKS))
            self._write()

    def _write(self) -> None:
        self._sign.written = round(time.time(), 3)
        self._sign.since_beat = round(time.monotonic() - self._last_beat, 3)
        temporary = self._file.with_suffix(".tmp")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(asdict(self._sign)), encoding="utf-8")
            temporary.replace(self._file)
        except OSError:
            return  # a full disk becomes an error at the next checkpoint


def read_signs(directory: Path) -> list[Sign]:
    """Return the heartbeats of a run's ranks, in rank order, without files that cannot be read now."""
    signs = []
    for path in sorted((directory / "heartbeats").glob("rank-*.json")):
        try:
            sign = Sign(**parse_json(read_text(path, 65536)))
            if all(isinstance(getattr(sign, field.name), _KINDS[field.type]) for field in fields(Sign)):
                signs.append(sign)
        except (OSError, ValueError, TypeError):
            continue
    return signs


# A factor on the median of the other ranks, and the least extra seconds per step; a smaller excess is noise.
SLOW, LEAST_SECONDS = 1.5, 0.01


def slow_factor(directory: Path) -> float:
    """Return the factor in the file `slow_factor` of a run, which may be written at any time, or SLOW without one."""
    try:
        factor = float(read_text(directory / "slow_factor", 64))
    except (OSError, ValueError):
        return SLOW
    return factor if 1 < factor < math.inf else SLOW


def slow_ranks(signs: Sequence[Sign], factor: float = SLOW) -> list[str]:
    """Return a line for each rank whose own time per step is `factor` times that of the others, or more."""
    return [line for sign, line in _judged(signs, factor) if line]


class Stragglers:
    """Reports, once, each rank that is slow in two reports in a row, since a single one may be chance."""

    def __init__(self) -> None:
        self._reported: dict[int, float] = {}
        self._slow_before: set[int] = set()
        self._reported_slow: set[int] = set()

    def look(self, signs: Sequence[Sign], factor: float = SLOW) -> list[str]:
        """Add the ranks' heartbeats; return lines about ranks that are slow now."""
        lines = []
        for sign, line in _judged(signs, factor):
            if self._reported.get(sign.rank) == sign.own_seconds:
                continue
            self._reported[sign.rank] = sign.own_seconds
            if line is None:
                self._slow_before.discard(sign.rank)
                continue
            if sign.rank in self._slow_before and sign.rank not in self._reported_slow:
                self._reported_slow.add(sign.rank)
                lines.append(line)
            self._slow_before.add(sign.rank)
        return lines


def _judged(signs: Sequence[Sign], factor: float) -> list[tuple[Sign, str | None]]:
    known = [sign for sign in signs if sign.own_seconds > 0]
    if len(known) < 2:
        return []
    others = {sign.rank: statistics.median(o.own_seconds for o in known if o is not sign) for sign in known}
    return [(sign, _line(sign, others[sign.rank], factor)) for sign in known]


def _line(sign: Sign, others: float, factor: float) -> str | None:
    if sign.own_seconds < factor * others or sign.own_seconds - others < LEAST_SECONDS:
        return None
    return (
        f"rank {sign.rank} on {sign.host} takes {sign.own_seconds:.3g} s of its own per step (data and forward pass), "
        f"{sign.own_seconds / others:.1f} times the others"
    )
