"""The comparison of groups of runs that differ only by their seed, as tables and as plain data.

Each group has a spread over seeds, and differences from the first group. Differences are paired by seed, and come with
the keys in which the groups differ and with a verdict.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from karat_scale.commands.compare.finished import MEASURES, SCORES, Budget, FinishedRun
from karat_scale.foundation.console import plural, printable
from karat_scale.foundation.errors import UserError
from karat_scale.recipe import RunRecipe
from karat_scale.recipe.base import Effect, setting_text
from karat_scale.recipe.loading import effects, flatten

_MOST_KEYS = 3  # in a label
_SEED = re.compile(r"[-_.]?seed[-_=]?\d+$")  # at the end of a directory's name
_SAME_RESULT = (Effect.NOTHING, Effect.SPEED)
_PLACES = ("data.path", "resume.from")  # mostly other paths of the same data, or of a start with the same seed
_BUDGET_NAMES = {
    "steps": "steps",
    "epochs": "epochs",
    "train_images": "training images",
    "test_images": "test images",
    "classes": "classes",
    "classes_sha256": "names of the classes",
}


@dataclass(frozen=True)
class Group:
    """Runs of one recipe with different seeds.

    Attributes:
        label: a name that no other group has.
        settings: the keys of the recipe that may change the result, without the seed.
    """

    label: str
    runs: tuple[FinishedRun, ...]
    settings: Mapping[str, Any]

    @property
    def budget(self) -> Budget:
        """The budget, which is the same in all runs of a group."""
        return self.runs[0].budget

    def by_seed(self, measure: str) -> dict[int, float]:
        """Return a figure of each run that has it."""
        return {run.seed: run.values[measure] for run in self.runs if measure in run.values}


def group_runs(runs: Sequence[FinishedRun]) -> tuple[list[Group], list[str]]:
    """Return the groups in the order of their first runs, and a line for each run that repeats another's seed.

    Runs with the same recipe but another budget, such as another `train.max_steps` or other data, form other groups. If
    runs with the same recipe and seed differ in one of `_PLACES`, that key separates all runs.
    """
    alike: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        one = json.dumps([separating(run.recipe), run.budget, run.seed])
        alike.setdefault(one, []).append(flatten(run.recipe))
    also = [key for key in _PLACES if any(len({own[key] for own in several}) > 1 for several in alike.values())]
    found: dict[str, list[FinishedRun]] = {}
    repeated = []
    for run in runs:
        members = found.setdefault(json.dumps([separating(run.recipe, also), run.budget]), [])
        twin = next((member for member in members if member.seed == run.seed), None)
        if twin is None:
            members.append(run)
        else:
            repeated.append(f"{run.path}: has the recipe and the seed of {twin.path}; it says nothing new about seeds")
    ordered = [tuple(sorted(members, key=lambda run: run.seed)) for members in found.values()]
    groups = [Group("", members, separating(members[0].recipe, also)) for members in ordered]
    return [replace(group, label=label) for group, label in zip(groups, _labels(groups), strict=True)], repeated


def separating(recipe: RunRecipe, also: Collection[str] = ()) -> dict[str, Any]:
    """Return the keys of a recipe that put runs into different groups: those that change the model, and `also`."""
    known = effects(type(recipe))
    return {
        key: value
        for key, value in flatten(recipe).items()
        if key in also or (key != "run.seed" and known[key] not in _SAME_RESULT)
    }


def differing_settings(first: Group, other: Group) -> dict[str, tuple[Any, Any]]:
    """Return both values of each key in which two groups differ, in the order of the recipe."""
    keys = dict.fromkeys((*first.settings, *other.settings))
    pairs = {key: (first.settings.get(key), other.settings.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def budget_differences(first: Group, other: Group) -> list[str]:
    """Return a line for each part of the budget in which two groups differ."""
    lines = []
    for (field, ours), theirs in zip(first.budget._asdict().items(), other.budget, strict=True):
        if ours != theirs:
            values = "" if field == "classes_sha256" else f": {_number(ours)} and {_number(theirs)}"
            lines.append(f"{_BUDGET_NAMES[field]} differ{values}")
    return lines


def _number(value: Any) -> str:
    return "unknown" if value is None else f"{value:,}".removesuffix(".0")


def _labels(groups: Sequence[Group]) -> list[str]:
    """Return a name for each group: the first kind of name of its first run that differs in all groups."""
    keys = dict.fromkeys(key for group in groups for key in differing_settings(groups[0], group))
    names = [group.runs[0].recipe.run.name for group in groups]
    if len(groups) == len(groups[0].runs) == 1:
        return [printable(groups[0].runs[0].path.resolve().name)]
    settings = [", ".join(f"{key}={setting_text(group.settings.get(key))}" for key in keys) for group in groups]
    offers = [names]
    if len(keys) <= _MOST_KEYS:
        named = [f"{name} ({text})" for name, text in zip(names, settings, strict=True)]
        offers.append(named if len(set(names)) > 1 else settings)
    offers.append([_SEED.sub("", printable(group.runs[0].path.resolve().name)) for group in groups])
    offers.append([f"{name} #{number}" for number, name in enumerate(names, 1)])
    return next(offer for offer in offers if len(set(offer)) == len(offer))


def _seeds(numbers: Collection[int]) -> str:
    """Return the seeds of some runs as text, in which seed 0 does not look like none."""
    return f"{'seed' if len(numbers) == 1 else 'seeds'} {', '.join(map(str, numbers))}" if numbers else "none"


def changes_text(changes: Mapping[str, tuple[Any, Any]], most: int | None = None) -> str:
    """Return keys with both values in one line, at most `most` of them."""
    parts = [f"{key}: {setting_text(old)} -> {setting_text(new)}" for key, (old, new) in changes.items()]
    shown = parts[:most]
    rest = len(parts) - len(shown)
    return "; ".join([*shown, f"{rest} more"] if rest else shown)


LEVEL = 0.95
_SAME = 1e-9  # differences of figures with a few decimal places are equal within this


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (of a sample) and t interval of the mean; for one value there is only the mean."""

    count: int
    mean: float
    deviation: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass
