"""The learned functions of a run's heads over the scores that occur, and the distributions of its weights.

The functions are phi_pq, or psi for `form: content`. They come with the energy per frequency and the distance from
softmax. The distributions are those of the first, middle and last checkpoint, with tail indexes (paper, section 5.3).
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from karat_scale.attention import KaratOperator
from karat_scale.attention.bases import BASE_ACTIVATIONS, ElementwiseBasis, FeatureBasis, Fourier
from karat_scale.attention.operator import AttentionHeads
from karat_scale.commands.analyze.matrices import FLOOR, SoftmaxFit, can_fit
from karat_scale.commands.analyze.result import (
    NothingToShowError,
    Result,
    Settings,
    Table,
    note_bad_images,
    visit_images,
)
from karat_scale.commands.analyze.summary import functions_sentence
from karat_scale.commands.analyze.trained_run import TrainedRun, ValidationImages
from karat_scale.commands.figures import GRID, OWN_LIMITS, OWN_X, layered, new_axes, new_figure, show_map
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.models.factory import layer_sizes
from karat_scale.models.layers import attention_layers
from karat_scale.models.operators import gates, head_parameters, heads_of, operators

POINTS = 200
LIMIT, SCORE_BINS = 64.0, 2048
Shares = npt.NDArray[np.float64]
_NEAR = 0.5  # a distance from softmax below which a head is near it


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


class ScoreHistogram:
    """A histogram of the scores, per block and head; scores beyond +-64 count in the outermost bins.

    Scores of exactly 0 are not counted: those are masked pairs.
    """

    edges = np.linspace(-LIMIT, LIMIT, SCORE_BINS + 1)

    def __init__(self, blocks: int, heads: int) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros((blocks, heads, SCORE_BINS), dtype=np.int64)

    def add(self, block: int, scores: Tensor) -> None:
        """Add scores [B, h, rows, columns]."""
        for head, values in enumerate(scores.transpose(0, 1).flatten(1).float().cpu()):
            counted = torch.histc(values[values != 0].clamp(-LIMIT, LIMIT), SCORE_BINS, -LIMIT, LIMIT)
            self.counts[block, head] += counted.to(torch.int64).numpy()

    def span(self, block: int, head: int, share: float = 0.998) -> tuple[float, float]:
        """Return the range that holds the middle `share` of the scores."""
        below = self.counts[block, head].cumsum() / max(self.counts[block, head].sum(), 1)
        low = int(np.searchsorted(below, (1 - share) / 2))
        high = int(np.searchsorted(below, 1 - (1 - share) / 2))
        return float(self.edges[low]), float(self.edges[min(high, SCORE_BINS - 1) + 1])


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHOWN_UNITS = 4
FIT_BYTES = 1 << 30
Learned = dict[int, KaratOperator]


def analyze_functions(run: TrainedRun, settings: Settings) -> Result:
    """Plot curves of every head of every block over the scores that occur.

    Raises:
        NothingToShowError: the run has no functions of the scores.
        UserError: it has no checkpoint, or its data cannot be read.
    """
    attention = run.recipe.attention
    sections = [section for section in attention.sections if section.has_functions]
    if sections and not any(section.scores for section in sections):
        raise NothingToShowError("attention.scores = false: all functions are the constants phi_pq(0)")
    model = run.model()
    found = {block: operator for block, operator in enumerate(operators(model)) if operator is not None}
    learned = {block: operator for block, operator in found.items() if attention.of_block(block).scores}
    if not learned:
        raise NothingToShowError(f"attention.kind = {attention.kind} has no learned functions of the scores")
    layers = attention_layers(model)
    heads = {block: own for block in learned if (own := heads_of(layers[block].attention))}
    images = run.images(settings.images)
    histogram = ScoreHistogram(max(heads) + 1, max(own.num_heads for own in heads.values()))

    def visit(block: int, raw: Tensor, _: Tensor) -> None:
        if block in heads:
            scores, operator = raw[:, raw.shape[1] - heads[block].num_heads :], learned[block]
            if operator.form == "project_first" and operator.proj is not None:  # the functions read A W
                scores = scores @ operator.proj
            histogram.add(block, scores)

    visit_images(model, run, images, settings, "scores", visit)
    result = Result()
    _note_softmax_heads(result, run)
    if len(learned) < len(found):
        result.notes.append(f"attention.scores = false has constants phi_pq(0) alone{_left_out(found, learned)}")
    seen = "over the scores that occur (grey: how often)."
    _draw_heads_of_blocks(
        result, "of_score", heads, histogram, _draw_score_function, f"the function of each score alone, {seen}"
    )
    caption = (
        f"phi {seen} Blue: median, quartiles and 5 to 95 % over all (p, q). "
        f"Thin lines: the {SHOWN_UNITS} functions that vary most."
    )
    _draw_heads_of_blocks(result, "functions", learned, histogram, _draw_curves, caption)
    result.arrays["score_counts"], result.arrays["score_edges"] = histogram.counts, histogram.edges
    parts = [energy for name, energy in result.arrays.items() if name.endswith("_parts")]
    constant, line, curve = map(float, np.sum(parts, axis=0))
    result.numbers["parts"] = {"constant": constant, "line": line, "curve": curve}
    if constant + line + curve > 0:  # else all scores are 0, or all functions
        result.findings.append(functions_sentence(constant, line, curve))
    found_gates = [(block, gate.tolist()) for block, gate in enumerate(gates(model)) if gate is not None]
    if rows := [[block, head, value] for block, values in found_gates for head, value in enumerate(values)]:
        title = "Gates: S = softmax + gate x learned, and all figures here show the learned part"
        result.add_records("gates", rows, title, {"block": "block", "head": "head", "gate": "gate"})
    note_bad_images(result, images.bad)
    _add_energy(result, learned)
    if any(size.biased for size in layer_sizes(run.recipe.model)):
        result.notes.append("distance from softmax: not available for shifted windows, where some pairs are masked")
    else:
        _add_distances(result, model, learned, run, images, settings)
    return result


def _note_softmax_heads(result: Result, run: TrainedRun) -> None:
    if any(section.softmax_heads for section in run.recipe.attention.sections):
        result.notes.append(
            "heads are numbered here without those of attention.softmax_heads, which come first in the attention maps"
        )


def _left_out(blocks: Collection[int], shown: Collection[int]) -> str:
    """Return a text that names the blocks that are not shown; empty if none is shown."""
    others = [str(block) for block in blocks if block not in shown]
    return f", so not for block{'s' * (len(others) > 1)} {', '.join(others)}" if shown else ""


Draw = Callable[[Any, Any, int, Tensor, Tensor], dict[str, Any] | None]
"""Draws the curves of one head over scores [n] into axes, given how often each score occurs [n]; returns the arrays of
the curves by name, or None if the head has no curves.
"""


def _draw_heads_of_blocks(
    result: Result, name: str, heads: Mapping[int, Any], histogram: ScoreHistogram, draw: Draw, caption: str
) -> None:
    """Add a figure for each block, with each head's curves over the scores that occur, and how often these occur."""
    for block, own in heads.items():
        argument = "entry of A W" if getattr(own, "form", "") == "project_first" else "score"
        figure = new_figure(max(2.2 * own.num_heads, 3.2), 2.6)
        for head, axes in enumerate(figure.subplots(1, own.num_heads, squeeze=False)[0]):
            low, high = histogram.span(block, head)
            x = torch.linspace(low, high, POINTS, dtype=torch.float64, device=next(own.parameters()).device)
            middles = (histogram.edges[1:] + histogram.edges[:-1]) / 2
            weights = torch.from_numpy(np.interp(x.cpu(), middles, histogram.counts[block, head]))
            if (drawn := draw(axes, own, head, x, weights / weights.sum().clamp(min=1))) is None:
                break
            behind = axes.twinx()
            behind.set_label(OWN_LIMITS)
            inside = (middles >= low) & (middles <= high)
            counts = histogram.counts[block, head][inside]
            behind.fill_between(middles[inside], counts, color=GRID, alpha=0.35, linewidth=0, step="mid")
            behind.set(yticks=[], ylim=(0, None))
            axes.set_zorder(behind.get_zorder() + 1)
            axes.patch.set_visible(False)
            axes.set(title=f"head {head}", xlabel=argument, xlim=(low, high), label=OWN_X)
            result.arrays |= {f"block{block}_head{head}_{key}": values for key, values in drawn.items()}
        else:
            result.figures[f"{name}_block_{block}"] = figure, f"Block {block}: {caption}"


