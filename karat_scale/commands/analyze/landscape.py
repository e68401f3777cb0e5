"""The loss landscape and the optimizer's path over it (paper, sections 5.1 and 5.2)."""

import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn
from torch.nn.functional import cross_entropy

from karat_scale.commands.analyze.figures import OWN_LIMITS, new_figure
from karat_scale.commands.analyze.loss_grid import filter_normalised, loss_grid
from karat_scale.commands.analyze.result import Result, Settings, note_bad_images, say_cost
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.commands.analyze.trajectory import Plane, plane_of_run
from karat_scale.commands.analyze.validation_images import ImagesInMemory
from karat_scale.foundation.errors import RunDirectoryError

MARGIN = 0.25
Array = npt.NDArray[np.float64]


def analyze_landscape(run: TrainedRun, settings: Settings, out: Path) -> Result:
    """Compute losses around the raw weights of the last intact checkpoint, in the plane of the path and a random one.

    Collective: the ranks share the points of the grids.

    Args:
        out: the directory of unfinished grids.

    Raises:
        UserError: no checkpoint can be loaded, or the data cannot be read. Too few checkpoints for the path are a note.
    """
    result = Result()
    with settings.world.together():
        model = run.new_model()
        last = run.load_newest(model)
        images = run.images(settings.samples)
        held_out = images.in_memory(max(settings.batch, 32), run.device)
        note_bad_images(result, images.bad)
        plane = _plane(run, result, settings)
    _say_cost(model, held_out, 1 if plane is None else 2, settings)
    identity = f"{last} {images.ids} {run.data_identity}"
    result.numbers["checkpoint"], result.numbers["images"] = last, len(held_out)
    if plane is not None:
        first, second = (_axis(plane.coordinates[:, i], settings) for i in range(2))
        losses = _grid(model, held_out, plane.directions, first, second, out, "path", identity, settings)
        _add_path(result, run, plane, (first, second, losses), last)
        del plane  # two directions take twice the memory of the model
    around = np.linspace(-settings.range, settings.range, settings.grid)
    directions = filter_normalised(model, settings.seed)
    losses = _grid(model, held_out, directions, around, around, out, "random", identity, settings)
    _add_surface(result, "random", (around, around, losses), "two random filter-normalised directions", last)
    return result


def _say_cost(model: nn.Module, images: ImagesInMemory, grids: int, settings: Settings) -> None:
    """Measure the loss at one point, and tell what all points take."""
    mean_loss(model, images)  # warms up
    started = time.perf_counter()
    mean_loss(model, images)
    points = -(-grids * settings.grid**2 // settings.world.size)
    say_cost(settings, "landscape", points, time.perf_counter() - started, "--grid and --samples make it shorter")


def mean_loss(model: nn.Module, images: ImagesInMemory) -> float:
    """Return the mean cross-entropy over the images."""
    with torch.no_grad():
        return sum(float(cross_entropy(model(x), y, reduction="sum")) for x, y in images) / len(images)


def _plane(run: TrainedRun, result: Result, settings: Settings) -> Plane | None:
    try:
        return plane_of_run(run, result.notes, lambda done, of: settings.progress("read the path", done, of))
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


def _add_path(result: Result, run: TrainedRun, plane: Plane, grid: tuple[Array, Array, Array], last: str) -> None:
    steps = [run.step(name) for name in plane.names]
    shares = (100 * plane.shares).tolist()
    result.numbers["path"] = {
        "steps": steps,
        "coordinates": plane.coordinates.tolist(),
        "share_percent": shares,
        "plane_share_percent": sum(shares),
    }
    result.arrays["path"] = plane.coordinates
    _add_surface(result, "path", grid, "the plane of the path's two main components", last)
    figure = new_figure(5.4, 4.2)
    axes = figure.subplots()
    axes.set_label(OWN_LIMITS)  # each run has its own plane
    filled = axes.contourf(*grid[:2], np.log10(grid[2]), levels=20, cmap="viridis")
    filled.set_edgecolor("face")
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


def _add_surface(result: Result, name: str, grid: tuple[Array, Array, Array], where: str, last: str) -> None:
    first, second, losses = grid
    result.arrays |= {f"{name}_first": first, f"{name}_second": second, f"{name}_loss": losses}
    result.numbers[f"{name}_loss"] = {"least": float(np.nanmin(losses)), "greatest": float(np.nanmax(losses))}
    figure = _draw_surface(first, second, losses, own_plane=name == "path")
    caption = f"Held-out loss over {where}. The star is the last checkpoint ({last}), its raw weights."
    result.figures[f"{name}_surface"] = figure, caption


def _draw_surface(first: Array, second: Array, losses: Array, own_plane: bool) -> Figure:
    figure = new_figure(9, 4)
    grid = figure.add_gridspec(1, 2, width_ratios=(1.2, 1))
    surface = figure.add_subplot(grid[0, 0], projection="3d")
    x, y = np.meshgrid(first, second)
    z = np.log10(losses)
    surface.plot_surface(x, y, z, cmap="viridis", linewidth=0, antialiased=True)
    surface.set(xlabel="direction 1", ylabel="direction 2", title="log10 of the loss")
    for axis in (surface.xaxis, surface.yaxis, surface.zaxis):
        axis.set_pane_color((0.5, 0.5, 0.5, 0.08))
        axis.set_major_locator(MaxNLocator(4))
    flat = figure.add_subplot(grid[0, 1])
    shown = flat.contourf(first, second, z, levels=20, cmap="viridis")
    shown.set_edgecolor("face")  # else the page shows between the bands
    figure.colorbar(shown, label="log10 of the loss")
    flat.plot(0, 0, "*", color="C1", markersize=10)
    flat.set(xlabel="direction 1", ylabel="direction 2")
    if own_plane:
        for axes in (surface, flat):
            axes.set_label(OWN_LIMITS)
    return figure
