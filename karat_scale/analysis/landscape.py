"""The loss landscape, the optimizer's path over it, and sharpness (paper, sections 5.1 and 5.2)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from karat_scale.analysis.curvature import Hessian
from karat_scale.analysis.eigenvalues import Eigenvalue
from karat_scale.analysis.figures import new_figure
from karat_scale.analysis.loss_grid import filter_normalised, loss_grid
from karat_scale.analysis.result import Result, Settings, Table, note_bad_images
from karat_scale.analysis.trained_run import TrainedRun
from karat_scale.analysis.trajectory import Plane, plane_of_run
from karat_scale.analysis.validation_images import ImagesInMemory
from karat_scale.errors import RunDirectoryError
from karat_scale.models.factory import layer_sizes

MARGIN = 0.25
PRODUCTS = 40
PROBES = 8
# Memory of the graph of a Hessian-vector product, in N x N matrices per head and block; measured up to G = 3.
GRAPH_MATRICES = 80
GRAPH_BYTES = 1 << 30
Array = npt.NDArray[np.float64]


def analyze_landscape(run: TrainedRun, settings: Settings, out: Path) -> Result:
    """Compute losses around the last checkpoint's raw weights, in the plane of the path and a random one; sharpness.

    Collective: the ranks share the points of the grids. Only rank 0's result has the sharpness.

    Args:
        out: the directory of unfinished grids.

    Raises:
        UserError: the run has no checkpoint, or its data cannot be read. Too few checkpoints for the path are a note.
    """
    result = Result()
    with settings.world.together():
        last = run.in_order[-1]
        images = run.images(settings.samples)
        held_out = images.in_memory(max(settings.batch, 32), run.device)
        note_bad_images(result, run, images.bad)
        model = run.model(last, weights="raw")
        plane = _plane(run, result)
    identity = f"{last} {images.ids}"
    result.numbers["checkpoint"], result.numbers["images"] = last, len(held_out)
    if plane is not None:
        first, second = (_axis(plane.coordinates[:, i], settings) for i in range(2))
        losses = _grid(model, held_out, plane.directions, first, second, out, "path", identity, settings)
        _add_path(result, run, plane, (first, second, losses))
        del plane  # two directions take twice the memory of the model
    around = np.linspace(-settings.range, settings.range, settings.grid)
    directions = filter_normalised(model, settings.seed)
    losses = _grid(model, held_out, directions, around, around, out, "random", identity, settings)
    _add_surface(result, "random", (around, around, losses), "two random filter-normalised directions")
    del directions, model
    if settings.world.is_main:
        _add_sharpness(result, run, last, settings)
    return result


def mean_loss(model: nn.Module, images: ImagesInMemory) -> float:
    """Return the mean cross-entropy over the images."""
    with torch.no_grad():
        return sum(float(cross_entropy(model(x), y, reduction="sum")) for x, y in images) / len(images)


def _plane(run: TrainedRun, result: Result) -> Plane | None:
    try:
        return plane_of_run(run, result.notes)
    except RunDirectoryError as error:
        result.notes.append(str(error))
        return None


def _axis(coordinates: Array, settings: Settings) -> Array:
    """Return the path's extent with a margin on both sides."""
    low, high = float(coordinates.min()), float(coordinates.max())
    margin = settings.range * MARGIN * max(high - low, 1e-6)
    return np.linspace(low - margin, high + margin, settings.grid)


def _grid(
    model: nn.Module,
    images: ImagesInMemory,
    directions: npt.NDArray[np.float32],
    first: Array,
    second: Array,
    out: Path,
    name: str,
    identity: str,
    settings: Settings,
) -> Array:
    return loss_grid(
        model,
        lambda: mean_loss(model, images),
        directions,
        first,
        second,
        out / f".landscape-{name}",
        identity,
        lambda done, total: settings.progress(f"landscape, {name}", done, total),
        settings.world,
    )