class Difference:
    """Another group minus the first one, paired by seed.

    Attributes:
        seeds: the seeds that both groups have.
        p: the p-value of the two-sided paired t-test.
        adjusted: p after Holm's correction for all groups that are compared with the first.
        verdict: the statement that the runs support.
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
    margin = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))
    return Spread(len(values), mean, float(np.std(values, ddof=1)), mean - margin, mean + margin)


def compare(first: Mapping[int, float], others: Sequence[Mapping[int, float]]) -> list[Difference]:
    """Compare each other group with the first one. Groups are figures by seed."""
    found = [_difference(first, other) for other in others]
    tested = [one for one in found if one.p is not None]
    for one, adjusted in zip(tested, holm([one.p or 0.0 for one in tested]), strict=True):
        low, high = one.low or 0.0, one.high or 0.0
        one.adjusted, one.is_shown = adjusted, adjusted < 1 - LEVEL and not low <= 0 <= high
        not_shown = "not shown" if low <= 0 <= high else "not shown after Holm's correction"
        one.verdict = not_shown if not one.is_shown else "higher" if low > 0 else "lower"
    return found


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
        few = "one run each" if len(first) == len(other) == 1 else "one common seed" if seeds else "no common seed"
        return Difference(seeds, mean, verdict=f"{few}: no statement")
    if np.ptp(changes) <= _SAME:
        is_zero = abs(changes[0]) <= _SAME
        return Difference(seeds, mean, verdict="not shown" if is_zero else "no spread over seeds: no statement")
    test = stats.ttest_rel(theirs, ours)
    interval = test.confidence_interval(LEVEL)
    return Difference(seeds, mean, float(interval.low), float(interval.high), float(test.pvalue))


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
        """The verdict on the difference, with a remark if the budgets differ."""
        verdict = self.difference.verdict
        return f"{verdict}, but the budgets differ" if self.difference.is_shown and self.budgets else verdict


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, compared by the last value of one score; `match` names the measure that is about equal in all."""

    score: str
    groups: list[Group]
    pairs: list[Pair]
    match: str | None = None

    @property
    def measure(self) -> str:
        """The measure that the pairs are compared by."""
        return f"last_{self.score}"

    @property
    def warnings(self) -> list[str]:
        """A line for each group whose budget differs from the first one's."""
        first = self.groups[0].label
        return [f"{first} and {pair.group.label}: {'; '.join(pair.budgets)}" for pair in self.pairs if pair.budgets]

    @property
    def summary(self) -> list[str]:
        """Sentences: who leads by how much, whether that is beyond the noise, and what is not comparable."""
        title, digits = MEASURES[self.measure]
        figures = [(group, own) for group in self.groups if (own := group.by_seed(self.measure))]
        means = [(spread([*own.values()]).mean, group) for group, own in figures]
        means.sort(key=lambda one: one[0], reverse=self.score != "loss")
        unit = " %" if title.endswith("%") else ""
        lines = [f"{title.removesuffix(', %').capitalize()}: "]
        lines[0] += ", ".join(f"{group.label} {mean:,.{digits}f}{unit}" for mean, group in means) + "."
        if len(means) == 1:
            one = _shown(title, [*figures[0][1].values()])
            seeds = f"The 95 % interval over {one.count} seeds is {_interval(one.low, one.high, digits)}."
            return [*lines, seeds if one.count > 1 else "It is one run: the spread over seeds is unknown."]
        (top, best), (next_, second) = means[:2]
        lead = abs(top - next_)
        if lead <= _SAME:
            return [*lines, f"{best.label} and {second.label} are equal."]
        leads = f"{best.label} leads by {lead:,.{digits}f}{' points' if unit else ''}"
        theirs, ours = (group.by_seed(self.measure) for group in (second, best))
        (found,) = compare(theirs, [ours])
        if found.mean is not None and ours.keys() != theirs.keys():
            leads += f" ({found.mean:+,.{digits}f} over {plural(len(found.seeds), 'seed')} of both)"
        if found.p is None or found.mean is None:
            lines.append(f"{leads}; what another seed would change is unknown ({found.verdict.partition(':')[0]}).")
        else:
            pairs = len(means) * (len(means) - 1) // 2  # each of which might have been the first two
            is_shown = found.p * pairs < 1 - LEVEL and (found.mean > 0) == (top > next_)
            beyond = "more" if is_shown else "not more"
            interval = (
                f"95 % interval {_interval(found.low, found.high, digits)}, p {_chance(min(found.p * pairs, 1.0))}"
            )
            lines.append(f"{leads}, {beyond} than the spread over {len(found.seeds)} seeds explains ({interval}).")
        images = best.budget.test_images
        if images and images == second.budget.test_images and self.score.startswith("top"):
            error = 1.96 * sum(mean * (100 - mean) / images for mean in (top, next_)) ** 0.5
            beyond = "more" if lead > error else "not more"
            lines.append(f"That is {beyond} than the error of a test set of {images:,} images (+-{error:.{digits}f}).")
        if budget_differences(second, best):  # `warnings` has the values
            lines.append("Their budgets differ, which alone may be the reason.")
        if len(keys := differing_settings(second, best)) > 1:
            lines.append(f"Their recipes differ in {', '.join(keys)}: none alone is shown to be the reason.")
        return lines

    def tables(self, keys: int | None = None) -> list[Table]:
        """Return the tables, with at most `keys` of the differing keys of a pair.

        Columns that are empty for single runs, such as intervals over seeds, are left out.
        """
        tables = []
        for table in (self._groups(), *([self._differences(keys)] if self.pairs else [])):
            kept = [column for column in range(len(table.header)) if any(row[column] for row in table.rows)]
            header, *rows = ([line[column] for column in kept] for line in (table.header, *table.rows))
            texts = tuple(number for number, column in enumerate(kept) if column in table.texts)
            tables.append(Table(table.title, tuple(header), rows, texts))
        return tables

    def _groups(self) -> Table:
        rows = []
        is_always_right = all(0 < group.budget.classes <= 5 for group in self.groups)  # among the five first
        for name, (head, digits) in MEASURES.items():
            if is_always_right and name.endswith("top5") and not self.measure.endswith("top5"):
                continue
            for group in self.groups:
                if figures := group.by_seed(name):
                    one = _shown(MEASURES[name].title, [*figures.values()])
                    cells = [f"{one.mean:,.{digits}f}", "" if one.deviation is None else f"{one.deviation:,.{digits}f}"]
                    interval = _interval(one.low, one.high, digits)
                    rows.append([head, group.label, _seeds(figures), *cells, interval])
                    head = ""
        return Table("Runs over seeds", ("", "group", "seeds", "mean", "sd", "95 % interval"), rows, (0, 1, 2))

    def _differences(self, keys: int | None) -> Table:
        title, digits = MEASURES[self.measure]
        rows = []
        for pair in self.pairs:
            one = pair.difference
            figures = ["" if one.mean is None else f"{one.mean:+,.{digits}f}", _interval(one.low, one.high, digits)]
            figures += [_chance(one.p), _chance(one.adjusted)]
            said = [pair.verdict, changes_text(pair.settings, keys) or "none"]
            rows.append([pair.group.label, _seeds(one.seeds), *figures, *said])
        header = ("group", "seeds", "difference", "95 % interval", "p", "p (Holm)", "verdict", "keys that differ")
        title = f"Difference from {self.groups[0].label} in {title}, paired by seed"
        if self.match:
            title += f", at equal {MEASURES[self.match].title} (within {100 * MATCHED:.0f} %)"
        return Table(title, header, rows, (0, 1, 6, 7))

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        groups, differences = [], []
        for group in self.groups:
            found = {name: [*group.by_seed(name).values()] for name in MEASURES}
            measures = {name: asdict(spread(values)) for name, values in found.items() if values}
            runs = [{"path": str(run.path), "seed": run.seed, **run.values} for run in group.runs]
            budget = group.budget._asdict()
            groups.append({"label": group.label, "budget": budget, "runs": runs, "measures": measures})
        for pair in self.pairs:
            names = {"group": pair.group.label, "first": self.groups[0].label}
            keys = {key: list(values) for key, values in pair.settings.items()}
            own = {**asdict(pair.difference), "verdict": pair.verdict}
            differences.append({**names, "keys": keys, "budgets": pair.budgets, **own})
        return {"measure": self.measure, "match": self.match, "groups": groups, "differences": differences}


