"""The statistics of a comparison: each group's spread over seeds, and its differences from the first group.

Differences are paired by seed, and come with what may be said of them; all as tables and as plain data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from karat_scale.commands.compare.finished import MEASURES, SCORES, FinishedRun
from karat_scale.commands.compare.grouping import (
    Group,
    budget_differences,
    changes_text,
    differing_settings,
    group_runs,
)
from karat_scale.foundation.errors import UserError

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


class Table(NamedTuple):
    """A table of text; the columns in `texts` do not hold figures."""

    title: str
    header: tuple[str, ...]
    rows: list[list[str]]
    texts: tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """A group against the first one.

    Attributes:
        settings: the keys in which they differ, with both values.
        budgets: a line for each part of the budget in which they differ.
    """

    group: Group
    settings: dict[str, tuple[Any, Any]]
    budgets: list[str]
    difference: Difference

    @property
    def verdict(self) -> str:
        """What may be said of the difference."""
        verdict = self.difference.verdict
        return f"{verdict}, but the budgets differ" if self.difference.is_shown and self.budgets else verdict


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, compared by the last value of one score."""

    score: str
    groups: list[Group]
    pairs: list[Pair]

    @property
    def measure(self) -> str:
        """What the pairs are compared by."""
        return f"last_{self.score}"

    @property
    def warnings(self) -> list[str]:
        """A line for each group whose budget is not the first one's."""
        first = self.groups[0].label
        return [f"{first} and {pair.group.label}: {'; '.join(pair.budgets)}" for pair in self.pairs if pair.budgets]

    def tables(self, keys: int | None = None) -> list[Table]:
        """Return the tables, with at most `keys` of the differing keys of a pair."""
        return [self._groups(), *([self._differences(keys)] if self.pairs else [])]

    def _groups(self) -> Table:
        rows = []
        for name, (title, digits) in MEASURES.items():
            head = title
            for group in self.groups:
                if figures := group.by_seed(name):
                    one = spread(list(figures.values()))
                    if title.endswith("%") and one.low is not None and one.high is not None:
                        one = replace(one, low=max(one.low, 0.0), high=min(one.high, 100.0))
                    cells = _spread_cells(one, digits)
                    rows.append([head, group.label, ", ".join(map(str, figures)), *cells])
                    head = ""
        return Table("Runs over seeds", ("", "group", "seeds", "mean", "sd", "95 % interval"), rows, (0, 1, 2))

    def _differences(self, keys: int | None) -> Table:
        title, digits = MEASURES[self.measure]
        rows = []
        for pair in self.pairs:
            one = pair.difference
            seeds = ", ".join(map(str, one.seeds)) or "none"
            figures = [_signed(one.mean, digits), _interval(one.low, one.high, digits)]
            chances = [_chance(one.p), _chance(one.adjusted)]
            changes = changes_text(pair.settings, keys) or "none"
            rows.append([pair.group.label, seeds, *figures, *chances, pair.verdict, changes])
        header = ("group", "seeds", "difference", "95 % interval", "p", "p (Holm)", "verdict", "keys that differ")
        title = f"Difference from {self.groups[0].label} in {title}, paired by seed"
        return Table(title, header, rows, (0, 1, 6, 7))

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "measure": self.measure,
            "groups": [
                {
                    "label": group.label,
                    "budget": group.budget._asdict(),
                    "runs": [{"path": str(run.path), "seed": run.seed, **run.values} for run in group.runs],
                    "measures": _spreads(group),
                }
                for group in self.groups
            ],
            "differences": [
                {
                    "group": pair.group.label,
                    "first": self.groups[0].label,
                    "keys": {key: list(values) for key, values in pair.settings.items()},
                    "budgets": pair.budgets,
                    **asdict(pair.difference),
                    "verdict": pair.verdict,
                }
                for pair in self.pairs
            ],
        }


def compare_groups(runs: Sequence[FinishedRun], score: str | None) -> tuple[Comparison, list[str]]:
    """Compare at least one run; returns the comparison, and a line for each run that repeats another's seed.

    Raises:
        UserError: the runs are of different commands, or do not have this score.
    """
    kinds = {run.scores: run for run in runs}
    if len(kinds) > 1:
        one, other = (run.path for run in list(kinds.values())[:2])
        raise UserError(f"{one} and {other}: one is a run of karat train, one of karat detect; compare them apart")
    scores = runs[0].scores
    if score is not None and score not in scores:
        raise UserError(f"--metric {score}: these runs have {', '.join(scores)}; choose one of them")
    score = score or scores[0]
    groups, repeated = group_runs(runs)
    first, *others = groups
    measure = f"last_{score}"
    if not any(group.by_seed(measure) for group in groups):
        raise UserError(f"--metric {score}: no run has a finite {SCORES[score].title} in its last evaluation")
    differences = compare(first.by_seed(measure), [other.by_seed(measure) for other in others])
    pairs = [
        Pair(other, differing_settings(first, other), budget_differences(first, other), difference)
        for other, difference in zip(others, differences, strict=True)
    ]
    return Comparison(score, groups, pairs), repeated


def _spreads(group: Group) -> dict[str, Any]:
    figures = {name: list(group.by_seed(name).values()) for name in MEASURES}
    return {name: asdict(spread(values)) for name, values in figures.items() if values}


def _spread_cells(one: Spread, digits: int) -> list[str]:
    deviation = "" if one.deviation is None else f"{one.deviation:,.{digits}f}"
    return [f"{one.mean:,.{digits}f}", deviation, _interval(one.low, one.high, digits)]


def _interval(low: float | None, high: float | None, digits: int) -> str:
    return "" if low is None or high is None else f"{low:,.{digits}f} to {high:,.{digits}f}"


def _signed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:+,.{digits}f}"


def _chance(p: float | None) -> str:
    if p is None:
        return ""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"