def _add_path(result: Result, run: TrainedRun, plane: Plane, grid: tuple[Array, Array, Array]) -> None:
    steps = [run.step(name) for name in plane.names]
    shares = (100 * plane.shares).tolist()
    result.numbers["path"] = {
        "steps": steps,
        "coordinates": plane.coordinates.tolist(),
        "share_percent": shares,
        "plane_share_percent": sum(shares),
    }
    result.arrays["path"] = plane.coordinates
    _add_surface(result, "path", grid, "the plane of the path's two main components")
    figure = new_figure(5.4, 4.2)
    axes = figure.subplots()
    filled = axes.contourf(*grid[:2], np.log10(grid[2]), levels=20, cmap="viridis")
    figure.colorbar(filled, label="log10 of the loss")
    axes.plot(*plane.coordinates.T, "o-", color="white", markersize=3, linewidth=1)
    axes.plot(*plane.coordinates[0], "s", color="C4", label=f"step {steps[0]}")
    axes.plot(*plane.coordinates[-1], "*", color="C1", markersize=11, label=f"step {steps[-1]}")
    axes.set(xlabel=f"component 1 ({shares[0]:.0f} % of the path)", ylabel=f"component 2 ({shares[1]:.0f} %)")
    axes.legend(labelcolor="white")
    caption = (
        "The optimizer's path over the held-out loss; the plane holds "
        f"{sum(shares):.1f} % of the squared distances from the last checkpoint."
    )
    result.figures["optimizer_path"] = figure, caption


def _add_surface(result: Result, name: str, grid: tuple[Array, Array, Array], where: str) -> None:
    first, second, losses = grid
    result.arrays |= {f"{name}_first": first, f"{name}_second": second, f"{name}_loss": losses}
    result.numbers[f"{name}_loss"] = {"least": float(np.nanmin(losses)), "greatest": float(np.nanmax(losses))}
    result.figures[f"{name}_surface"] = _draw_surface(first, second, losses), f"Held-out loss over {where}."


def _draw_surface(first: Array, second: Array, losses: Array) -> Figure:
    figure = new_figure(9, 4)
    grid = figure.add_gridspec(1, 2, width_ratios=(1.2, 1))
    surface = figure.add_subplot(grid[0, 0], projection="3d")
    x, y = np.meshgrid(first, second)
    z = np.log10(losses)
    surface.plot_surface(x, y, z, cmap="viridis", linewidth=0, antialiased=True)
    surface.set(xlabel="direction 1", ylabel="direction 2", zlabel="log10 of the loss")
    flat = figure.add_subplot(grid[0, 1])
    lines = flat.contour(first, second, z, levels=15, cmap="viridis")
    flat.clabel(lines, fontsize=6)
    flat.plot(0, 0, "*", color="C1", markersize=10)
    flat.set(xlabel="direction 1", ylabel="direction 2")
    return figure


def _images_of_a_graph(run: TrainedRun) -> int:
    """Return the number of images whose graphs fit in GRAPH_BYTES; at least one."""
    scores = sum(size.heads * size.scores for size in layer_sizes(run.recipe.model))
    return max(1, GRAPH_BYTES // (4 * GRAPH_MATRICES * scores))


def _add_sharpness(result: Result, run: TrainedRun, last: str, settings: Settings) -> None:
    model = run.model(last, weights="raw", implementation="reference")
    batch = min(settings.batch, _images_of_a_graph(run))
    images = run.images(settings.hessian_samples).in_memory(batch, run.device)
    products = 0

    def losses() -> Iterator[Tensor]:
        nonlocal products
        products += 1
        settings.progress("sharpness", products, PRODUCTS * settings.eigenvalues + PROBES)
        for x, y in images:
            yield cross_entropy(model(x), y, reduction="sum") / len(images)

    hessian = Hessian(list(model.parameters()), losses)
    values: list[Eigenvalue] = []
    try:
        values = hessian.top_eigenvalues(settings.eigenvalues, PRODUCTS * settings.eigenvalues, settings.seed)
    except RunDirectoryError as refused:
        result.notes.append(str(refused))
    trace, error = hessian.trace(PROBES, settings.seed)
    result.numbers["hessian"] = {
        "images": len(images),
        "top_eigenvalues": [found.value for found in values],
        "converged": [found.converged for found in values],
        "trace": trace,
        "trace_error": error,
    }
    rows: list[list[object]] = [
        [f"eigenvalue {i}{'' if found.converged else ', not converged'}", found.value]
        for i, found in enumerate(values, start=1)
    ]
    rows += [["trace", trace], ["standard error of the trace", error]]
    title = f"Sharpness: Hessian of the held-out loss on {len(images)} images"
    result.tables.append(Table(title, ["figure", "value"], rows))
