"""Results from the runs' own files: the curves of training, the scores, and the results on other test sets.

The curves are losses, accuracy, learning rate, gradient norm and speed of `metrics.jsonl`, of all runs in one figure.
The results are those of `karat eval --on`, `--labels` and `--corrupt`, of all runs in one table. For a converted model,
tables also show how closely its new attention reproduces the original's output.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from karat_scale.commands.analyze.result import NothingToShowError, Result, Settings, Table
from karat_scale.commands.analyze.summary import accuracy_sentence
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.commands.evaluate.predictions import SEVERITIES, read_evaluations
from karat_scale.commands.figures import COLOURS, layered, new_axes, new_figure
from karat_scale.engine.reporting.goodput import wall_time
from karat_scale.engine.reporting.progress import read_events
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import UserError
from karat_scale.models.factory import parameter_count
from karat_scale.recipe.attention import describe_attention
from karat_scale.training.tasks.classification.conversion import mean_error, read_report, read_survey

Point = dict[str, float]
_FIGURES = (
    *("step", "samples", "loss", "lr", "grad_norm", "images_per_second", "beyond_reach", "top1", "top5", "time"),
    *("total_steps", "images"),
)


@dataclass
class History:
    """The events of training and of evaluation by step, as plain numbers; undefined ones are nan."""

    train: list[Point] = field(default_factory=list)
    evaluations: list[Point] = field(default_factory=list)
    damaged_lines: int = 0
    weights: str = ""
    """The evaluated weights: raw or ema; empty in the files of an early version."""
    changes: list[str] = field(default_factory=list)
    """The changes that resumed runs made in the recipe."""
    has_ended: bool = False
    """Whether the last start has logged its end; else the summary is that of an earlier start."""


def read_history(run: TrainedRun) -> History:
    """Read the run's events. A missing file has none."""
    history = History()
    damaged: list[str] = []
    for event in read_events(run.directory.metrics_file, damaged.append):
        kind = event.get("event")
        if kind in ("start", "train", "end"):
            history.has_ended = kind == "end"
        if kind == "start" and event.get("anew"):
            for earlier in (history.train, history.evaluations, history.changes):
                earlier.clear()
        if kind not in ("train", "eval", "resume"):
            continue
        if kind == "resume" and event.get("changed"):
            history.changes.append(f"after step {event.get('step')}: {event['changed']}")
        if kind == "eval":
            history.weights = str(event.get("weights", ""))
        given = {name: event.get(name) for name in _FIGURES}
        point = {name: float(x) if isinstance(x, int | float) else math.nan for name, x in given.items()}
        if math.isnan(point["step"]):
            damaged.append(str(event))
            continue
        own = {"train": history.train, "eval": history.evaluations}.get(kind)
        if own is None or (own and point["step"] <= own[-1]["step"]):  # the run went back to this or the step before
            for points in (history.train, history.evaluations):
                points[:] = [one for one in points if one["step"] <= point["step"] - (kind != "resume")]
        if own is not None:
            own.append(point)
    history.damaged_lines = len(damaged)
    return history


