"""Which ranks are slow. Ranks train in step: one that is slow makes all wait, so whole steps last alike on each.

What differs is a rank's own time: waiting for its data and its forward pass, in which it waits for no other.
"""

import statistics
from collections.abc import Sequence

from karat_scale.cluster.heartbeat import Sign

# Times the median of the other ranks; and so many seconds a step more, below which it is noise.
SLOW, LEAST_SECONDS = 1.5, 0.01


def slow_ranks(signs: Sequence[Sign]) -> list[str]:
    """A line for each rank whose own time a step is far above that of the others."""
    return [line for sign, line in _judged(signs) if line]


class Stragglers:
    """Tells once of each rank that is slow in two reports in a row: one may be chance."""

    def __init__(self) -> None:
        self._reported: dict[int, float] = {}
        self._slow_before: set[int] = set()
        self._told: set[int] = set()

    def look(self, signs: Sequence[Sign]) -> list[str]:
        """Take in the ranks' signs; lines about ranks that have turned out slow."""
        lines = []
        for sign, line in _judged(signs):
            if self._reported.get(sign.rank) == sign.own_seconds:
                continue
            self._reported[sign.rank] = sign.own_seconds
            if line is None:
                self._slow_before.discard(sign.rank)
                continue
            if sign.rank in self._slow_before and sign.rank not in self._told:
                self._told.add(sign.rank)
                lines.append(line)
            self._slow_before.add(sign.rank)
        return lines


def _judged(signs: Sequence[Sign]) -> list[tuple[Sign, str | None]]:
    known = [sign for sign in signs if sign.own_seconds > 0]
    if len(known) < 2:
        return []
    return [(sign, _line(sign, statistics.median(o.own_seconds for o in known if o is not sign))) for sign in known]


def _line(sign: Sign, others: float) -> str | None:
    if sign.own_seconds < SLOW * others or sign.own_seconds - others < LEAST_SECONDS:
        return None
    return (
        f"rank {sign.rank} on {sign.host} takes {sign.own_seconds:.3g} s of its own a step (data and forward pass), "
        f"{sign.own_seconds / others:.1f} times the others"
    )
