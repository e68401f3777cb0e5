"""Spectral behaviour: singular values of the attention matrices before and after the operator (paper, section 5.5)."""

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from karat_scale.commands.analyze.figures import new_figure
from karat_scale.commands.analyze.result import Result, Settings, Table, note_bad_images
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.commands.analyze.visit import visit_images
from karat_scale.models.factory import layer_sizes

STAGES = ("before", "after")
Array = npt.NDArray[np.float64]
FLOOR = 1e-12
ROUNDING = float(torch.finfo(torch.float32).eps)


class Spectrum:
    """Running minimum, mean and maximum over heads and images; no matrix is kept.

    `log_low`, `log_mean` and `log_high` are [L, 2, N]: the natural logarithms of the smallest, the mean and the largest
    singular value at each index, by block and before / after, as in the paper. N is the largest of all blocks. nan
    where a block has fewer values, or where they are 0, which has no logarithm. Values within the rounding error of
    float32, sqrt(N) eps times the largest of a matrix, count as 0.
    """

    def __init__(self, blocks: int, tokens: int) -> None:
        self._low = np.full((blocks, 2, tokens), np.nan)
        self._high = np.full((blocks, 2, tokens), np.nan)
        self._sum = np.zeros((blocks, 2, tokens))
        self._ranks = np.zeros((blocks, 2, 3))
        self._count = np.zeros((blocks, 1, 1))

    def add(self, block: int, raw: Tensor, learned: Tensor) -> None:
        """Add A and S [B, h, N, N] of one block."""
        for stage, matrices in enumerate((raw, learned)):
            values = torch.linalg.svdvals(matrices.flatten(0, 1).float())
            values = values * (values > values.shape[1] ** 0.5 * ROUNDING * values.amax(-1, keepdim=True))
            known = values.double().cpu().numpy()
            own = block, stage, slice(known.shape[1])
            self._low[own] = np.fmin(self._low[own], known.min(0))
            self._high[own] = np.fmax(self._high[own], known.max(0))
            self._sum[own] += known.sum(0)
            ranks = torch.stack((effective_rank(values), stable_rank(values), scree_rank(values)), 1)
            self._ranks[block, stage] += ranks.double().sum(0).cpu().numpy()
        self._count[block] += len(values)

    @property
    def log_low(self) -> Array:
        """See the class."""
        return _log(self._low)

    @property
    def log_mean(self) -> Array:
        """See the class."""
        return _log(np.where(np.isnan(self._low), np.nan, self._sum / self._count))

    @property
    def log_high(self) -> Array:
        """See the class."""
        return _log(self._high)

    @property
    def ranks(self) -> Array:
        """Return [L, 2, 3]: the mean effective, stable and scree rank."""
        return self._ranks / self._count


def effective_rank(values: Tensor) -> Tensor:
    """exp of the entropy of the singular values' shares (Roy and Vetterli, 2007); values [..., N] to [...]."""
    shares = values / values.sum(-1, keepdim=True).clamp(min=FLOOR)
    ranks: Tensor = torch.special.entr(shares).sum(-1).exp()
    return ranks


def stable_rank(values: Tensor) -> Tensor:
    """Sum of squares over the largest square; values [..., N] to [...]."""
    squares = values.square()
    return squares.sum(-1) / squares.amax(-1).clamp(min=FLOOR**2)


def scree_rank(values: Tensor) -> Tensor:
    """Return the number of singular values [..., N], largest first, before the elbow of the scree plot, [...].

    The elbow is the point farthest below the straight line from the first value to the last. Values on or above that
    line have no elbow, so all that are not 0 count.
    """
    count = values.shape[-1]
    first, last = values[..., :1], values[..., -1:]
    line = first + (last - first) * torch.linspace(0, 1, count, dtype=values.dtype, device=values.device)
    below, elbow = (line - values).max(-1)
    return torch.where(below > 1e-6 * first[..., 0], elbow, (values > 0).sum(-1))


def _log(values: Array) -> Array:
    """ln, or nan where a value is 0 or nan."""
    return np.log(values, out=np.full_like(values, np.nan), where=values > 0)


def analyze_spectrum(run: TrainedRun, settings: Settings) -> Result:
    """Compute singular values of A and S (or softmax) over heads and images, for every block.

    Raises:
        UserError: the run has no checkpoint, or its data cannot be read.
    """
    model, images = run.model(), run.images(settings.images)
    sizes = layer_sizes(run.recipe.model)
    spectrum = Spectrum(len(sizes), max(size.tokens for size in sizes))
    done = visit_images(model, run, images, settings, "spectrum", spectrum.add)
    result = Result()
    names = ("effective_rank", "stable_rank", "scree_rank")
    result.numbers = {
        "images": done,
        "blocks": [
            {stage: dict(zip(names, ranks[s].tolist(), strict=True)) for s, stage in enumerate(STAGES)}
            for ranks in spectrum.ranks
        ],
    }
    result.arrays = {"ln_min": spectrum.log_low, "ln_mean": spectrum.log_mean, "ln_max": spectrum.log_high}
    what = run.matrix_name
    result.figures["last_block"] = (
        _draw_block(spectrum, len(sizes) - 1, what),
        "Singular values of the last block's attention matrices: natural logarithms of the mean (line), the smallest "
        "and the largest over all heads and images. Values within the rounding error of float32 are left out.",
    )
    result.figures["ranks"] = (
        _draw_ranks(spectrum, what),
        "Mean rank of each block's matrices, before and after the operator.",
    )
    rows = [
        [block, *(float(x) for pair in zip(*spectrum.ranks[block].tolist(), strict=True) for x in pair)]
        for block in range(len(sizes))
    ]
    columns = ["block", *(f"{name.split('_')[0]} rank, {of}" for name in names for of in ("A", what))]
    result.tables.append(Table("Ranks of the attention matrices", columns, rows))
    note_bad_images(result, images.bad)
    return result


def _draw_block(spectrum: Spectrum, block: int, what: str) -> Figure:
    figure = new_figure(6, 3.6)
    axes = figure.subplots()
    index = np.arange(1, spectrum.log_low.shape[-1] + 1)
    for stage, name in enumerate((f"before: A, block {block}", f"after: {what}, block {block}")):
        (line,) = axes.plot(index, spectrum.log_mean[block, stage], label=name)
        low, high = spectrum.log_low[block, stage], spectrum.log_high[block, stage]
        axes.fill_between(index, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(xlabel="index of the singular value", ylabel="ln of the singular value")
    axes.legend()
    return figure


def _draw_ranks(spectrum: Spectrum, what: str) -> Figure:
    figure = new_figure(9, 3.2)
    blocks = np.arange(len(spectrum.ranks))
    for number, (axes, name) in enumerate(zip(figure.subplots(1, 3), ("effective", "stable", "scree"), strict=True)):
        for stage, label in enumerate(("before: A", f"after: {what}")):
            axes.plot(blocks, spectrum.ranks[:, stage, number], marker="o", label=label)
        axes.set(xlabel="block", title=f"{name} rank", xticks=blocks, ylim=(0, None))
        axes.legend()
    return figure
