"""How long a rank may do the same before it counts as stalled: one limit for all phases, or one for each.

KARAT_STALL_SECONDS is `900`, or `900,compile=3600,save=1800`: the first number holds for the phases that are not named.
0 turns the alarm off. This module needs only the standard library.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

PHASES = ("start", "compile", "data", "step", "save")
# What heartbeats say, by phase; everything else is part of a step.
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
                raise ValueError(f"{phase!r} is no phase; use {', '.join(PHASES)}")
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
        """Return the limit while a rank does what its heartbeat says; infinity if it has none."""
        seconds = self.by_phase.get(_PHASE_OF.get(doing, "step"), self.general)
        return seconds or math.inf

    def plus(self, grace: float) -> "StallLimits":
        """Return limits that are longer by `grace` seconds, where there are any."""
        longer = {phase: seconds + grace if seconds else 0.0 for phase, seconds in self.by_phase.items()}
        return StallLimits(self.general + grace if self.general else 0.0, longer)

    def __bool__(self) -> bool:
        return bool(self.general or any(self.by_phase.values()))