def achieved(run: TrainedRun) -> tuple[str, dict[str, str], str]:
    """Return a run's score in one line, facts about the score and its cost by name, and a sentence about the score.

    The score is that of the analysed weights if they were evaluated in training, else the last one.
    """
    history, summary = read_history(run), run.directory.summary() or {}
    shown = history.evaluations[-1] if history.evaluations else None
    with suppress(UserError):  # no checkpoint
        shown = next((point for point in history.evaluations if point["step"] == run.step(run.chosen)), shown)
    whose = ""
    with suppress(UserError):
        whose = "" if history.weights in ("", run.weights_kind) else f" of the {history.weights} weights"
    score = f"{shown['top1']:.2f} % top-1{whose}" if shown else ""
    facts, sentence = {"evaluation": "none yet"}, "" if shown else "It has not been evaluated yet."
    if shown:
        five = f"top-5 {shown['top5']:.2f} %, " if shown["top5"] < 100 else ""  # as of a model with five classes
        step = f"{shown['step']:,.0f}{whose}"
        facts["evaluation"] = f"on {shown['images']:,.0f} images after step {step}: {five}loss {shown['loss']:.4f}"
        others = {"best": max(history.evaluations, key=lambda point: point["top1"]), "last": history.evaluations[-1]}
        facts |= {
            name: f"top-1 {other['top1']:.2f} % after step {other['step']:,.0f}"
            for name, other in others.items()
            if other["step"] != shown["step"]
        }
        if whose:
            sentence = f"In training, other weights were evaluated: {history.weights}."
        elif shown["images"] > 0:  # nan in the files of an early version
            chosen_of = len(history.evaluations) if "last" in facts and "best" not in facts else 1
            classes = run.recipe.model.num_classes
            sentence = accuracy_sentence(shown["top1"], int(shown["images"]), classes, chosen_of)
    goes_on = bool(history.train) and not history.has_ended
    last = int(history.train[-1]["step"]) if history.train else 0
    steps = last if goes_on else summary.get("steps") or last
    batch, images = run.recipe.train.global_batch, summary.get("train_images")
    facts["budget"] = f"{plural(steps, 'step')} of {batch:,} images"
    if isinstance(images, int) and images > 0:
        times = steps * batch / images
        shown_times = f"{times:,.0f}" if times >= 100 else f"{times:.3g}"
        facts["budget"] += f", {shown_times} times its {images:,} training images"
    facts["budget"] += f", seed {run.recipe.run.seed}"
    if history.changes:
        facts["recipe changed"] = "; ".join(history.changes)
    if spent := str(wall_time(read_events(run.directory.metrics_file))):
        facts["wall time"] = spent
    rate = summary.get("images_per_second")
    if isinstance(rate, int | float):
        facts["speed"] = f"{rate:,.0f} images a second on {summary.get('device', 'an unknown device')}"
    when = [point["time"] for point in (*history.train[-1:], *history.evaluations[-1:])]
    with suppress(ValueError, OverflowError):  # no date
        facts["date"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(max(when)))
    if summary.get("exit") != 0 or goes_on:
        reason = "" if goes_on else summary.get("reason")
        facts["outcome"] = f"not finished ({reason})" if reason else "not finished"
    return score, facts, sentence


def described(run: TrainedRun) -> dict[str, str]:
    """Return facts by name about a run's model, and which of its weights are analysed."""
    facts = {"attention": describe_attention(run.recipe.attention), "model": run.recipe.model.described}
    try:
        kept = len(run.in_order)
        facts["weights"] = (
            f"{run.weights_kind}, of step {run.step(run.chosen):,}; the weights of {plural(kept, 'step')} are kept"
        )
        facts["parameters"] = f"{parameter_count(run.model()):,}"
    except UserError as error:
        facts["weights"] = str(error)
    facts["directory"] = str(run.path)
    return facts


_COURSE = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "images_per_second": "images a second",
    "beyond_reach": "scores beyond the functions' reach,\nshare in the worst block",
}
# The number of evaluations, and the rise of their loss, from which the report says that images are learned by heart.
_FEWEST, _RISEN = 4, 1.1
_MARKED = {"marker": "o", "markersize": 3.5}
# For each figure its curves: the events, their value and the style. Its label tells the curves of one run apart.
_CURVES: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "loss": [("train", "loss", {"label": "training"}), ("evaluations", "loss", {**_MARKED, "label": "validation"})],
    "accuracy": [
        ("evaluations", "top1", {**_MARKED, "label": "top-1"}),
        ("evaluations", "top5", {**_MARKED, "label": "top-5", "alpha": 0.35}),
    ],
    **{name: [("train", name, {})] for name in _COURSE},
}


