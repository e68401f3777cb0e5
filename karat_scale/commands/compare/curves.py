"""Curves of a score over steps, samples and hours: the mean of each group, and its spread as a band."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from karat_scale.commands.analyze.figures import COLOURS, new_figure, rendered
from karat_scale.commands.compare.finished import SCORES, FinishedRun
from karat_scale.commands.compare.grouping import Group

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
