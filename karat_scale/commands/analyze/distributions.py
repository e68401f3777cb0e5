"""Weight distributions at the first, middle and last checkpoint, and tail indexes (paper, section 5.3)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import nn

from karat_scale.commands.analyze.figures import new_figure
from karat_scale.commands.analyze.result import Result, Settings, Table
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.models.operators import head_parameters

TAIL = 0.01
CHUNK = 1 << 20
BINS = 201
SHOWN_BLOCKS = 4
Values = npt.NDArray[np.float32]
Groups = dict[tuple[str, int, int], Values]


def hill_index(values: npt.NDArray[Any], tail: float = TAIL) -> float:
    """The tail index alpha of |values| by Hill's estimator on the largest `tail` of them.

    P(|w| > x) falls as x^-alpha: a smaller alpha is a heavier tail. nan if fewer than 5 values are in the tail.
    """
    sizes = np.abs(values).ravel()
    count = int(tail * len(sizes))
    if count < 5:
        return float("nan")
    sizes.partition(len(sizes) - count - 1)
    largest, threshold = sizes[len(sizes) - count :].astype(np.float64), float(sizes[len(sizes) - count - 1])
    if threshold <= 0:
        return float("nan")
    mean = float(np.log(largest / threshold).mean())
    return 1 / mean if mean > 0 else float("inf")


def describe(values: npt.NDArray[Any]) -> dict[str, float | None]:
    """Return mean, standard deviation, excess kurtosis (0 for a Gaussian) and tail index; None if undefined."""
    flat = values.ravel()
    mean = float(flat.mean(dtype=np.float64))
    second = fourth = 0.0
    for start in range(0, len(flat), CHUNK):  # a float64 copy of the whole model would not fit beside it
        squares = (flat[start : start + CHUNK].astype(np.float64) - mean) ** 2
        second += float(squares.sum()) / len(flat)
        fourth += float((squares**2).sum()) / len(flat)
    figures = {
        "mean": mean,
        "std": second**0.5,
        "kurtosis": fourth / second**2 - 3 if second > 0 else float("nan"),
        "tail_index": hill_index(flat),
    }
    return {name: value if np.isfinite(value) else None for name, value in figures.items()}


def moments(names: list[str], step: Callable[[str], int]) -> list[str]:
    """Return the first and the last of the available checkpoints, and the one nearest to the middle step of these."""
    middle = (step(names[0]) + step(names[-1])) / 2
    return list(dict.fromkeys((names[0], min(names, key=lambda name: abs(step(name) - middle)), names[-1])))


def analyze_distributions(run: TrainedRun, settings: Settings) -> Result:
    """Plot histograms of the raw weights of the whole model and, per block and head, of coefficients and W.

    A damaged checkpoint is noted and left out.

    Raises:
        RunDirectoryError: the run has no checkpoint, or only damaged ones.
    """
    result = Result()
    weights = _at_moments(run, result, settings)
    if len(weights) < 3:
        result.notes.append(
            f"the run has only {len(weights)} checkpoints and snapshots, so start, middle or end is missing"
        )
    whole = {step: values for step, (values, _) in weights.items()}
    groups = {step: parts for step, (_, parts) in weights.items()}
    result.numbers = {
        "model": [{"step": step, **describe(values)} for step, values in whole.items()],
        "heads": [
            {"step": step, "what": what, "block": block, "head": head, **describe(values)}
            for step, parts in groups.items()
            for (what, block, head), values in parts.items()
        ],
    }
    _add_tables(result)
    result.figures["model"] = (
        _draw_whole(whole, result),
        "All weights of the model except biases and norms, on a logarithmic scale.",
    )
    if last := groups[max(groups)]:
        result.figures["heads"] = (
            _draw_heads(last),
            f"Parameters of each head's attention at step {max(groups)}; one line per head.",
        )
    return result


def _at_moments(run: TrainedRun, result: Result, settings: Settings) -> dict[int, tuple[Values, Groups]]:
    """Return the weights, by step, of the checkpoints that load; the others are noted."""
    model, names = run.new_model(), run.in_order
    found: dict[str, tuple[Values, Groups]] = {}
    while missing := [name for name in moments(names, run.step) if name not in found]:
        name = missing[0]
        try:
            run.load(model, name, "raw")
        except RunDirectoryError as error:
            names = [other for other in names if other != name]
            if not names:
                raise
            result.notes.append(f"left out: {error}")
        else:
            found[name] = all_weights(model), by_head(model)
            settings.progress(
                "distributions", len(moments(names, run.step)) - len(missing) + 1, len(moments(names, run.step))
            )
    return {run.step(name): found[name] for name in moments(names, run.step)}


def all_weights(model: nn.Module) -> Values:
    """Return every trainable number except biases and norms, whose values of about 1 would dominate the tail."""
    matrices = [p.detach().flatten().float().cpu() for p in model.parameters() if p.requires_grad and p.dim() > 1]
    return torch.cat(matrices).numpy()


def by_head(model: nn.Module) -> Groups:
    """Return the operators' parameters by (name, block, head); a universal operator counts as block 0."""
    return {
        (name, block, head): values.numpy().copy()
        for name, block, parameter in head_parameters(model)
        for head, values in enumerate(parameter.detach().float().cpu())
    }


def _add_tables(result: Result) -> None:
    columns = ["step", "mean", "std", "excess kurtosis", "tail index"]
    figures = ("mean", "std", "kurtosis", "tail_index")
    rows = [[row["step"], *(row[name] for name in figures)] for row in result.numbers["model"]]
    result.tables.append(Table("All weights except biases and norms", columns, rows))
    if result.numbers["heads"]:
        places = ("what", "block", "head")
        rows = [
            [*(row[name] for name in places), row["step"], *(row[name] for name in figures)]
            for row in result.numbers["heads"]
        ]
        result.tables.append(Table("Coefficients and W by head", [*places, *columns], rows))


def _draw_whole(whole: dict[int, Values], result: Result) -> Figure:
    figure = new_figure(6, 3.4)
    axes = figure.subplots()
    # The few weights far outside would compress all others.
    reach = max(
        float(np.quantile(np.abs(values[:: max(len(values) // 10**6, 1)]), 0.9999)) for values in whole.values()
    )
    edges = np.linspace(-reach, reach, BINS + 1)
    for step, values in whole.items():
        counts = np.histogram(values, edges)[0]
        axes.stairs(np.maximum(counts, 0.5), edges, label=f"step {step}")
        result.arrays[f"model_step{step}"] = counts
    result.arrays["model_edges"] = edges
    axes.set(yscale="log", ylim=(0.8, None), xlabel="weight", ylabel="number")
    axes.legend()
    return figure


def _draw_heads(groups: Groups) -> Figure:
    blocks = sorted({block for _, block, _ in groups})
    shown = [blocks[i] for i in np.unique(np.linspace(0, len(blocks) - 1, min(SHOWN_BLOCKS, len(blocks))).astype(int))]
    names = list(dict.fromkeys(name for name, _, _ in groups))
    figure = new_figure(2.6 * len(shown) + 0.6, 1.9 * len(names))
    for row, name in zip(figure.subplots(len(names), len(shown), squeeze=False), names, strict=True):
        for axes, block in zip(row, shown, strict=True):
            for (what, of_block, head), values in groups.items():
                if (what, of_block) == (name, block):
                    density, edges = np.histogram(np.asarray(values, dtype=np.float64), 60, density=True)
                    axes.stairs(density, edges, label=f"head {head}")
            axes.set(title=f"{name}, block {block}", yticks=[])
        row[0].legend()
    return figure
