"""The heartbeat of each rank: a small file with its current work, rewritten while the process lives.

RUN/heartbeats/rank-00003.json      {"rank": 3, "host": "node2", "beats": 812, "doing": "backward", "step": 203, ...}

`beats` counts the places in the program that a rank has passed. Ranks train in step. So if no rank makes progress, the
others wait for the one with the fewest beats. This module needs only the standard library.
"""

import faulthandler
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from karat_scale.engine.stall_limits import StallLimits
from karat_scale.foundation.files import parse_json, read_text

WRITE_SECONDS = 2.0
# Moving the alarm costs a thread, so do not move it at each beat of a fast step.
_ARM_SECONDS = 1.0
_STANDARD_ERROR = 2
_KINDS: Mapping[Any, Any] = {int: int, str: str, float: int | float}


@dataclass
class Sign:
    """The content of a heartbeat file. `own_seconds`: the part of a step in which the rank waits for no other."""

    rank: int
    host: str
    pid: int
    start: str
    beats: int = 0
    doing: str = "starting"
    step: int = 0
    written: float = 0.0
    device: str = ""
    own_seconds: float = 0.0


def heartbeat_file(directory: Path, rank: int) -> Path:
    """Return the heartbeat file of a rank of the run in `directory`."""
    return directory / "heartbeats" / f"rank-{rank:05d}.json"


def this_start(environ: Mapping[str, str] = os.environ) -> str:
    """Return this process's job and its restart; empty outside SLURM."""
    job = environ.get("SLURM_JOB_ID", "")
    return f"{job}-{environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""


class Heartbeat:
    """Writes this rank's file. If no beat comes for too long, it dumps all Python stacks to standard error.

    KARAT_STALL_SECONDS of the environment says how long that is (`StallLimits`); without it, nothing is dumped.

    on_stall: called once at each stall, in a thread of its own, with a directory for what it writes.
    """

    def __init__(
        self, directory: Path, rank: int, device: str = "", on_stall: Callable[[Path, int], object] | None = None
    ) -> None:
        self._file = heartbeat_file(directory, rank)
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._sign = Sign(rank, host, os.getpid(), this_start(), device=device)
        self._limits = StallLimits.parse(os.environ.get("KARAT_STALL_SECONDS", ""))
        self._armed, self._armed_for = 0.0, 0.0
        self._on_stall, self._diagnostics = on_stall, directory / "diagnostics"
        self._last_beat, self._told_of = 0.0, -1
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write_until_ended, name="heartbeat", daemon=True)

    def start(self) -> "Heartbeat":
        """Write the first heartbeat and start the thread that writes the next ones."""
        self.beat("starting")
        self._writer.start()
        return self

    def beat(self, doing: str, step: int = 0) -> None:
        """Record progress: this rank now starts `doing`."""
        self._sign.beats += 1
        self._sign.doing = doing
        self._sign.step = step or self._sign.step
        self._last_beat = now = time.monotonic()
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
        while True:
            self._write()
            self._look_for_stall()
            if self._ended.wait(WRITE_SECONDS):
                self._write()
                return

    def _look_for_stall(self) -> None:
        beats, late = self._sign.beats, time.monotonic() - self._last_beat > self._limits.of(self._sign.doing)
        if self._on_stall is not None and late and beats != self._told_of:
            self._told_of = beats
            self._on_stall(self._diagnostics, self._sign.rank)

    def _write(self) -> None:
        self._sign.written = round(time.time(), 3)
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