@torch.no_grad()
def _draw_score_function(axes: Any, heads: AttentionHeads, head: int, x: Tensor, _: Tensor) -> dict[str, Any] | None:
    curves = heads.function_of_score(x.float().expand(heads.num_heads, 1, -1))
    if curves is None:
        return None
    scores, curve = x.float().cpu().numpy(), curves[head, 0].cpu().numpy()
    axes.plot(scores, curve)
    axes.set_ylabel("" if head else "function")
    return {"of_score_x": scores, "of_score": curve}


def _draw_curves(axes: Any, operator: KaratOperator, head: int, x: Tensor, weights: Tensor) -> dict[str, Any]:
    curves = unit_curves(operator, head, x).flatten(1).cpu()
    bands = curves.quantile(torch.tensor(QUANTILES, dtype=curves.dtype), dim=1).numpy()
    lively = curves.var(0).topk(min(SHOWN_UNITS, curves.shape[1])).indices
    scores = x.cpu().numpy()
    axes.fill_between(scores, bands[0], bands[4], alpha=0.2, linewidth=0, color="C0")
    axes.fill_between(scores, bands[1], bands[3], alpha=0.35, linewidth=0, color="C0")
    axes.plot(scores, bands[2], color="C0")
    axes.plot(scores, curves[:, lively].numpy(), color="C1", linewidth=0.7, alpha=0.8)
    axes.set_ylabel("" if head else "phi")
    return {"x": scores, "quantiles": bands, "parts": energy_parts(x.cpu(), curves, weights)}


