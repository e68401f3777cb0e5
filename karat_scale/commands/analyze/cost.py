"""What the analyses of a run will take, before they start: a pass of its model is timed, and the rest counted in it."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from karat_scale.commands.analyze.history import read_history
from karat_scale.commands.analyze.landscape import NEEDED, PROBES, PRODUCTS
from karat_scale.commands.analyze.predictions import FILE, PREDICT
from karat_scale.commands.analyze.result import Settings
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.models.factory import layer_sizes

PASSES = 20
"""Passes of a model that take as long as one of its Hessian-vector products."""
FIGURE = 0.8
"""Seconds to draw a figure and to write it as PNG and SVG."""


@torch.no_grad()
def expected(run: TrainedRun, names: Sequence[str], settings: Settings) -> dict[tuple[str, str], float]:
    """Return seconds by analysis and by the name under which the work progresses, from random weights and images."""
    model, side, sizes = run.new_model(), run.recipe.model.image_size, layer_sizes(run.recipe.model)
    pictures = torch.rand(settings.batch, 3, side, side, device=run.device)
    matrices = torch.rand(2 * sizes[-1].heads * sizes[-1].sets, sizes[-1].tokens, sizes[-1].tokens, device=run.device)
    image = _seconds(lambda: model(pictures)) / len(pictures)
    spectra = len(sizes) * _seconds(lambda: torch.linalg.svdvals(matrices))
    tested = max((point["images"] for point in read_history(run).evaluations if point["images"] > 0), default=0.0)
    predicting = next((name for name in names if name in ("accuracy", "calibration", "mistakes")), "")
    once = settings.images * image
    grid = settings.grid**2 * settings.samples * image / settings.world.size
    products = PRODUCTS * settings.eigenvalues + PROBES
    figures = {"accuracy": 1, "calibration": 1, "spectrum": 2, "content": 1, "maps": 4, "functions": 2 + len(sizes)}
    figures |= {"distributions": 2, "landscape": 3}
    seconds = {
        (predicting, PREDICT): 0.0 if (run.path / FILE).is_file() else tested * image,
        ("spectrum", "spectrum"): once + settings.images * spectra,
        ("content", "content"): once,
        ("content", "top-1 with averaged S"): 3 * once,
        ("functions", "scores"): once,
        ("functions", "distance from softmax"): once,
        ("landscape", "landscape, path"): grid if len(run.in_order) >= NEEDED else 0.0,
        ("landscape", "landscape, random"): grid,
        ("sharpness", "sharpness"): products * PASSES * settings.hessian_samples * image,
        **{(name, "draw figures"): FIGURE * count for name, count in figures.items()},
    }
    return {key: cost for key, cost in seconds.items() if key[0] in names}


def _seconds(call: Callable[[], Tensor]) -> float:
    call().cpu()  # warms up
    started = time.perf_counter()
    call().cpu()
    return time.perf_counter() - started
