"""Find slow ranks. Ranks train in step: one slow rank makes all others wait, so whole steps take equally long on each.

Only a rank's own time differs: waiting for its data, and its forward pass, in which it waits for no other rank.
"""

import statistics
from collections.abc import Sequence

from karat_scale.engine.heartbeat import Sign

# A factor on the median of the other ranks, and the least extra seconds per step; a smaller excess is noise.
SLOW, LEAST_SECONDS = 1.5, 0.01


def slow_ranks(signs: Sequence[Sign]) -> list[str]:
    """Yield a line for each rank whose own time per step is far above that of the others."""
    return [line for sign, line in _judged(signs) if line]


class Stragglers:
    """Reports each rank once that is slow in two reports in a row, since one may be chance."""

    def __init__(self) -> None:
        self._reported: dict[int, float] = {}
        self._slow_before: set[int] = set()
        self._reported_slow: set[int] = set()

    def look(self, signs: Sequence[Sign]) -> list[str]:
        """Add the ranks' heartbeats; return lines about ranks that are slow now."""
        lines = []
        for sign, line in _judged(signs):
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


def _judged(signs: Sequence[Sign]) -> list[tuple[Sign, str | None]]:
    known = [sign for sign in signs if sign.own_seconds > 0]
    if len(known) < 2:
        return []
    return [(sign, _line(sign, statistics.median(o.own_seconds for o in known if o is not sign))) for sign in known]


def _line(sign: Sign, others: float) -> str | None:
    if sign.own_seconds < SLOW * others or sign.own_seconds - others < LEAST_SECONDS:
        return None
    return (
        f"rank {sign.rank} on {sign.host} takes {sign.own_seconds:.3g} s of its own per step (data and forward pass), "
        f"{sign.own_seconds / others:.1f} times the others"
    )