MATCHED = 0.05  # the largest difference of groups that match, as a share of the first one's


def match_groups(groups: Sequence[Group], measure: str) -> tuple[list[Group], list[str]]:
    """Return the groups whose mean of a measure is near the first one's, and a line for each of the others.

    Raises:
        UserError: the first group does not have the measure.
    """
    first, matched, lines = groups[0], [groups[0]], []
    title, digits = MEASURES[measure]
    figures = {group.label: list(group.by_seed(measure).values()) for group in groups}
    means = {label: spread(values).mean for label, values in figures.items() if values}
    if first.label not in means:
        raise UserError(f"--match: {first.runs[0].path} has no {title}; compare with another run")
    machines = {run.machine for run in first.runs}
    for group in groups[1:]:
        if measure == "step_seconds" and not all(run.machine in machines for run in group.runs):
            lines.append(f"{group.label}: it ran on another machine than {first.label}, so steps cannot be matched")
        elif group.label not in means:
            lines.append(f"{group.label}: it has no {title}")
        elif abs(change := means[group.label] / means[first.label] - 1) > MATCHED:
            against = f"{100 * change:+.1f} % against {first.label}"
            lines.append(f"{group.label}: {means[group.label]:,.{digits}f} {title}, {against}")
        else:
            matched.append(group)
    return matched, lines