def energy_parts(x: Tensor, curves: Tensor, weights: Tensor) -> Shares:
    """Return the energy of the constant, line and rest of curves [n, functions] over scores x [n], as [3].

    Constant and line are those of the best straight line. weights: how often each score occurs [n], with the sum 1.
    """
    mean, centred = weights @ curves, x - weights @ x
    constant = mean.square().sum()
    slope = (weights * centred) @ curves / (weights @ centred.square()).clamp(min=FLOOR)
    line = slope.square().sum() * (weights @ centred.square())
    total = (weights @ curves.square()).sum()
    return torch.stack((constant, line, (total - constant - line).clamp(min=0))).numpy()


@torch.no_grad()
def _add_energy(result: Result, learned: Learned) -> None:
    """Add the share of each harmonic m in a head's sum_pq a_pqm^2 + b_pqm^2."""
    energy: dict[int, Shares] = {}
    for block, operator in learned.items():
        if isinstance(operator.basis, Fourier):
            cos, sin = operator.basis.series(operator.basis_parameters())
            squares = cos.double().square().sum((1, 2)) + sin.double().square().sum((1, 2))
            energy[block] = (squares / squares.sum(-1, keepdim=True)).cpu().numpy()
    if len(energy) < len(learned):
        result.notes.append(f"energy per frequency: only the Fourier basis has frequencies{_left_out(learned, energy)}")
    if not energy:
        return
    heads, grid = np.max([own.shape for own in energy.values()], axis=0).tolist()
    padded = np.full((len(energy), heads, grid), np.nan)  # nan: what a block does not have
    for number, own in enumerate(energy.values()):
        padded[number, : own.shape[0], : own.shape[1]] = own
    places = [(block, head) for block, own in energy.items() for head in range(len(own))]
    rows_of_heads = np.concatenate([rows[: len(own)] for rows, own in zip(padded, energy.values(), strict=True)])
    result.arrays["energy_share"] = padded
    result.numbers["energy_share"] = [shares.tolist() for shares in energy.values()]
    figure, axes = new_axes(1.2 + 0.6 * grid, max(1.6, 0.22 * len(places) + 0.8))
    image = show_map(axes, rows_of_heads, vmin=0, aspect="auto", cmap="viridis")
    axes.set_xticks(range(grid), [str(m) for m in range(1, grid + 1)])
    axes.set_yticks(range(len(places)), [f"{b}.{h}" for b, h in places], fontsize=7)
    axes.set(xlabel="frequency m", ylabel="block.head")
    figure.colorbar(image, label="share of energy")
    caption = "Share of each frequency in a head's squared coefficients; at a random start all are 1 / G."
    result.figures["energy"] = figure, caption
    columns = ["block", "head", *(f"m = {m}, %" for m in range(1, grid + 1))]
    rows = [[*place, *shares] for place, shares in zip(places, (100 * rows_of_heads).tolist(), strict=True)]
    result.tables.append(Table("Energy per frequency", columns, rows))


