"""The loss around a run: its landscape, the optimizer's path over it, and its sharpness (paper, sections 5.1 and 5.2).

The path is the PCA of the weights' changes over the checkpoints. The landscape is the loss on a grid of points in a
plane of weight space. Ranks share the points; results are saved in between. Sharpness is eigenvalues and trace of the
Hessian, which is known only by its products with vectors; scipy's Lanczos finds the eigenvalues that are largest in
size.
"""

import hashlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.ticker import MaxNLocator
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from karat_scale.attention import KaratOperator
from karat_scale.attention.forms import SECOND
from karat_scale.commands.analyze.result import Result, Settings, Table, note_bad_images, say_cost
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.commands.figures import OWN_LIMITS, new_axes, new_figure
from karat_scale.engine.distributed import ALONE, World
from karat_scale.engine.memory import one_line_out_of_memory
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.foundation.files import open_to_read, replace_file
from karat_scale.models.factory import layer_sizes

CHUNK = 1 << 20
NEEDED = 3
Array = npt.NDArray[np.float64]
Directions = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Plane:
    """Two orthonormal directions through a point of weight space.

    names: the checkpoints, oldest first; the last is the origin. coordinates: [n, 2], their positions in the plane.
    shares: [2], each direction's share of the squared distances from the last checkpoint (the changes are not centred,
    so this is not variance). directions: [2, P], float32.
    """

    names: list[str]
    coordinates: npt.NDArray[np.float64]
    shares: npt.NDArray[np.float64]
    directions: npt.NDArray[np.float32]


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that make up a point of weight space, in the order of its coordinates."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def flatten(model: nn.Module) -> Tensor:
    """Return all trainable weights as one vector [P], float32, on the CPU."""
    return torch.cat([parameter.detach().flatten().float().cpu() for _, parameter in trainable(model)])


def principal_plane(changes: Path, names: list[str]) -> Plane:
    """Return the PCA of changes [n, P] from the last checkpoint, not centred, so that the plane contains the origin.

    Only the n x n matrix of inner products is decomposed, and P is processed in pieces. changes: a file of float32.
    """
    rows, length = len(names), changes.stat().st_size // (4 * len(names))
    parts = [slice(start, start + CHUNK) for start in range(0, length, CHUNK)]

    def piece(part: slice) -> Array:
        # A new mapping, since the pages of one mapping would add up in memory.
        mapped = np.memmap(changes, dtype=np.float32, mode="r", shape=(rows, length))
        return np.array(mapped[:, part], dtype=np.float64)

    gram = np.zeros((rows, rows))
    for part in parts:
        own = piece(part)
        gram += own @ own.T
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1][:2].clip(min=1e-30), vectors[:, ::-1][:, :2]
    # Signs that do not depend on the machine: all ranks need the same plane.
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), [0, 1]])
    directions = np.empty((2, length), dtype=np.float32)
    for part in parts:
        directions[:, part] = (vectors / np.sqrt(values)).T @ piece(part)
    coordinates = vectors * np.sqrt(values)
    return Plane(names, coordinates, values / max(float(np.trace(gram)), 1e-30), directions)


def plane_of_run(
    run: TrainedRun, notes: list[str], progress: Callable[[int, int], None] = lambda done, total: None
) -> Plane:
    """Return the plane of a run's raw weights. Raises RunDirectoryError if too few checkpoints can be loaded.

    Args:
        notes: receives a line for each damaged checkpoint that is left out.
        progress: called with the number of checkpoints read and the total number.
    """
    names = []
    model = run.new_model()
    run.load_newest(model)
    last = flatten(model).numpy()
    # On disk, since all checkpoints' weights together may not fit in memory.
    with tempfile.TemporaryDirectory(prefix="karat-analysis-") as directory:
        path = Path(directory) / "changes"
        with path.open("wb") as file:
            for number, name in enumerate(run.in_order, start=1):
                progress(number, len(run.in_order))
                try:
                    run.load(model, name, "raw")
                except RunDirectoryError as error:
                    notes.append(f"left out: {error}")
                    continue
                file.write((flatten(model).numpy() - last).data)
                names.append(name)
        if len(names) < NEEDED:
            raise RunDirectoryError(
                f"{run.path}: {len(names)} checkpoints and snapshots, but PCA of the path needs {NEEDED}; "
                "train with checkpoint.snapshots=10"
            )
        return principal_plane(path, names)


