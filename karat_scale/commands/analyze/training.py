"""The curves of training, all runs in one figure: losses, accuracy, learning rate, gradient norm and speed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from karat_scale.commands.analyze.figures import COLOURS, new_figure
from karat_scale.commands.analyze.history import History, Point, read_history
from karat_scale.commands.analyze.result import NothingToShowError, Result, Table
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.foundation.console import plural

_COURSE = {"lr": "learning rate", "grad_norm": "gradient norm", "images_per_second": "images a second"}
_STYLES = ("-", "--", ":", "-.")  # tell runs apart whose colours are the same


def analyze_training(runs: Mapping[str, TrainedRun]) -> Result:
    """Plot what `metrics.jsonl` of each run holds.

    Raises:
        NothingToShowError: none of the runs has logged anything.
    """
    histories = {label: read_history(run) for label, run in runs.items()}
    result = Result()
    for label, history in histories.items():
        if history.damaged_lines:
            what = plural(history.damaged_lines, "damaged line")
            result.notes.append(f"{label}: {what} of metrics.jsonl skipped")
    histories = {label: history for label, history in histories.items() if history.train or history.evaluations}
    if not histories:
        raise NothingToShowError("no run has logged a step yet")
    captions = {
        "loss": "Loss of training (thin; mixing and smoothing raise it) and of the validation split (with marks).",
        "accuracy": "Validation accuracy: top-1 (solid) and top-5 (faint).",
        **{name: f"{title[0].upper()}{title[1:]} in training." for name, title in _COURSE.items()},
    }
    result.figures = {name: (_draw(name, histories), caption) for name, caption in captions.items()}
    for number, (label, history) in enumerate(histories.items()):
        for name in ("samples", "loss", "lr", "grad_norm", "images_per_second"):
            result.arrays[f"train{number}_{name}"] = _column(history.train, name)
        for name in ("samples", "loss", "top1", "top5"):
            result.arrays[f"eval{number}_{name}"] = _column(history.evaluations, name)
        result.numbers[label] = {"arrays": number, "train": len(history.train), "eval": len(history.evaluations)}
    result.tables.append(_table(histories))
    return result


def _table(histories: Mapping[str, History]) -> Table:
    columns = ["run", "step", "images seen", "top-1, %", "top-5, %", "validation loss"]
    rows = [
        [label, int(point["step"]), int(np.nan_to_num(point["samples"])), point["top1"], point["top5"], point["loss"]]
        for label, history in histories.items()
        for point in history.evaluations
    ]
    return Table("Evaluations in training", columns, rows)


def _column(points: Sequence[Point], name: str) -> Any:
    return np.array([point[name] for point in points], np.float64)


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": _STYLES[number // len(COLOURS) % len(_STYLES)]}


def _draw(name: str, histories: Mapping[str, History]) -> Figure:
    figure = new_figure(5, 3 + 0.16 * len(histories))
    axes = figure.subplots()
    for number, (label, history) in enumerate(histories.items()):
        style = _style(number)
        marked = {"marker": "o", "markersize": 3.5, "linewidth": 1.8, **style}
        named: dict[str, Any] = {"label": label.replace("$", r"\$")}
        tested, trained = _column(history.evaluations, "samples"), _column(history.train, "samples")
        if name == "accuracy":
            axes.plot(tested, _column(history.evaluations, "top1"), **marked, **named)
            axes.plot(tested, _column(history.evaluations, "top5"), alpha=0.35, **marked)
        else:
            axes.plot(trained, _column(history.train, name), linewidth=1, **style, **named)
        if name == "loss":
            axes.plot(tested, _column(history.evaluations, "loss"), **marked)
    axes.set(xlabel="images seen", ylabel={"loss": "loss", "accuracy": "accuracy, %", **_COURSE}[name])
    if name in _COURSE:
        axes.set_ylim(0)
    axes.set_xlim(left=0)  # also of one point, which matplotlib shows in a window of its own
    if len(histories) > 1:
        figure.legend(loc="outside lower center", ncols=2)
    return figure
