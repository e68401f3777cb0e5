"""The results of `karat eval --on`, `--labels` and `--corrupt`, all runs in one table."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from karat_scale.analysis.figures import new_figure
from karat_scale.analysis.result import NothingToShowError, Result, Table
from karat_scale.analysis.trained_run import TrainedRun
from karat_scale.evaluation.kept import SEVERITIES, Evaluation, read_evaluations

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
            if one.unmatched:
                what = f"{len(one.unmatched)} classes that the run does not have and their {one.left_out} images"
                result.notes.append(f"{label} on {one.name}: {what} are left out")
    return result


def _row(label: str, one: Evaluation) -> list[object]:
    step = f"{one.checkpoint}, {one.weights}"
    return [one.name, label, one.top1, one.top5, one.loss, one.images, f"{one.among} of {one.classes}", step]


def _add_corruptions(result: Result, name: str, of_runs: Corrupted) -> None:
    kinds = list(dict.fromkeys(kind for corruptions in of_runs.values() for kind in corruptions))
    result.figures[f"corruptions_{name}"] = (
        _draw(kinds, of_runs),
        f"{name}: left, top-1 by severity, the mean over corruptions; right, by corruption, the mean over severities.",
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


def _draw(kinds: list[str], of_runs: Corrupted) -> Figure:
    figure = new_figure(10, 3.6)
    by_severity, by_kind = figure.subplots(1, 2, width_ratios=(1, 1.8))
    width = 0.8 / len(of_runs)
    for number, (label, corruptions) in enumerate(of_runs.items()):
        shown = label.replace("$", r"\$")
        means = [_mean([by.get(severity) for by in corruptions.values()]) for severity in SEVERITIES]
        by_severity.plot(SEVERITIES, means, marker="o", label=shown)
        own = [_mean([*corruptions.get(kind, {}).values()]) for kind in kinds]
        by_kind.bar(np.arange(len(kinds)) + (number + 0.5) * width - 0.4, own, width, label=shown)
    by_severity.set(xlabel="severity", ylabel="top-1, %", xticks=SEVERITIES, ylim=(0, None))
    names = [kind.replace("_", " ") for kind in kinds]
    by_kind.set_xticks(range(len(kinds)), names, rotation=55, ha="right", rotation_mode="anchor", fontsize=7.5)
    by_kind.set(ylim=(0, None))
    if len(of_runs) > 1:
        by_severity.legend()
    return figure


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")
