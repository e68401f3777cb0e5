"""The sharpness of a checkpoint: eigenvalues and trace of the Hessian of its held-out loss (paper, section 5.2).

The Hessian is known only by its products with vectors. scipy's Lanczos finds the eigenvalues that are largest in size.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from karat_scale.commands.analyze.result import Result, Settings, Table, note_bad_images, say_cost
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.models.factory import layer_sizes

TOLERANCE = 1e-3
ROWS = 4
"""Size of the basis, as a multiple of the number of eigenvalues."""
Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Eigenvalue:
    """`converged`: True if ||H v - value v|| is at most TOLERANCE |value| for its unit vector v."""

    value: float
    converged: bool


def basis_size(count: int, length: int) -> int:
    """Return how many vectors of the operator's length are held in memory."""
    return min(ROWS * (count + 1), length)


def largest_eigenvalues(
    times: Callable[[Vector], Vector], length: int, count: int, products: int, seed: int
) -> list[Eigenvalue]:
    """Return the `count` eigenvalues largest in size, with sign, largest first; all of them if there are fewer.

    One more is computed: of two equal eigenvalues, the last would often be missed. If not all have converged, the
    values that were found are marked, since a larger one may be missing; those that were not found are NaN.

    Args:
        times: returns H v for v [length].
        products: most products.
    """
    count, rows = min(count, length), basis_size(count, length)

    def product(vector: Vector) -> Vector:
        found = times(vector.ravel())
        if not np.isfinite(found).all():
            raise FloatingPointError
        return found

    values, converged = np.zeros(0), False
    restarts = (products - 1 - rows) // max(rows - count - 1, 1)  # ARPACK begins with a product more than rows
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
    return [Eigenvalue(value, converged) for value in ordered[:count]]


Vectors = list[Tensor]


class Hessian:
    """The Hessian of a mean of losses, as products with vectors. The matrix itself is never stored.

    Args:
        parameters: the parameters of the derivative.
        losses: called for each product. It yields parts whose sum is the loss, so that one part's graph at a time is in
            memory. The graph must be differentiable twice (the operator's "reference").
    """

    def __init__(self, parameters: Sequence[Tensor], losses: Callable[[], Any]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._losses = losses

    def times(self, vectors: Sequence[Tensor]) -> Vectors:
        """Return H v, in parts with the parameters' shapes."""
        total = [torch.zeros_like(v) for v in vectors]
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            for loss in self._losses():
                grads = torch.autograd.grad(loss, self._parameters, create_graph=True, materialize_grads=True)
                inner = sum((g * v).sum() for g, v in zip(grads, vectors, strict=True))
                assert isinstance(inner, Tensor)
                parts = torch.autograd.grad(inner, self._parameters, materialize_grads=True)
                torch._foreach_add_(total, list(parts))
                del loss, grads, inner, parts  # as large as the model, beside the next part's graph
        return total

    def top_eigenvalues(self, count: int, products: int, seed: int) -> list[Eigenvalue]:
        """Return the `count` eigenvalues largest in size, with sign, largest first. See `largest_eigenvalues`."""
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
    images = chosen.in_memory(in_a_graph, run.device)
    note_bad_images(result, chosen.bad)
    most, products = PRODUCTS * settings.eigenvalues + PROBES, 0

    def losses() -> Iterator[Tensor]:
        nonlocal products
        products += 1
        settings.progress("sharpness", min(products, most), most)
        for x, y in images:
            yield cross_entropy(model(x), y, reduction="sum") / len(images)

    hessian = Hessian(list(model.parameters()), losses)
    started = time.perf_counter()
    hessian.times([torch.zeros_like(parameter) for parameter in model.parameters() if parameter.requires_grad])
    say_cost(settings, "sharpness", most, time.perf_counter() - started, "--hessian-samples makes it shorter")
    values = hessian.top_eigenvalues(settings.eigenvalues, PRODUCTS * settings.eigenvalues, settings.seed)
    trace, error = hessian.trace(PROBES, settings.seed)
    result.numbers = {
        "checkpoint": run.chosen,
        "weights": run.weights_kind,
        "images": len(images),
        "products": products,
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
    title = f"Hessian of the held-out loss on {len(images)} images, {run.chosen} ({run.weights_kind} weights)"
    result.tables.append(Table(title, ["figure", "value"], rows))
    return result