def loss_grid(
    model: nn.Module,
    loss: Callable[[], float],
    directions: Directions,
    first: Array,
    second: Array,
    unfinished: Path,
    identity: str,
    progress: Callable[[int, int], None],
    world: World = ALONE,
) -> Array:
    """Return loss() at weights + a d1 + b d2 for a in `first`, b in `second`: [len(second), len(first)]. Collective.

    The ranks share the points. Each saves its results after every row's worth of points, so a command that was stopped
    resumes from there, on any number of ranks.

    Args:
        model: its weights are the origin; they are restored afterwards.
        loss: the loss of the model with its current weights.
        directions: d1 and d2, [2, P].
        unfinished: path prefix of files of finished points, removed at the end. Files of other inputs are ignored.
        identity: everything else that the losses depend on, such as checkpoint and images.
    """

    def files() -> list[Path]:
        return sorted(unfinished.parent.glob(f"{unfinished.name}-*.npz"))

    origin = flatten(model)
    shape = (len(second), len(first))
    key, losses, done = "", np.full(shape, np.nan), np.zeros(shape, dtype=bool)
    with world.together():
        if world.is_main:
            digest = hashlib.sha256(identity.encode())
            for array in (origin.numpy(), directions, first, second):
                digest.update(np.ascontiguousarray(array).tobytes())
            key = digest.hexdigest()
            for path in files():  # which the ranks of an earlier command saved
                with open_to_read(path) as file, np.load(file) as content:
                    if str(content["key"]) == key:
                        losses[content["done"]] = content["losses"][content["done"]]
                        done |= content["done"]
    key, losses, done = world.broadcast((key, losses, done))
    mine = np.flatnonzero(~done)[world.rank :: world.size]
    with world.together():
        try:
            for number, point in enumerate(mine, start=1):
                row, column = divmod(int(point), len(first))
                _move(model, origin, directions, float(first[column]), float(second[row]))
                losses[row, column], done[row, column] = loss(), True
                progress(number, len(mine))
                if number % len(first) == 0:
                    saved = io.BytesIO()
                    np.savez(saved, key=key, losses=losses, done=done)
                    replace_file(unfinished.with_name(f"{unfinished.name}-{world.rank}.npz"), saved.getvalue())
        finally:
            _move(model, origin, directions, 0.0, 0.0)
    for points, values in world.gather((mine, losses.flat[mine])):
        losses.flat[points] = values
    if world.is_main:
        for path in files():
            path.unlink()
    return losses


def filter_normalised(model: nn.Module, seed: int) -> Directions:
    """Return two random directions [2, P] whose filters have the norms of the model's own (Li et al., 2018).

    A filter is the weights of one output. In KArAt's parameters an output is a unit p of a head (its filter is all its
    functions phi_pq) or the token of a row of W. Biases and norms do not move.
    """
    units = {  # the axis of the units p of each parameter of the operators' functions
        f"{prefix}.{before}{name}": shape.index(-1)
        for prefix, module in model.named_modules()
        if isinstance(module, KaratOperator)
        for name, shape in module.basis.shapes(1, -1, 1).items()
        for before in ("", SECOND)
    }
    generator = torch.Generator().manual_seed(seed)
    directions = np.empty((2, len(flatten(model))), dtype=np.float32)
    for direction in torch.from_numpy(directions):
        start = 0
        for name, parameter in trainable(model):
            weights = parameter.detach().float().cpu()
            noise = direction[start : start + weights.numel()].view_as(weights)
            torch.randn(weights.shape, generator=generator, out=noise)
            start += weights.numel()
            if weights.dim() < 2:
                noise.zero_()
            else:
                outputs = {0} if weights.shape[0] > 1 and ".operator." not in name else {0, units.get(name, 1)}
                over = tuple(axis for axis in range(weights.dim()) if axis not in outputs) or (1,)
                size = noise.square().sum(over, keepdim=True).sqrt().clamp(min=1e-12)
                noise *= weights.square().sum(over, keepdim=True).sqrt() / size
    return directions