def analyze_training(runs: Mapping[str, TrainedRun]) -> Result:
    """Plot the values in each run's `metrics.jsonl`. A value without a curve of two points gets no figure.

    Raises:
        NothingToShowError: none of the runs has logged that much.
    """
    histories = {label: read_history(run) for label, run in runs.items()}
    result = Result()
    for label, history in histories.items():
        if history.damaged_lines:
            what = plural(history.damaged_lines, "damaged line")
            result.notes.append(f"{label}: {what} of metrics.jsonl skipped")
    histories = {label: history for label, history in histories.items() if history.train or history.evaluations}
    evaluations = [point for history in histories.values() for point in history.evaluations]
    has_five = any(point["top5"] < 100 for point in evaluations)  # not of a model with five classes
    beyond = [point["beyond_reach"] for history in histories.values() for point in history.train]
    captions = {
        "loss": "Loss of training (mixing and smoothing raise it) and of the validation split (with marks).",
        "accuracy": f"Validation accuracy: top-1{' and, faint, top-5' if has_five else ''}.",
        **{name: f"{title[0].upper()}{title[1:]} in training." for name, title in _COURSE.items()},
    }
    if 0 in beyond and not any(share > 0 for share in beyond):
        del captions["beyond_reach"]
        result.findings.append("No score that training looked at was beyond the functions' reach.")
    for name, caption in captions.items():
        curves = [curve for curve in _CURVES[name] if has_five or curve[1] != "top5"]
        if any(len(_points(history, *curve[:2])) > 1 for history in histories.values() for curve in curves):
            result.figures[name] = _draw(name, curves, histories), caption
    for number, (label, history) in enumerate(histories.items()):
        if said := _learned_by_heart(history):
            result.findings.append(f"{label}: {said}" if len(histories) > 1 else said)
        for name in ("samples", "loss", *_COURSE):
            result.arrays[f"train{number}_{name}"] = _column(history.train, name)
        for name in ("samples", "loss", "top1", "top5"):
            result.arrays[f"eval{number}_{name}"] = _column(history.evaluations, name)
        result.numbers[label] = {"arrays": number, "train": len(history.train), "eval": len(history.evaluations)}
    if evaluations:
        scores = {"top-1, %": "top1", **({"top-5, %": "top5"} if has_five else {}), "validation loss": "loss"}
        rows = [
            [label, *(int(np.nan_to_num(point[x])) for x in ("step", "samples")), *(point[x] for x in scores.values())]
            for label, history in histories.items()
            for point in history.evaluations
        ]
        result.tables.append(Table("Evaluations in training", ["run", "step", "images seen", *scores], rows))
    if not (result.figures or result.tables):
        raise NothingToShowError("no run has logged two steps or an evaluation yet")
    return result


def _learned_by_heart(history: History) -> str:
    """Return a sentence if the validation loss has risen while the training loss fell; else an empty text."""
    trained, tested = (_points(history, events, "loss") for events in ("train", "evaluations"))
    if len(tested) < _FEWEST or not len(trained):
        return ""
    (seen, least), (_, last) = tested[tested[:, 1].argmin()], tested[-1]
    then = trained[np.abs(trained[:, 0] - seen).argmin(), 1]
    if last < _RISEN * least or trained[-1, 1] >= then:
        return ""
    return (
        f"The validation loss was lowest after {seen:,.0f} images ({least:.2f}) and is {last:.2f} at the end, while "
        f"the training loss went from {then:.2f} to {trained[-1, 1]:.2f}: since then the model learns its training "
        "images by heart. More images, stronger augmentation or fewer steps help."
    )


def _column(points: Sequence[Point], name: str) -> Any:
    return np.array([point[name] for point in points], np.float64)


def _points(history: History, events: str, name: str) -> Any:
    """Return the defined points of a curve [n, 2]: the images seen, and the value."""
    points = getattr(history, events)
    both = np.stack((_column(points, "samples"), _column(points, name)), 1)
    return both[np.isfinite(both).all(1)]


def _draw(name: str, curves: Sequence[tuple[str, str, dict[str, Any]]], histories: Mapping[str, History]) -> Figure:
    figure, axes = new_axes(5, 3 + 0.16 * len(histories))
    for number, (label, history) in enumerate(histories.items()):
        own = {"color": COLOURS[number % len(COLOURS)], **layered(number, len(histories), width=1.0)}
        named: dict[str, Any] = {"label": label.replace("$", r"\$")} if len(histories) > 1 else {}
        for events, value, style in curves:
            points = _points(history, events, value)
            if len(points):  # else a run would be in the legend without a curve
                axes.plot(*points.T, **({"marker": "."} if len(points) == 1 else {}) | style | own | named)
                named = {"label": None} if named else {}
    axes.set(xlabel="images seen", ylabel={"loss": "loss", "accuracy": "accuracy, %", **_COURSE}[name])
    if name in _COURSE:
        axes.set_ylim(0)
    axes.set_xlim(left=0)  # also for a single point, around which matplotlib would choose other limits
    return _with_legend(figure, histories, is_needed=len(axes.lines) > 1)


