"""What S depends on: how much of it changes with the query and with the image, and how large it is.

Attention that gives each query the same row, or each image the same matrix, mixes positions as a constant would. So
these shares say how far a comparison with softmax is about learned functions of the scores at all.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from karat_scale.analysis.attention_matrices import visit_images
from karat_scale.analysis.figures import new_figure
from karat_scale.analysis.result import Result, Settings, Table, note_bad_images
from karat_scale.analysis.trained_run import TrainedRun
from karat_scale.models.factory import layer_sizes

# Per block, in the order of `Content.shares`.
SHARES = ("by_query", "by_image", "beyond_pi")


class Content:
    """Sums over images of one model's S and A, by block; of matrices only their sum over images is kept, by head."""

    def __init__(self, blocks: int) -> None:
        self._matrices: list[Tensor | float] = [0.0] * blocks
        self._sums = np.zeros((blocks, 4))
        self._items = np.zeros(blocks)
        self._pairs = np.zeros(blocks)

    def add(self, block: int, raw: Tensor, learned: Tensor) -> None:
        """Add A and S [B, h, N, N] of one block."""
        learned = learned.double()
        queries = learned.shape[2]
        self._matrices[block] = self._matrices[block] + learned.sum(0)
        energy = learned.square().sum()
        # The part of each column of S that all queries share.
        shared = queries * learned.mean(2).square().sum()
        norms = torch.linalg.matrix_norm(learned).sum()
        beyond = (raw.abs() > math.pi).sum()
        self._sums[block] += torch.stack((energy, shared, norms, beyond.double())).cpu().numpy()
        self._items[block] += len(learned)
        self._pairs[block] += raw.numel()

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """Return [L, 3]: the shares of S's energy that depend on the query and on the image, and that of |A| > pi."""
        energy, shared, _, beyond = self._sums.T
        same = [float(torch.as_tensor(x).square().sum()) / n for x, n in zip(self._matrices, self._items, strict=True)]
        return np.stack((1 - shared / energy, 1 - np.array(same) / energy, beyond / self._pairs), 1)

    def norms(self, heads: list[int]) -> npt.NDArray[np.float64]:
        """Return the mean Frobenius norm of S for each block, given its number of heads."""
        return np.asarray(self._sums[:, 2] / (self._items * np.array(heads)))


def analyze_content(run: TrainedRun, settings: Settings) -> Result:
    """Measure what S depends on, for every block.

    Raises:
        UserError: the run has no checkpoint, or its data cannot be read.
    """
    model, images = run.model(), run.images(settings.images)
    sizes = layer_sizes(run.recipe.model)
    content = Content(len(sizes))
    done = visit_images(model, run, images, settings, "content", content.add)
    shares, norms = content.shares, content.norms([size.heads for size in sizes])
    result = Result()
    blocks = [
        {**dict(zip(SHARES, own.tolist(), strict=True)), "frobenius_norm": float(norm)}
        for own, norm in zip(shares, norms, strict=True)
    ]
    result.numbers = {"images": done, "blocks": blocks}
    result.arrays = {"shares": shares, "frobenius_norm": norms}
    result.figures["shares"] = (
        _draw(shares),
        "Share of the energy of S that depends on the query and on the image, and share of scores beyond pi.",
    )
    columns = ["block", "S depends on the query", "S depends on the image", "scores beyond pi", "Frobenius norm of S"]
    rows = [[block, *own.tolist(), float(norm)] for block, (own, norm) in enumerate(zip(shares, norms, strict=True))]
    result.tables.append(Table("What S depends on", columns, rows))
    note_bad_images(result, run, images.bad)
    return result


def _draw(shares: npt.NDArray[np.float64]) -> Figure:
    figure = new_figure(6, 3.2)
    axes = figure.subplots()
    blocks = np.arange(len(shares))
    for number, label in enumerate(("depends on the query", "depends on the image", "scores beyond pi")):
        axes.plot(blocks, shares[:, number], marker="o", label=label)
    axes.set(xlabel="block", ylabel="share", xticks=blocks, ylim=(0, 1))
    axes.legend()
    return figure
