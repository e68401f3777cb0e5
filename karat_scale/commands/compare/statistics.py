"""Mean and spread over seeds, paired differences, and what may be said of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

LEVEL = 0.95
_SAME = 1e-9  # differences of figures with a few decimal places are equal within this


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (of a sample) and t interval of the mean; of one value there is only the mean."""

    count: int
    mean: float
    deviation: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference:
    """Another group minus the first one, paired by seed.

    Attributes:
        seeds: those that both groups have.
        p: of the two-sided paired t-test.
        adjusted: p after Holm's correction for all groups that are compared with the first.
        verdict: what may be said.
        is_shown: whether the runs support that there is a difference.
    """

    seeds: tuple[int, ...]
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    adjusted: float | None = None
    verdict: str = ""
    is_shown: bool = False


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of at least one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Spread(len(values), mean)
    error = stats.sem(values)
    margin = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * error)
    return Spread(len(values), mean, float(np.std(values, ddof=1)), mean - margin, mean + margin)


def compare(first: Mapping[int, float], others: Sequence[Mapping[int, float]]) -> list[Difference]:
    """Compare each other group with the first one. Groups are figures by seed."""
    found = [_difference(first, other) for other in others]
    adjusted = iter(holm([one.p for one in found if one.p is not None]))
    return [one if one.p is None else _judged(one, next(adjusted)) for one in found]


def holm(chances: Sequence[float]) -> list[float]:
    """Return p-values after Holm's step-down correction, in the given order."""
    adjusted, largest = [0.0] * len(chances), 0.0
    for rank, number in enumerate(np.argsort(chances, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(chances) - rank) * chances[number]))
        adjusted[number] = largest
    return adjusted


def _difference(first: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    seeds = tuple(sorted(first.keys() & other.keys()))
    ours, theirs = ([group[seed] for seed in seeds] for group in (first, other))
    changes = np.subtract(theirs, ours)
    mean = float(changes.mean()) if seeds else None
    if len(seeds) < 2:
        return Difference(seeds, mean, verdict=_too_few(seeds, first, other))
    if np.ptp(changes) <= _SAME:
        is_zero = abs(changes[0]) <= _SAME
        return Difference(seeds, mean, verdict="not shown" if is_zero else "no spread over seeds: no statement")
    test = stats.ttest_rel(theirs, ours)
    interval = test.confidence_interval(LEVEL)
    return Difference(seeds, mean, float(interval.low), float(interval.high), float(test.pvalue))


def _too_few(seeds: tuple[int, ...], first: Mapping[int, float], other: Mapping[int, float]) -> str:
    if len(first) == len(other) == 1:
        return "one run each: no statement"
    return f"{'one common seed' if seeds else 'no common seed'}: no statement"


def _judged(difference: Difference, adjusted: float) -> Difference:
    low, high = difference.low or 0.0, difference.high or 0.0
    if low <= 0 <= high:
        return replace(difference, adjusted=adjusted, verdict="not shown")
    if adjusted >= 1 - LEVEL:
        return replace(difference, adjusted=adjusted, verdict="not shown after Holm's correction")
    return replace(difference, adjusted=adjusted, verdict="higher" if low > 0 else "lower", is_shown=True)
