"""The learned functions phi_pq over the scores that occur, their energy per frequency, and distance from softmax."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from karat_scale.attention import KaratOperator
from karat_scale.commands.analyze.curves import ScoreHistogram, energy_per_frequency, unit_curves
from karat_scale.commands.analyze.figures import OWN_X, new_figure, show_map
from karat_scale.commands.analyze.result import NothingToShowError, Result, Settings, Table, note_bad_images
from karat_scale.commands.analyze.score_functions import add_score_functions, draw_scores
from karat_scale.commands.analyze.softmax_fit import Distance, SoftmaxFit, can_fit
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.commands.analyze.validation_images import ValidationImages
from karat_scale.commands.analyze.visit import visit_images
from karat_scale.models.factory import layer_sizes
from karat_scale.models.layers import attention_layers
from karat_scale.models.operators import gates, heads_of, operators

POINTS = 200
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHOWN_UNITS = 4
FIT_BYTES = 1 << 30
Heads = dict[tuple[int, int], Distance]
Learned = dict[int, KaratOperator]


def analyze_functions(run: TrainedRun, settings: Settings) -> Result:
    """Plot curves of every head of every block over the scores that occur.

    Raises:
        NothingToShowError: the run has no functions of the scores.
        UserError: it has no checkpoint, or its data cannot be read.
    """
    attention = run.recipe.attention
    if attention.kind != "karat":
        raise NothingToShowError(f"attention.kind = {attention.kind} has no learned functions")
    if not attention.scores:
        raise NothingToShowError("attention.scores = false: all functions are the constants phi_pq(0)")
    model = run.model()
    heads = {b: own for b, layer in enumerate(attention_layers(model)) if (own := heads_of(layer.attention))}
    learned = {block: operator for block, operator in enumerate(operators(model)) if operator is not None}
    images = run.images(settings.images)
    histogram = ScoreHistogram(max(heads) + 1, max(own.num_heads for own in heads.values()))

    def visit(block: int, raw: Tensor, _: Tensor) -> None:
        if block in heads:
            scores = raw[:, raw.shape[1] - heads[block].num_heads :]
            histogram.add(block, _arguments(learned[block], scores))

    visit_images(model, run, images, settings, "scores", visit)
    result = Result()
    add_score_functions(result, heads, histogram)
    _add_curves(result, learned, histogram)
    _add_gates(result, model)
    note_bad_images(result, images.bad)
    _add_energy(result, learned)
    if attention.form == "content":
        result.notes.append("distance from softmax: not for attention.form = content, whose S is not H W^T")
    elif any(size.biased for size in layer_sizes(run.recipe.model)):
        result.notes.append("distance from softmax: not available for shifted windows, where some pairs are masked")
    else:
        _add_distances(result, model, learned, run, images, settings)
    return result


def _places(learned: Learned) -> list[tuple[int, int]]:
    """Return (block, head) of every learned head."""
    return [(block, head) for block, operator in learned.items() for head in range(operator.num_heads)]


def _arguments(operator: KaratOperator, scores: Tensor) -> Tensor:
    """Return the inputs of the functions: the scores of the learned heads or, if W comes first, A W."""
    return scores @ operator.proj if operator.form == "project_first" and operator.proj is not None else scores


def _add_curves(result: Result, learned: Learned, histogram: ScoreHistogram) -> None:
    for block, operator in learned.items():
        heads = operator.num_heads
        figure = new_figure(max(2.2 * heads, 3.2), 2.6)
        for head, axes in enumerate(figure.subplots(1, heads, squeeze=False)[0]):
            low, high = histogram.span(block, head)
            x = torch.linspace(low, high, POINTS, dtype=torch.float64, device=next(operator.parameters()).device)
            curves = unit_curves(operator, head, x).flatten(1).cpu()
            bands = curves.quantile(torch.tensor(QUANTILES, dtype=curves.dtype), dim=1).numpy()
            lively = curves.var(0).topk(min(SHOWN_UNITS, curves.shape[1])).indices
            _draw_curves(axes, x.cpu().numpy(), bands, curves[:, lively].numpy())
            draw_scores(axes, histogram, block, head, (low, high))
            axes.set(title=f"head {head}", xlabel="score", xlim=(low, high), label=OWN_X)
            result.arrays[f"block{block}_head{head}_x"] = x.cpu().numpy()
            result.arrays[f"block{block}_head{head}_quantiles"] = bands
        result.figures[f"functions_block_{block}"] = (
            figure,
            f"Block {block}: phi over the scores that occur (grey: how often). Blue: median, quartiles and 5 to 95 % "
            f"over all (p, q). Thin lines: the {SHOWN_UNITS} functions that vary most.",
        )
    result.arrays["score_counts"] = histogram.counts
    result.arrays["score_edges"] = histogram.edges


def _draw_curves(axes: Any, x: Any, bands: Any, lively: Any) -> None:
    axes.fill_between(x, bands[0], bands[4], alpha=0.2, linewidth=0, color="C0")
    axes.fill_between(x, bands[1], bands[3], alpha=0.35, linewidth=0, color="C0")
    axes.plot(x, bands[2], color="C0")
    axes.plot(x, lively, color="C1", linewidth=0.7, alpha=0.8)


def _add_gates(result: Result, model: nn.Module) -> None:
    found = [(block, gate.detach().tolist()) for block, gate in enumerate(gates(model)) if gate is not None]
    rows = [[block, head, value] for block, values in found for head, value in enumerate(values)]
    if rows:
        result.numbers["gates"] = [dict(zip(("block", "head", "gate"), row, strict=True)) for row in rows]
        title = "Gates: S = softmax + gate x learned, and all figures here show the learned part"
        result.tables.append(Table(title, ["block", "head", "gate"], rows))


def _add_energy(result: Result, learned: Learned) -> None:
    shares = [energy_per_frequency(operator) for operator in learned.values()]
    energy = [share for share in shares if share is not None]
    if len(energy) < len(shares):
        result.notes.append("energy per frequency: only the Fourier basis has frequencies")
        return
    rows_of_heads = np.concatenate(energy)
    places, grid = _places(learned), rows_of_heads.shape[1]
    result.arrays["energy_share"] = np.full((len(energy), max(map(len, energy)), grid), np.nan)  # nan: fewer heads
    for number, share in enumerate(energy):
        result.arrays["energy_share"][number, : len(share)] = share
    result.numbers["energy_share"] = [share.tolist() for share in energy]
    figure = new_figure(1.2 + 0.6 * grid, max(1.6, 0.22 * len(places) + 0.8))
    axes = figure.subplots()
    image = show_map(axes, rows_of_heads, vmin=0, aspect="auto", cmap="viridis")
    axes.set_xticks(range(grid), [str(m) for m in range(1, grid + 1)])
    axes.set_yticks(range(len(places)), [f"{b}.{h}" for b, h in places], fontsize=7)
    axes.set(xlabel="frequency m", ylabel="block.head")
    figure.colorbar(image, label="share of energy")
    caption = "Share of each frequency in a head's squared coefficients; at a random start all are 1 / G."
    result.figures["energy"] = figure, caption
    columns = ["block", "head", *(f"m = {m}, %" for m in range(1, grid + 1))]
    rows = [[b, h, *(100 * shares).tolist()] for (b, h), shares in zip(places, rows_of_heads, strict=True)]
    result.tables.append(Table("Energy per frequency", columns, rows))


def _add_distances(
    result: Result,
    model: nn.Module,
    learned: Learned,
    run: TrainedRun,
    images: ValidationImages,
    settings: Settings,
) -> None:
    first = next(iter(learned.values()))
    if not can_fit(first):
        result.notes.append("distance from softmax: only for base zero and modular or full-rank form with few features")
        return
    distances: Heads = {}
    everyone = _places(learned)
    at_once = max(1, FIT_BYTES // SoftmaxFit.bytes_of(first))
    for start in range(0, len(everyone), at_once):
        fits = {(b, h): SoftmaxFit(learned[b], h) for b, h in everyone[start : start + at_once]}

        def visit(block: int, raw: Tensor, _: Tensor, fits: dict[tuple[int, int], SoftmaxFit] = fits) -> None:
            for (of_block, head), fit in fits.items():
                if of_block == block:
                    fit.add(raw[:, raw.shape[1] - learned[block].num_heads + head].flatten(0, 1))

        visit_images(model, run, images, settings, "distance from softmax", visit)
        distances |= {place: fit.distance() for place, fit in fits.items()}
    _show_distances(result, distances)


def _show_distances(result: Result, distances: Heads) -> None:
    rows = [[b, h, d.to_fit, d.to_softmax, d.fit_error] for (b, h), d in distances.items()]
    columns = ["block", "head", "S to best fit", "S to softmax", "error of the fit"]
    result.tables.append(
        Table("Distance from the best fit of softmax (0 the same, 1 nothing in common)", columns, rows)
    )
    result.numbers["softmax"] = [
        dict(zip(("block", "head", "to_fit", "to_softmax", "fit_error"), r, strict=True)) for r in rows
    ]
    figure = new_figure(max(4.0, 0.3 * len(rows) + 1), 2.8)
    axes = figure.subplots()
    where = np.arange(len(rows))
    axes.bar(where - 0.2, [row[2] for row in rows], 0.4, label="learned S to the best fit of softmax")
    axes.bar(where + 0.2, [row[4] for row in rows], 0.4, label="the best fit's own error")
    axes.set_xticks(where, [f"{row[0]}.{row[1]}" for row in rows], fontsize=7)
    axes.set(xlabel="block.head", ylim=(0, 1.3))
    axes.legend()
    caption = "Distance of each head from the best fit of softmax with its basis, grid and rank (1: unrelated)."
    result.figures["distance"] = figure, caption