def compare_groups(
    runs: Sequence[FinishedRun], score: str | None, match: str | None = None
) -> tuple[Comparison, list[str]]:
    """Compare at least one run; returns the comparison, and a line for each run or group that is left out of it.

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
    groups, left_out = group_runs(runs)
    if match:
        groups, unmatched = match_groups(groups, match)
        left_out += unmatched
    first, *others = groups
    measure = f"last_{score}"
    if not any(group.by_seed(measure) for group in groups):
        raise UserError(f"--metric {score}: no run has a finite {SCORES[score].title} in its last evaluation")
    differences = compare(first.by_seed(measure), [other.by_seed(measure) for other in others])
    pairs = [
        Pair(other, differing_settings(first, other), budget_differences(first, other), difference)
        for other, difference in zip(others, differences, strict=True)
    ]
    return Comparison(score, groups, pairs, match), left_out


def _shown(title: str, values: Sequence[float]) -> Spread:
    """Return the spread of a measure with this title. An interval of percentages is cut at 0 and 100."""
    one = spread(values)
    if "%" in title and one.low is not None and one.high is not None:
        one = replace(one, low=max(one.low, 0.0), high=min(one.high, 100.0))
    return one


def _interval(low: float | None, high: float | None, digits: int) -> str:
    return "" if low is None or high is None else f"{low:,.{digits}f} to {high:,.{digits}f}"


def _chance(p: float | None) -> str:
    if p is None:
        return ""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"