def _with_legend(figure: Figure, runs: Mapping[str, object], is_needed: bool = False) -> Figure:
    """Return the figure, with a legend if there are several runs or if one is needed."""
    if len(runs) > 1 or is_needed:
        figure.legend(loc="outside lower center", ncols=2)
    return figure


Corrupted = Mapping[str, Mapping[str, Mapping[int, float]]]


def analyze_robustness(runs: Mapping[str, TrainedRun]) -> Result:
    """Compare the runs on the other test sets on which they were evaluated.

    Raises:
        NothingToShowError: no run was evaluated on another test set.
        UserError: the file of an evaluation is damaged.
    """
    found = {label: read_evaluations(run.path) for label, run in runs.items()}
    if not any(found.values()):
        raise NothingToShowError(
            "not measured; `karat eval RUN --on DIR` evaluates on another test set, and `--corrupt` on corrupted images"
        )
    result = Result()
    rows: list[list[Any]] = []
    corrupted: dict[str, dict[str, dict[str, dict[int, float]]]] = {}
    for label, evaluations in found.items():
        for one in evaluations:
            of = [f"{one.among} of {one.classes}", f"{one.checkpoint}, {one.weights}"]
            rows.append([one.name, label, one.top1, one.top5, one.loss, one.images, *of])
            if one.corruptions:
                corrupted.setdefault(one.name, {})[label] = one.corruptions
                if one.top1 is None:
                    result.notes.append(f"{label} on {one.name}: {one.text}; evaluate the others for a top-1")
            if one.unmatched:
                what = f"{len(one.unmatched)} classes that the run does not have and their {one.left_out} images"
                result.notes.append(f"{label} on {one.name}: {what} are left out")
    columns = ["test set", "run", "top-1, %", "top-5, %", "loss", "images", "among classes", "checkpoint"]
    result.tables.append(Table("Other test sets", columns, sorted(rows, key=lambda row: row[:2])))
    result.numbers = {label: [one.model_dump() for one in evaluations] for label, evaluations in found.items()}
    for name, of_runs in sorted(corrupted.items()):
        _add_corruptions(result, name, of_runs)
    return result


def _add_corruptions(result: Result, name: str, of_runs: Corrupted) -> None:
    # The means are over what all runs have.
    first, *others = of_runs.values()
    cells = [(kind, s) for kind in first for s in first[kind] if all(s in other.get(kind, {}) for other in others)]
    if cells:
        _draw_means(result, name, of_runs, cells)
    kinds = dict.fromkeys(kind for corruptions in of_runs.values() for kind in corruptions)
    for label, corruptions in of_runs.items():
        rows: list[list[object]] = [
            [kind.replace("_", " "), *(corruptions[kind].get(severity) for severity in SEVERITIES)]
            for kind in kinds
            if kind in corruptions
        ]
        of = f" of {label}" if len(of_runs) > 1 else ""
        columns = ["corruption", *(f"severity {severity}" for severity in SEVERITIES)]
        result.tables.append(Table(f"{name}: top-1 in percent{of}", columns, rows))


