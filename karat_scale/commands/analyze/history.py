"""What a run's own files say of its training: the curves in `metrics.jsonl`, and what it achieved."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.commands.status.standing import read_events
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
