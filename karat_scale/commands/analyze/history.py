"""What a run's own files say of its training: its curves in `metrics.jsonl`, and what it achieved.

The curves are losses, accuracy, learning rate, gradient norm and speed, of all runs in one figure. Also here are the
functions phi_pq of one head as curves, and a histogram of the scores on which they are used.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from karat_scale.attention import KaratOperator
from karat_scale.attention.bases import BASE_ACTIVATIONS, ElementwiseBasis, FeatureBasis, Fourier
from karat_scale.commands.analyze.output import COLOURS, new_figure
from karat_scale.commands.analyze.result import NothingToShowError, Result, Table
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.commands.status.status import read_events
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import UserError
from karat_scale.models.factory import parameter_count
from karat_scale.recipe.attention import describe_attention
from karat_scale.training.run_directory import RunDirectory

Point = dict[str, float]
_FIGURES = ("step", "samples", "loss", "lr", "grad_norm", "images_per_second", "top1", "top5", "time", "total_steps")


@dataclass
class History:
    """The events of training and of evaluation by step, as plain figures; one that is undefined is nan."""

    train: list[Point] = field(default_factory=list)
    evaluations: list[Point] = field(default_factory=list)
    damaged_lines: int = 0

    def rewind(self, step: float) -> None:
        """Take back what came after a step: the run resumed there."""
        self.train = [point for point in self.train if point["step"] <= step]
        self.evaluations = [point for point in self.evaluations if point["step"] <= step]


def read_history(run: TrainedRun) -> History:
    """Read the run's events. A file that is missing has none."""
    history = History()
    damaged: list[str] = []
    for event in read_events(RunDirectory(run.path).metrics_file, damaged.append):
        kind = event.get("event")
        if kind not in ("train", "eval", "resume"):
            continue
        point = {name: _number(event.get(name)) for name in _FIGURES}
        if math.isnan(point["step"]):
            damaged.append(str(event))
            continue
        following = history.train if kind == "train" else history.evaluations
        if kind == "resume" or (following and point["step"] <= following[-1]["step"]):
            history.rewind(point["step"] - (kind != "resume"))
        if kind != "resume":
            (history.train if kind == "train" else history.evaluations).append(point)
    history.damaged_lines = len(damaged)
    return history


def achieved(run: TrainedRun) -> tuple[str, dict[str, str]]:
    """Return a run's score in one line, and facts by name: what it is, and what it cost."""
    history, summary = read_history(run), RunDirectory(run.path).summary() or {}
    last = history.evaluations[-1] if history.evaluations else None
    score = f"{last['top1']:.2f} % top-1" if last else ""
    facts = {}
    if last:
        best = max(history.evaluations, key=lambda point: point["top1"])
        text = f"top-5 {last['top5']:.2f} %, loss {last['loss']:.4f} after step {last['step']:,.0f}"
        if best["top1"] > last["top1"]:
            text += f"; best top-1 {best['top1']:.2f} % after step {best['step']:,.0f}"
        facts["last evaluation"] = text
    else:
        facts["last evaluation"] = "none yet"
    facts["budget"] = _budget(run, history, summary)
    rate = summary.get("images_per_second")
    if isinstance(rate, int | float):
        facts["speed"] = f"{rate:,.0f} images a second on {summary.get('device', 'an unknown device')}"
    if when := [point["time"] for point in (*history.train[-1:], *history.evaluations[-1:])]:
        facts["date"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(max(when)))
    if summary.get("exit") != 0:
        facts["outcome"] = f"not finished ({summary['reason']})" if summary.get("reason") else "not finished"
    return score, facts


def described(run: TrainedRun) -> dict[str, str]:
    """Return facts by name of what a run's model is, and which of its weights are analysed."""
    model = run.recipe.model
    patch = f", patch {model.patch_size}" if model.patch_size else ""
    facts = {
        "attention": describe_attention(run.recipe.attention),
        "model": f"{model.name}, {model.image_size} px{patch}",
    }
    try:
        states = plural(len(run.in_order), "state")
        facts["weights"] = f"{run.weights_kind}, of step {run.step(run.chosen):,}; the run keeps {states} of training"
        facts["parameters"] = f"{parameter_count(run.model()):,}"
    except UserError as error:
        facts["weights"] = str(error)
    facts["directory"] = str(run.path)
    return facts


def _budget(run: TrainedRun, history: History, summary: dict[str, Any]) -> str:
    steps = summary.get("steps") or (int(history.train[-1]["step"]) if history.train else 0)
    text = f"{steps:,} steps of {run.recipe.train.global_batch:,} images"
    images = summary.get("train_images")
    if isinstance(images, int) and images > 0:
        text += f", {steps * run.recipe.train.global_batch / images:.3g} x {images:,} images"
    return f"{text}, seed {run.recipe.run.seed}"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


LIMIT, BINS = 64.0, 2048
Counts = npt.NDArray[np.int64]


@torch.no_grad()
def unit_curves(operator: KaratOperator, head: int, x: Tensor) -> Tensor:
    """Return phi_pq(x) of the first (or only) set of functions, including b(x): x [n] to [n, p, q], in x's dtype."""
    parameters = {k: v.to(x) for k, v in operator.basis_parameters().items() if not k.startswith("second_")}
    coef = operator.basis.pack(parameters)[head]
    basis = operator.basis
    if isinstance(basis, FeatureBasis):
        curves = torch.einsum("fx,fpq->xpq", torch.stack(list(basis.value(x))), coef)
    else:
        assert isinstance(basis, ElementwiseBasis)
        curves = basis.value(x[:, None, None], *coef.unbind(0))
    base = BASE_ACTIVATIONS[operator.base]
    return curves if base is None else curves + base.value(x)[:, None, None]


@torch.no_grad()
def energy_per_frequency(operator: KaratOperator) -> npt.NDArray[np.float64] | None:
    """Return the share of each harmonic m in sum_pq a_pqm^2 + b_pqm^2, [h, G]; None if the basis is not Fourier."""
    if not isinstance(operator.basis, Fourier):
        return None
    cos, sin = operator.basis.series(operator.basis_parameters())
    energy = cos.double().square().sum((1, 2)) + sin.double().square().sum((1, 2))
    return (energy / energy.sum(-1, keepdim=True)).cpu().numpy()


class ScoreHistogram:
    """A histogram of the scores, per block and head; scores beyond +-64 count in the outermost bins.

    Scores of exactly 0 are not counted: those are masked pairs.
    """

    edges = np.linspace(-LIMIT, LIMIT, BINS + 1)

    def __init__(self, blocks: int, heads: int) -> None:
        self.counts: Counts = np.zeros((blocks, heads, BINS), dtype=np.int64)

    def add(self, block: int, scores: Tensor) -> None:
        """Add scores [B, h, rows, columns]."""
        for head, values in enumerate(scores.transpose(0, 1).flatten(1).float().cpu()):
            counted = torch.histc(values[values != 0].clamp(-LIMIT, LIMIT), BINS, -LIMIT, LIMIT)
            self.counts[block, head] += counted.to(torch.int64).numpy()

    def span(self, block: int, head: int, share: float = 0.998) -> tuple[float, float]:
        """Return the range that holds the middle `share` of the scores."""
        below = self.counts[block, head].cumsum() / max(self.counts[block, head].sum(), 1)
        low = int(np.searchsorted(below, (1 - share) / 2))
        high = int(np.searchsorted(below, 1 - (1 - share) / 2))
        return float(self.edges[low]), float(self.edges[min(high, BINS - 1) + 1])


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
