"""Groups of runs that differ by their seed alone: what separates two groups, and the curves of each.

A curve is a score over steps, samples or hours: the mean of a group, and its spread as a band.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from karat_scale.commands.compare.finished import SCORES, Budget, FinishedRun
from karat_scale.commands.figures import COLOURS, new_figure, rendered
from karat_scale.foundation.console import printable
from karat_scale.recipe import RunRecipe
from karat_scale.recipe.base import Effect
from karat_scale.recipe.loading import effects, flatten

_MOST_KEYS = 3  # in a label
_SEED = re.compile(r"[-_.]?seed[-_=]?\d+$")  # at the end of a directory's name
_SAME_RESULT = (Effect.NOTHING, Effect.SPEED)
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
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the runs."""
        return tuple(run.seed for run in self.runs)

    @property
    def budget(self) -> Budget:
        """The budget, which is the same in all runs of a group."""
        return self.runs[0].budget

    def by_seed(self, measure: str) -> dict[int, float]:
        """Return a figure of each run that has it."""
        return {run.seed: run.values[measure] for run in self.runs if measure in run.values}


def group_runs(runs: Sequence[FinishedRun]) -> tuple[list[Group], list[str]]:
    """Return the groups in the order of their first runs, and a line for each run that repeats another's seed.

    Runs with one recipe but another budget, such as another `train.max_steps` or other data, are other groups.
    """
    found: dict[str, list[FinishedRun]] = {}
    repeated = []
    for run in runs:
        members = found.setdefault(json.dumps([separating(run.recipe), run.budget]), [])
        twin = next((member for member in members if member.seed == run.seed), None)
        if twin is None:
            members.append(run)
        else:
            repeated.append(f"{run.path}: has the recipe and the seed of {twin.path}; it says nothing new about seeds")
    ordered = [tuple(sorted(members, key=lambda run: run.seed)) for members in found.values()]
    groups = [Group("", members, separating(members[0].recipe)) for members in ordered]
    return [replace(group, label=label) for group, label in zip(groups, _labels(groups), strict=True)], repeated


def separating(recipe: RunRecipe) -> dict[str, Any]:
    """Return the keys of a recipe that put runs into different groups."""
    known = effects(type(recipe))
    return {
        key: value for key, value in flatten(recipe).items() if key != "run.seed" and known[key] not in _SAME_RESULT
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
    """Return a name for each group: the first that differs in all groups, of those that its first run offers."""
    keys = dict.fromkeys(key for group in groups for key in differing_settings(groups[0], group))
    names = [group.runs[0].recipe.run.name for group in groups]
    settings = [", ".join(f"{key}={setting_text(group.settings.get(key))}" for key in keys) for group in groups]
    offers = [names]
    if len(keys) <= _MOST_KEYS:
        named = [f"{name} ({text})" for name, text in zip(names, settings, strict=True)]
        offers.append(named if len(set(names)) > 1 else settings)
    offers.append([_SEED.sub("", printable(group.runs[0].path.resolve().name)) for group in groups])
    offers.append([f"{name} #{number}" for number, name in enumerate(names, 1)])
    return next(offer for offer in offers if len(set(offer)) == len(offer))


def setting_text(value: Any) -> str:
    """Return the value of a key as a recipe has it."""
    return value if isinstance(value, str) else json.dumps(value)


def changes_text(changes: Mapping[str, tuple[Any, Any]], most: int | None = None) -> str:
    """Return keys with both values in one line, at most `most` of them."""
    parts = [f"{key}: {setting_text(old)} -> {setting_text(new)}" for key, (old, new) in changes.items()]
    shown = parts[:most]
    rest = len(parts) - len(shown)
    return "; ".join([*shown, f"{rest} more"] if rest else shown)


AXES = ("steps", "samples", "hours")
_STYLES = ("-", "--", ":")  # tell groups apart whose colours are the same
_LONGEST = 60  # characters of a label in a legend
Array = npt.NDArray[np.float64]


def draw_curves(groups: Sequence[Group], score: str) -> dict[str, bytes]:
    """Return a PNG for each axis. A group whose runs share no range of steps is not in it."""
    pictures = {}
    for axis in AXES:
        figure = new_figure(6, 3.6 + 0.2 * len(groups))
        axes = figure.subplots()
        for number, group in enumerate(groups):
            if (band := mean_and_spread(group, score, axis)) is None:
                continue
            x, mean, deviation = band
            label = f"{group.label[:_LONGEST]}, n = {len(group.runs)}".replace("$", r"\$")
            style = _STYLES[number // len(COLOURS) % len(_STYLES)]
            (line,) = axes.plot(x, mean, style, marker="o", markersize=3, label=label)
            axes.fill_between(x, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(xlabel=axis, ylabel=SCORES[score].title)
        if axes.lines:
            figure.legend(loc="outside lower center")
        pictures[axis] = rendered(figure)
    return pictures


def mean_and_spread(group: Group, score: str, axis: str) -> tuple[Array, Array, Array] | None:
    """Return x, mean and standard deviation (0 of a single run); None if the runs share no range of steps.

    Runs are compared at equal steps, over all steps at which one of them was evaluated; a run that was not is
    interpolated. Over hours, x is the mean of the runs' hours at those steps.
    """
    curves = [curve for run in group.runs if len(curve := _curve(run, score))]
    if not curves:
        return None
    low, high = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
    steps = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    steps = steps[(steps >= low) & (steps <= high)]
    if not len(steps):
        return None
    column = AXES.index(axis)
    x = np.mean([np.interp(steps, curve[:, 0], curve[:, column]) for curve in curves], axis=0)
    values = np.array([np.interp(steps, curve[:, 0], curve[:, -1]) for curve in curves])
    deviation = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(steps))
    return x, values.mean(axis=0), deviation


def _curve(run: FinishedRun, score: str) -> Array:
    """Return steps, samples, hours and score of each evaluation that has this score, [n, 4]."""
    rows = [(p.step, p.samples, p.hours, p.scores[score]) for p in run.curve if score in p.scores]
    return np.array(rows, np.float64).reshape(-1, 4)