def _draw_means(result: Result, name: str, of_runs: Corrupted, cells: Sequence[tuple[str, int]]) -> None:
    """Draw the means over corruptions by severity, and those over severities by corruption, both only over `cells`."""
    severities, kinds = sorted({severity for _, severity in cells}), [*dict.fromkeys(kind for kind, _ in cells)]
    lines, line_axes = new_axes(5, 3 + 0.16 * len(of_runs))
    bars, bar_axes = new_axes(6, 3.6 + 0.16 * len(of_runs))
    width = 0.8 / len(of_runs)
    for number, (label, own) in enumerate(of_runs.items()):
        shown = label.replace("$", r"\$")
        means = [fmean([own[kind][s] for kind, s in cells if s == severity]) for severity in severities]
        line_axes.plot(severities, means, marker="o", label=shown)
        means = [fmean([own[kind][s] for kind, s in cells if kind == one]) for one in kinds]
        bar_axes.bar(np.arange(len(kinds)) + (number + 0.5) * width - 0.4, means, width, label=shown)
    line_axes.set(xlabel="severity", ylabel="top-1, %", xticks=SEVERITIES, ylim=(0, 1.08 * line_axes.get_ylim()[1]))
    names = [kind.replace("_", " ") for kind in kinds]
    bar_axes.set_xticks(range(len(kinds)), names, rotation=55, ha="right", rotation_mode="anchor", fontsize=7.5)
    bar_axes.set(ylabel="top-1, %", ylim=(0, None))
    caption = f"{name}: accuracy by severity, the mean over corruptions."
    result.figures[f"severities_{name}"] = _with_legend(lines, of_runs), caption
    caption = f"{name}: accuracy by corruption, the mean over severities."
    result.figures[f"corruptions_{name}"] = _with_legend(bars, of_runs), caption


_STAGES = {"at_once": "at once", "least_squares": "least squares", "matched": "matched"}


def analyze_conversion(run: TrainedRun, _: Settings) -> Result:
    """Show what became of a converted model's attention, and what `karat convert --survey` found.

    Raises:
        NothingToShowError: the run does not convert a model.
    """
    report, survey = read_report(run.path), read_survey(run.path)
    if report is None:
        raise NothingToShowError("the run converts no trained model")
    result = Result(numbers={"conversion": report, **({"survey": survey} if survey else {})})
    top1 = report["top1"]
    rows = [["of the original", top1["original"]], ["at once", top1["at_once"]], ["matched", top1["matched"]]]
    if history := read_history(run).evaluations:
        rows.append(["after training, last", history[-1]["top1"]])
    title = f"Top-1 in percent; from {report['from']}, matched on {plural(report['images'], 'image')}"
    result.tables.append(Table(title, ["", "top-1"], rows))
    alone = {block["block"]: block["top1_alone"] for block in survey["blocks"]} if survey else {}
    rows = []
    for block in report["blocks"]:
        errors = [round(mean_error(block, stage), 4) if stage in block else None for stage in _STAGES]
        heads = " ".join(f"{head:.3f}" for head in block["matched"])
        rows.append([block["block"], *errors, heads, *([alone.get(block["block"])] if survey else [])])
    columns = ["block", *_STAGES.values(), "of each head, matched", *(["top-1 with it alone"] if survey else [])]
    result.tables.append(Table("Error of each block, the mean of its heads", columns, rows))
    if survey:
        caption = "Blocks converted one after the other, from the least loss to the greatest, before fine-tuning."
        result.figures["blocks"] = _draw_survey(survey["curve"]), caption
        rows = []
        for loss, count in survey["most_blocks_for_a_loss"].items():
            rows.append([float(loss), count, ", ".join(map(str, survey["curve"][count]["blocks"]))])
        columns = ["loss of at most, points", "blocks converted", "which"]
        result.tables.append(Table("What to convert", columns, rows))
    return result


def _draw_survey(curve: Sequence[Mapping[str, Any]]) -> Figure:
    figure = new_figure(9, 3)
    top1 = [point["top1"] for point in curve]
    share = [100 * len(point["blocks"]) / (len(curve) - 1) for point in curve]
    costs = {"blocks converted, %": share}
    costs["images a second, forward and backward"] = [point["images_per_second"] for point in curve]
    costs["MB kept for each image"] = [point["mb_per_image"] for point in curve]
    for axes, (label, values) in zip(figure.subplots(1, 3, sharey=True), costs.items(), strict=True):
        axes.plot(values, top1, marker="o")
        axes.set(xlabel=label, ylim=(0, 1.08 * max(*top1, 1.0)))
    figure.axes[0].set(ylabel="top-1, %")
    return figure