@torch.no_grad()
def _move(model: nn.Module, origin: Tensor, directions: Directions, a: float, b: float) -> None:
    """Set the weights to origin + a d1 + b d2, one parameter at a time."""
    start = 0
    for _, parameter in trainable(model):
        part = slice(start, start + parameter.numel())
        one, two = torch.from_numpy(directions[:, part])
        parameter.copy_((origin[part] + a * one + b * two).view_as(parameter))
        start = part.stop


MARGIN = 0.25


def analyze_landscape(run: TrainedRun, settings: Settings) -> Result:
    """Compute losses around the raw weights of the last intact checkpoint, in the plane of the path and a random one.

    Collective: the ranks share the points of the grids.

    Raises:
        UserError: no checkpoint can be loaded, or the data cannot be read. Too few checkpoints for the path are a note.
    """
    result = Result()
    plane = None
    with settings.world.together():
        model = run.new_model()
        last = run.load_newest(model)
        images = run.images(settings.samples)
        kept = list(images.raw(max(settings.batch, 32)))  # as bytes
        note_bad_images(result, images.bad)
        try:
            plane = plane_of_run(run, result.notes, partial(settings.progress, "read the path"))
        except RunDirectoryError as error:
            result.notes.append(str(error))

    @torch.no_grad()
    def loss() -> float:
        with one_line_out_of_memory(lambda: f"lower --batch (now {settings.batch})"):
            batches = images.batches(kept, run.device)
            return sum(float(cross_entropy(model(x), y, reduction="sum")) for x, y in batches) / count

    count = len(images) - images.bad
    with settings.world.together():
        loss()  # warms up
        started = time.perf_counter()
        loss()
        seconds = time.perf_counter() - started
    points = -(-(1 if plane is None else 2) * settings.grid**2 // settings.world.size)
    say_cost(settings, "landscape", points, seconds, "--grid and --samples make it shorter")
    identity = f"{last} {images.ids} {run.data_identity} {run.data_digest}"
    result.numbers["checkpoint"], result.numbers["images"] = last, count

    def losses(name: str, directions: Directions, first: Array, second: Array) -> tuple[Array, Array, Array]:
        unfinished = settings.directory / f".landscape-{name}"
        progress = partial(settings.progress, f"landscape, {name}")
        found = loss_grid(model, loss, directions, first, second, unfinished, identity, progress, settings.world)
        return first, second, found

    if plane is not None:
        low, high = plane.coordinates.min(0), plane.coordinates.max(0)
        margin = settings.range * MARGIN * np.maximum(high - low, 1e-6)
        axes = np.linspace(low - margin, high + margin, settings.grid).T
        _add_path(result, run, plane, losses("path", plane.directions, *axes), last)
        del plane  # two directions take twice the memory of the model
    around = np.linspace(-settings.range, settings.range, settings.grid)
    grid = losses("random", filter_normalised(model, settings.seed), around, around)
    _add_surface(result, "random", grid, "two random filter-normalised directions", last)
    return result


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
    figure, axes = new_axes(5.4, 4.2)
    axes.set_label(OWN_LIMITS)  # each run has its own plane
    filled = axes.contourf(*grid[:2], np.log10(grid[2]), levels=20, cmap="viridis")
    filled.set_edgecolor("face")
    figure.colorbar(filled, label="log10 of the loss")
    axes.plot(*plane.coordinates.T, "o-", color="white", markersize=3, linewidth=1)
    axes.plot(*plane.coordinates[0], "s", color="C4", label=f"step {steps[0]}")
    axes.plot(*plane.coordinates[-1], "*", color="C1", markersize=11, label=f"step {steps[-1]}")
    axes.set(xlabel=f"component 1 ({shares[0]:.0f} % of the path)", ylabel=f"component 2 ({shares[1]:.0f} %)")
    axes.legend(labelcolor="white")
    caption = "The optimizer's path over the held-out loss."
    if len(steps) > 3:  # of fewer, a plane holds all
        caption = (
            f"{caption[:-1]}; the plane holds {sum(shares):.1f} % of the squared distances from the last checkpoint."
        )
    result.figures["optimizer_path"] = figure, caption


def _add_surface(result: Result, name: str, grid: tuple[Array, Array, Array], where: str, last: str) -> None:
    first, second, losses = grid
    result.arrays |= {f"{name}_first": first, f"{name}_second": second, f"{name}_loss": losses}
    result.numbers[f"{name}_loss"] = {"least": float(np.nanmin(losses)), "greatest": float(np.nanmax(losses))}
    caption = f"Held-out loss over {where}. The star is the last checkpoint ({last}), its raw weights."
    figure = new_figure(9, 4)
    result.figures[f"{name}_surface"] = figure, caption
    halves = figure.add_gridspec(1, 2, width_ratios=(1.2, 1))
    surface = figure.add_subplot(halves[0, 0], projection="3d")
    x, y = np.meshgrid(first, second)
    z = np.log10(losses)
    surface.plot_surface(x, y, z, cmap="viridis", linewidth=0, antialiased=True)
    surface.set(xlabel="direction 1", ylabel="direction 2", title="log10 of the loss")
    for axis in (surface.xaxis, surface.yaxis, surface.zaxis):
        axis.set_pane_color((0.5, 0.5, 0.5, 0.08))
        axis.set_major_locator(MaxNLocator(4))
    flat = figure.add_subplot(halves[0, 1])
    shown = flat.contourf(first, second, z, levels=20, cmap="viridis")
    shown.set_edgecolor("face")  # else the page shows between the bands
    figure.colorbar(shown, label="log10 of the loss")
    flat.plot(0, 0, "*", color="C1", markersize=10)
    flat.set(xlabel="direction 1", ylabel="direction 2")
    if name == "path":  # each run has its own plane
        for axes in (surface, flat):
            axes.set_label(OWN_LIMITS)


TOLERANCE = 1e-3
ROWS = 4
"""Size of the basis, as a multiple of the number of eigenvalues."""
Vector = npt.NDArray[np.float32]


def largest_eigenvalues(
    times: Callable[[Vector], Vector], length: int, count: int, products: int, seed: int
) -> tuple[list[float], bool]:
    """Return the `count` eigenvalues largest in size, with sign, largest first, and whether all have converged.

    Converged means that ||H v - value v|| is at most TOLERANCE |value| for the unit vector v of each; else a larger one
    may be missing. If there are fewer than `count`, all are returned; values that were not found are NaN. One more than
    `count` is computed, as otherwise the last of two equal ones would often be missed.

    Args:
        times: returns H v for v [length].
        products: the largest number of products.
    """
    count = min(count, length)
    rows = min(ROWS * (count + 1), length)

    def product(vector: Vector) -> Vector:
        found = times(vector.ravel())
        if not np.isfinite(found).all():
            raise FloatingPointError
        return found

    values: npt.NDArray[Any] = np.zeros(0)
    converged = False
    restarts = (products - 1 - rows) // max(rows - count - 1, 1)  # ARPACK begins with rows + 1 products
    try:
        if rows == length <= products:  # the whole matrix takes no more products
            matrix = np.stack([product(row) for row in np.eye(length, dtype=np.float32)])
            values, converged = np.linalg.eigvalsh((matrix + matrix.T) / 2), True
        elif rows < length and restarts > 0:
            start = np.random.default_rng(seed).standard_normal(length, dtype=np.float32)
            operator = LinearOperator((length, length), matvec=product, dtype=np.float32)
            more = {"v0": start, "ncv": rows, "maxiter": restarts, "tol": TOLERANCE, "return_eigenvectors": False}
            values, converged = eigsh(operator, count + 1, which="LM", **more), True
    except ArpackNoConvergence as error:
        values = error.eigenvalues
    except (ArpackError, FloatingPointError):
        pass
    ordered = [*sorted(map(float, values), key=abs, reverse=True), *[float("nan")] * count]
    return ordered[:count], converged


class Hessian:
    """The Hessian of a mean of losses, as products with vectors. The matrix itself is never stored.

    Args:
        parameters: the parameters of the derivative.
        losses: called for each product. It yields parts whose sum is the loss, so that only one part's graph is in
            memory at a time. The graph must be differentiable twice (the operator's "reference").
    """

    def __init__(self, parameters: Sequence[Tensor], losses: Callable[[], Any]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._losses = losses

    def times(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return H v, in parts with the parameters' shapes."""
        total = [torch.zeros_like(v) for v in vectors]
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            for loss in self._losses():
                grads = torch.autograd.grad(loss, self._parameters, create_graph=True, materialize_grads=True)
                inner = sum((g * v).sum() for g, v in zip(grads, vectors, strict=True))
                assert isinstance(inner, Tensor)
                parts = torch.autograd.grad(inner, self._parameters, materialize_grads=True)
                torch._foreach_add_(total, list(parts))
                del loss, grads, inner, parts  # as large as the model; freed before the next part's graph
        return total

    def top_eigenvalues(self, count: int, products: int, seed: int) -> tuple[list[float], bool]:
        """Return what `largest_eigenvalues` finds."""
        sizes = [p.numel() for p in self._parameters]

        def times(vector: Vector) -> Vector:
            parts = zip(torch.from_numpy(vector).split(sizes), self._parameters, strict=True)
            product = self.times([part.view_as(p).to(p) for part, p in parts])
            return torch.cat([part.flatten().float().cpu() for part in product]).numpy()

        return largest_eigenvalues(times, sum(sizes), count, products, seed)

    def trace(self, probes: int, seed: int) -> tuple[float, float]:
        """Return Hutchinson's estimate of the trace with Rademacher probes, and its standard error."""
        generator = torch.Generator().manual_seed(seed)
        samples = []
        for _ in range(probes):
            noise = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in self._parameters]
            signs = [torch.where(x < 0, -1.0, 1.0).to(x.dtype) for x in noise]
            pairs = zip(self.times(signs), signs, strict=True)
            samples.append(float(sum((a * b).sum(dtype=torch.float64) for a, b in pairs)))
        values = torch.tensor(samples, dtype=torch.float64)
        error = values.std().item() / probes**0.5 if probes > 1 else float("nan")
        return values.mean().item(), error


PRODUCTS = 40
PROBES = 8
# Memory of the graph of a Hessian-vector product, in N x N matrices per head and block; measured up to G = 3.
GRAPH_MATRICES = 80
GRAPH_BYTES = 1 << 30


def analyze_sharpness(run: TrainedRun, settings: Settings) -> Result:
    """Compute the eigenvalues that are largest in size and the trace, for the chosen checkpoint and weights.

    Raises:
        UserError: the run has no checkpoint, or its data cannot be read.
    """
    result = Result()
    model = run.model(implementation="reference")
    chosen = run.images(settings.hessian_samples)
    scores = sum(size.heads * size.scores for size in layer_sizes(run.recipe.model))
    in_a_graph = max(1, GRAPH_BYTES // (4 * GRAPH_MATRICES * scores))
    kept = list(chosen.raw(in_a_graph))
    count = len(chosen) - chosen.bad
    note_bad_images(result, chosen.bad)
    most, done = PRODUCTS * settings.eigenvalues + PROBES, 0

    def losses() -> Iterator[Tensor]:
        nonlocal done
        done += 1
        settings.progress("sharpness", min(done, most), most)
        for x, y in chosen.batches(kept, run.device):
            yield cross_entropy(model(x), y, reduction="sum") / count

    hessian = Hessian(list(model.parameters()), losses)
    started = time.perf_counter()
    hessian.times([torch.zeros_like(parameter) for parameter in model.parameters() if parameter.requires_grad])
    shorter = "less if its eigenvalues converge early; --hessian-samples makes it shorter"
    say_cost(settings, "sharpness", most, time.perf_counter() - started, shorter)
    values, converged = hessian.top_eigenvalues(settings.eigenvalues, PRODUCTS * settings.eigenvalues, settings.seed)
    products, done = done + PROBES, max(done, most - PROBES)  # products that early convergence saved count as done
    trace, error = hessian.trace(PROBES, settings.seed)
    result.numbers = {
        "checkpoint": run.chosen,
        "weights": run.weights_kind,
        "images": count,
        "products": products,
        "top_eigenvalues": values,
        "converged": [converged] * len(values),
        "trace": trace,
        "trace_error": error,
    }
    unsure = "" if converged else ", not converged"
    rows: list[list[object]] = [[f"eigenvalue {i}{unsure}", value] for i, value in enumerate(values, start=1)]
    rows += [["trace", trace], ["standard error of the trace", error]]
    title = f"Hessian of the held-out loss on {count} images, {run.chosen} ({run.weights_kind} weights)"
    result.tables.append(Table(title, ["figure", "value"], rows))
    return result
