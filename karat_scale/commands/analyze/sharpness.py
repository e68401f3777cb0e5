"""Sharpness of a checkpoint: eigenvalues and trace of the Hessian of the held-out loss (paper, section 5.2)."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from karat_scale.commands.analyze.curvature import Hessian
from karat_scale.commands.analyze.result import Result, Settings, Table, note_bad_images, say_cost
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.models.factory import layer_sizes

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
    images = chosen.in_memory(_images_of_a_graph(run), run.device)
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


def _images_of_a_graph(run: TrainedRun) -> int:
    """Return the number of images whose graphs fit in GRAPH_BYTES; at least one."""
    scores = sum(size.heads * size.scores for size in layer_sizes(run.recipe.model))
    return max(1, GRAPH_BYTES // (4 * GRAPH_MATRICES * scores))