def _add_distances(
    result: Result, model: nn.Module, learned: Learned, run: TrainedRun, images: ValidationImages, settings: Settings
) -> None:
    sections = {block: run.recipe.attention.of_block(block) for block in learned}
    is_product = {block: own.kind == "karat" and own.form != "content" for block, own in sections.items()}
    fitted = {block: operator for block, operator in learned.items() if is_product[block] and can_fit(operator)}
    if len(fitted) < len(learned):
        needs = "S = H W^T with base zero, modular or full-rank form and few features that are linear in coefficients"
        result.notes.append(f"distance from softmax: only for {needs}{_left_out(learned, fitted)}")
    if not fitted:
        return
    rows: list[list[Any]] = []
    everyone = [(block, head) for block, operator in fitted.items() for head in range(operator.num_heads)]
    at_once = max(1, FIT_BYTES // max(map(SoftmaxFit.bytes_of, fitted.values())))
    for start in range(0, len(everyone), at_once):
        fits = {(b, h): SoftmaxFit(learned[b], h) for b, h in everyone[start : start + at_once]}

        def visit(block: int, raw: Tensor, _: Tensor, fits: dict[tuple[int, int], SoftmaxFit] = fits) -> None:
            for (of_block, head), fit in fits.items():
                if of_block == block:
                    fit.add(raw[:, raw.shape[1] - learned[block].num_heads + head].flatten(0, 1))

        visit_images(model, run, images, settings, "distance from softmax", visit)
        rows += [[*place, *fit.distance()] for place, fit in fits.items()]
    title = "Distance from the best fit of softmax (0 the same, 1 nothing in common)"
    columns = {"block": "block", "head": "head", "to_fit": "S to best fit"}
    columns |= {"to_softmax": "S to softmax", "fit_error": "error of the fit"}
    result.add_records("softmax", rows, title, columns)
    nearest = min(rows, key=lambda row: row[2])
    far = "No head is near softmax. " if nearest[2] > _NEAR else ""
    result.findings.append(
        f"{far}The head nearest to softmax is head {nearest[1]} of block {nearest[0]}: {nearest[2]:.2f} from its best "
        "fit, where 0 is the same and 1 has nothing in common."
    )
    figure, axes = new_axes(max(5.0, 0.3 * len(rows) + 1), 2.8)  # as wide as the legend
    where = np.arange(len(rows))
    axes.bar(where - 0.2, [row[2] for row in rows], 0.4, label="learned S to the best fit of softmax")
    axes.bar(where + 0.2, [row[4] for row in rows], 0.4, label="the best fit's own error")
    axes.set_xticks(where, [f"{row[0]}.{row[1]}" for row in rows], fontsize=7)
    axes.set(xlabel="block.head", ylabel="distance", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=2)
    caption = "Distance of each head from the best fit of softmax with its basis, grid and rank (1: unrelated)."
    result.figures["distance"] = figure, caption


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
    for start in range(0, len(flat), CHUNK):  # a float64 copy of the whole model might not fit in memory
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
    """Return the first and the last of the available checkpoints, and the one nearest to the middle of their steps."""
    middle = (step(names[0]) + step(names[-1])) / 2
    return list(dict.fromkeys((names[0], min(names, key=lambda name: abs(step(name) - middle)), names[-1])))


def analyze_distributions(run: TrainedRun, settings: Settings) -> Result:
    """Plot histograms of the raw weights of the whole model and, per block and head, of coefficients and W.

    A damaged checkpoint is noted and left out.

    Raises:
        RunDirectoryError: the run has no checkpoint, or only damaged ones.
    """
    result = Result()
    _note_softmax_heads(result, run)
    weights = _at_moments(run, result, settings)
    if len(weights) < 3:
        kept = f"{len(weights)} checkpoints and snapshots"
        result.notes.append(f"the run has only {kept}, so start, middle or end is missing")
    whole = {step: values for step, (values, _) in weights.items()}
    groups = {step: parts for step, (_, parts) in weights.items()}
    figures = {"mean": "mean", "std": "std", "kurtosis": "excess kurtosis", "tail_index": "tail index"}
    places = {"what": "what", "block": "block", "head": "head"}
    of_model, of_heads = {"step": "step", **figures}, {**places, "step": "step", **figures}
    rows: list[list[Any]] = [[step, *describe(values).values()] for step, values in whole.items()]
    result.add_records("model", rows, "All weights except biases and norms", of_model)
    every = [(*place, step, own) for step, parts in groups.items() for place, own in parts.items()]
    rows = [[*place, *describe(own).values()] for *place, own in every]
    result.add_records("heads", rows, "Coefficients and W by head", of_heads)
    figure, axes = new_axes(6, 3.4)
    # The few weights far outside would compress all others.
    reach = max(float(np.quantile(np.abs(own[:: max(len(own) // 10**6, 1)]), 0.9999)) for own in whole.values())
    edges = np.linspace(-reach, reach, BINS + 1)
    for number, (step, values) in enumerate(whole.items()):
        counts = np.histogram(values, edges)[0]
        axes.stairs(np.maximum(counts, 0.5), edges, label=f"step {step}", **layered(number, len(whole)))
        result.arrays[f"model_step{step}"] = counts
    result.arrays["model_edges"] = edges
    axes.set(yscale="log", ylim=(0.8, None), xlabel="weight", ylabel="number")
    axes.legend()
    result.figures["model"] = figure, "All weights of the model except biases and norms, on a logarithmic scale."
    if last := {place: values for place, values in groups[max(groups)].items() if values.size > 1}:
        caption = f"Parameters of each head's attention at step {max(groups)}; one line per head."
        result.figures["heads"] = _draw_heads(last), caption
    return result


def _at_moments(run: TrainedRun, result: Result, settings: Settings) -> dict[int, tuple[Values, Groups]]:
    """Return the weights, by step, of the checkpoints that load; the others are noted.

    The weights of the whole model exclude biases and norms, as the norms' values of about 1 would dominate the tail.
    """
    model, names = run.new_model(), run.in_order
    found: dict[str, tuple[Values, Groups]] = {}
    chosen = moments(names, run.step)
    while missing := [name for name in chosen if name not in found]:
        name = missing[0]
        try:
            run.load(model, name, "raw")
        except RunDirectoryError as error:
            names = [other for other in names if other != name]
            if not names:
                raise
            result.notes.append(f"left out: {error}")
            chosen = moments(names, run.step)
        else:
            matrices = [p.detach().flatten().cpu() for p in model.parameters() if p.requires_grad and p.dim() > 1]
            found[name] = torch.cat(matrices).float().numpy(), by_head(model)
            settings.progress("distributions", len(chosen) - len(missing) + 1, len(chosen))
    return {run.step(name): found[name] for name in chosen}


def by_head(model: nn.Module) -> Groups:
    """Return the operators' parameters by (name, block, head); a universal operator counts as block 0."""
    return {
        (name, block, head): values.numpy().copy()
        for name, block, parameter in head_parameters(model)
        for head, values in enumerate(parameter.detach().float().cpu())
    }


def _draw_heads(groups: Groups) -> Figure:
    blocks = sorted({block for _, block, _ in groups})
    shown = [blocks[i] for i in np.unique(np.linspace(0, len(blocks) - 1, min(SHOWN_BLOCKS, len(blocks))).astype(int))]
    names = list(dict.fromkeys(name for name, _, _ in groups))
    there = {(name, block) for name, block, _ in groups}  # a block may have other attention than the next one
    cells = [(name, block) for name in names for block in shown if (name, block) in there]
    rows = -(-len(cells) // len(shown))
    figure = new_figure(2.6 * len(shown) + 0.6, 1.9 * rows)
    frames = figure.subplots(rows, len(shown), squeeze=False).flat
    for number, ((name, block), axes) in enumerate(zip(cells, frames, strict=False)):
        for (what, of_block, head), values in groups.items():
            if (what, of_block) == (name, block):
                density, edges = np.histogram(np.asarray(values, dtype=np.float64), 60, density=True)
                axes.stairs(density, edges, label=f"head {head}")
        axes.set(title=f"{name}, block {block}", xlabel="value", yticks=[])
        axes.set_ylabel("" if number % len(shown) else "density")
        if name not in [before for before, _ in cells[:number]]:
            axes.legend()
    for axes in frames[len(cells) :]:
        axes.set_axis_off()
    return figure
