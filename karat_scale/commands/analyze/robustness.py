"""The results of `karat eval --on`, `--labels` and `--corrupt`, all runs in one table."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from karat_scale.commands.analyze.output import new_figure
from karat_scale.commands.analyze.result import NothingToShowError, Result, Table
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.commands.evaluate.predictions import SEVERITIES, Evaluation, read_evaluations

Corrupted = Mapping[str, Mapping[str, Mapping[int, float]]]


def analyze_robustness(runs: Mapping[str, TrainedRun]) -> Result:
    """Compare the runs on the other test sets on which they were evaluated.

    Raises:
        NothingToShowError: none was.
        UserError: the file of an evaluation is damaged.
    """
    found = {label: read_evaluations(run.path) for label, run in runs.items()}
    if not any(found.values()):
        raise NothingToShowError(
            "not measured; `karat eval RUN --on DIR` evaluates on another test set, and `--corrupt` on corrupted images"
        )
    result = Result()
    rows = [_row(label, one) for label, evaluations in found.items() for one in evaluations]
    columns = ["test set", "run", "top-1, %", "top-5, %", "loss", "images", "among classes", "checkpoint"]
    result.tables.append(Table("Other test sets", columns, sorted(rows, key=lambda row: (str(row[0]), str(row[1])))))
    result.numbers = {label: [one.model_dump() for one in evaluations] for label, evaluations in found.items()}
    for name in sorted({one.name for evaluations in found.values() for one in evaluations if one.corruptions}):
        of_runs = {
            label: one.corruptions
            for label, own in found.items()
            for one in own
            if one.name == name and one.corruptions
        }
        _add_corruptions(result, name, of_runs)
    for label, evaluations in found.items():
        for one in evaluations:
            if one.corruptions and one.top1 is None:
                result.notes.append(f"{label} on {one.name}: {one.text}; evaluate the others for a top-1")
            if one.unmatched:
                what = f"{len(one.unmatched)} classes that the run does not have and their {one.left_out} images"
                result.notes.append(f"{label} on {one.name}: {what} are left out")
    return result


def _row(label: str, one: Evaluation) -> list[object]:
    step = f"{one.checkpoint}, {one.weights}"
    return [one.name, label, one.top1, one.top5, one.loss, one.images, f"{one.among} of {one.classes}", step]


def _add_corruptions(result: Result, name: str, of_runs: Corrupted) -> None:
    kinds = list(dict.fromkeys(kind for corruptions in of_runs.values() for kind in corruptions))
    if shared := _shared(of_runs):
        result.figures[f"severities_{name}"] = (
            _draw_severities(shared),
            f"{name}: accuracy by severity, the mean over corruptions.",
        )
        result.figures[f"corruptions_{name}"] = (
            _draw_kinds(shared),
            f"{name}: accuracy by corruption, the mean over severities.",
        )
    for label, corruptions in of_runs.items():
        rows: list[list[object]] = [
            [kind.replace("_", " "), *(corruptions[kind].get(severity) for severity in SEVERITIES)]
            for kind in kinds
            if kind in corruptions
        ]
        of = f" of {label}" if len(of_runs) > 1 else ""
        columns = ["corruption", *(f"severity {severity}" for severity in SEVERITIES)]
        result.tables.append(Table(f"{name}: top-1 in percent{of}", columns, rows))


def _shared(of_runs: Corrupted) -> Corrupted:
    """Return what all runs have, so that their means are over the same corruptions; empty if that is nothing."""
    first, *others = of_runs.values()
    cells = [(kind, s) for kind in first for s in first[kind] if all(s in other.get(kind, {}) for other in others)]
    shared: dict[str, dict[str, dict[int, float]]] = {}
    for label, own in of_runs.items():
        for kind, severity in cells:
            shared.setdefault(label, {}).setdefault(kind, {})[severity] = own[kind][severity]
    return shared


def _draw_severities(of_runs: Corrupted) -> Figure:
    figure = new_figure(5, 3 + 0.16 * len(of_runs))
    axes = figure.subplots()
    for label, corruptions in of_runs.items():
        done = [severity for severity in SEVERITIES if any(severity in by for by in corruptions.values())]
        means = [_mean([by[severity] for by in corruptions.values() if severity in by]) for severity in done]
        axes.plot(done, means, marker="o", label=label.replace("$", r"\$"))
    axes.set(xlabel="severity", ylabel="top-1, %", xticks=SEVERITIES, ylim=(0, 1.08 * axes.get_ylim()[1]))
    if len(of_runs) > 1:
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _draw_kinds(of_runs: Corrupted) -> Figure:
    kinds = list(next(iter(of_runs.values())))
    figure = new_figure(6, 3.6 + 0.16 * len(of_runs))
    axes = figure.subplots()
    width = 0.8 / len(of_runs)
    for number, (label, corruptions) in enumerate(of_runs.items()):
        own = [_mean([*corruptions[kind].values()]) for kind in kinds]
        places = np.arange(len(kinds)) + (number + 0.5) * width - 0.4
        axes.bar(places, own, width, label=label.replace("$", r"\$"))
    names = [kind.replace("_", " ") for kind in kinds]
    axes.set_xticks(range(len(kinds)), names, rotation=55, ha="right", rotation_mode="anchor", fontsize=7.5)
    axes.set(ylabel="top-1, %", ylim=(0, None))
    if len(of_runs) > 1:
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
