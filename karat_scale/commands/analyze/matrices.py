"""The attention matrices S of a trained run: what they depend on, how near they are to softmax, and their spectra.

Spectra are the singular values before and after the operator (paper, section 5.5).

The distance from softmax is the distance of a head from the best fit of softmax by an operator of the same kind. On the
scores that occur, S is linear in the features f(A[k, q]) of a row: S = X Theta, where a row of X holds all F N features
and Theta = coefficients x W. The best fit of softmax is the Theta of rank r that is nearest to softmax(A) in least
squares. It follows from X^T X and X^T softmax(A), so the rows need not be kept.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from karat_scale.attention import KaratOperator
from karat_scale.attention.bases import FeatureBasis
from karat_scale.commands.analyze.result import Result, Settings, Table, note_bad_images, visit_images
from karat_scale.commands.analyze.summary import constant_sentence, content_sentence, lost_points
from karat_scale.commands.analyze.trained_run import TrainedRun, ValidationImages
from karat_scale.commands.figures import layered, new_axes, new_figure
from karat_scale.models.attention_matrices import FIGURES, Content, can_be_replaced, mean_over_queries, replaced
from karat_scale.models.factory import layer_sizes


def analyze_content(run: TrainedRun, settings: Settings) -> Result:
    """Measure what S depends on, for every block.

    Raises:
        UserError: the run has no checkpoint, or its data cannot be read.
    """
    model, images = run.model(), run.images(settings.images)
    sizes = layer_sizes(run.recipe.model)
    content = Content(len(sizes))

    def add(block: int, raw: Tensor, learned: Tensor) -> None:
        content.add(block, raw, learned, len(learned) // sizes[block].sets)

    done = visit_images(model, run, images, settings, "content", add)
    figures = content.figures()
    result = Result()
    blocks = [dict(zip(FIGURES, own, strict=True)) for own in figures.tolist()]
    result.numbers = {"images": done, "blocks": blocks}
    result.arrays = {"shares": figures[:, :3], "frobenius_norm": figures[:, 3]}
    figure, axes = new_axes(6, 3.2)
    for number, label in enumerate(("depends on the query", "depends on the image", "scores beyond pi")):
        axes.plot(figures[:, number], marker="o", markersize=9 - 3 * number, label=label, **layered(number, 3))
    ticks = range(len(figures))
    axes.set(xlabel="block", ylabel="share", xticks=ticks, ylim=(-0.03, 1.03))  # lines at 0 and 1 are seen, too
    axes.legend()
    caption = "Share of the energy of S that depends on the query and on the image, and share of scores beyond pi."
    result.figures["shares"] = figure, caption
    by_query, by_image = figures[:, :2].T.tolist()
    result.findings.append(content_sentence(by_query, by_image))
    right = _right_with_means(run, settings, model, images, content)
    if right is None:
        result.notes.append("top-1 with averaged S: only for plain ViTs with O = S V, without attention transfer")
    else:
        top1 = {name: 100 * sum(own) / done for name, own in right.items()}
        result.numbers["top1"] = top1
        is_all = len(images) == images.total
        result.findings.append(constant_sentence(right["S"], right["mean over images"], max(by_image), is_all))
        lost = {name: lost_points(right["S"], own) for name, own in right.items() if name != "S"}
        rows: list[list[Any]] = [[name, value, *lost.get(name, [None] * 3)] for name, value in top1.items()]
        columns = ["each S replaced by", "top-1, %", "lost, points", "95 % from", "to"]
        result.tables.append(Table(f"Top-1 of {done} images with each S replaced", columns, rows))
    columns = ["block", "S depends on the query", "S depends on the image", "scores beyond pi", "Frobenius norm of S"]
    rows = [[block, *own] for block, own in enumerate(figures.tolist())]
    result.tables.append(Table("What S depends on", columns, rows))
    note_bad_images(result, images.bad)
    return result


@torch.no_grad()
def _right_with_means(
    run: TrainedRun, settings: Settings, model: nn.Module, images: ValidationImages, content: Content
) -> dict[str, list[bool]] | None:
    """Return whether a model is right on each image: as trained, and with a mean over queries or images for each S.

    None if the matrices of its attention cannot be replaced.
    """
    means = [torch.as_tensor(mean) for mean in content.means()]
    # Several sets of tokens have a mean each: windows, or the patch sets of a MobileViT.
    if not can_be_replaced(model) or any(len(mean) > 1 for mean in means):
        return None
    changes: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "S": nullcontext,
        "mean over queries": lambda: replaced(model, mean_over_queries),
        "mean over images": lambda: replaced(model, lambda block, learned: means[block].to(learned)),
    }
    right: dict[str, list[bool]] = {name: [] for name in changes}
    for batch, labels in images.batches(images.raw(settings.batch), run.device):
        for name, change in changes.items():
            with change():
                right[name] += (model(batch).argmax(-1) == labels).tolist()
        settings.progress("top-1 with averaged S", len(right["S"]), len(images))
    return right


MAX_FEATURES = 4096
RIDGE = 1e-8


class Distance(NamedTuple):
    """The distances between S, softmax and the best fit of softmax.

    `fit_error` is |softmax - fit| / |softmax|: how well the operator can fit softmax. `to_fit` and `to_softmax` are
    |S - c fit| / |S| and |S - c softmax| / |S| at the best factor c, between 0 (the same) and 1 (nothing in common).
    """

    to_fit: float
    to_softmax: float
    fit_error: float


def can_fit(operator: KaratOperator) -> bool:
    """True if S is linear in few enough features for a solution."""
    basis = operator.basis
    return (
        isinstance(basis, FeatureBasis)
        and operator.form in ("modular", "full_rank")
        and operator.base == "zero"
        and not operator.simplex
        and basis.num_features * operator.num_tokens <= MAX_FEATURES
    )


class SoftmaxFit:
    """One head's sums: X^T X [F N, F N], X^T Y [F N, N] and |Y|^2, with Y = softmax(A); float64."""

    def __init__(self, operator: KaratOperator, head: int) -> None:
        assert isinstance(operator.basis, FeatureBasis)
        self._operator, self._head, self._basis = operator, head, operator.basis
        tokens, size = operator.num_tokens, operator.basis.num_features * operator.num_tokens
        device = next(operator.parameters()).device
        self._xx = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._xy = torch.zeros(size, tokens, dtype=torch.float64, device=device)
        self._yy = 0.0

    @staticmethod
    def bytes_of(operator: KaratOperator) -> int:
        """Bytes that the sums of one head take."""
        assert isinstance(operator.basis, FeatureBasis)
        size = operator.basis.num_features * operator.num_tokens
        return 8 * size * (size + operator.num_tokens)

    def add(self, scores: Tensor) -> None:
        """Add rows of A [rows, N]."""
        scores = scores.double()
        features = torch.cat(list(self._basis.value(scores)), 1)
        target = scores.softmax(-1)
        self._xx += features.mT @ features
        self._xy += features.mT @ target
        self._yy += float(target.square().sum())

    @torch.no_grad()
    def best(self) -> Tensor:
        """Return Theta [F N, N] of the operator's rank that is nearest to softmax."""
        ridge = RIDGE * self._xx.diagonal().mean() * torch.eye(len(self._xx), dtype=self._xx.dtype).to(self._xx)
        theta: Tensor = torch.linalg.solve(self._xx + ridge, self._xy)
        if self._operator.proj is None:
            return theta
        # Reduced-rank regression: project the fit's rows onto their main directions.
        _, directions = torch.linalg.eigh(theta.mT @ self._xx @ theta)
        main = directions[:, -self._operator.rank :]
        projected: Tensor = theta @ main @ main.mT
        return projected

    @torch.no_grad()
    def learned(self) -> Tensor:
        """Return Theta [F N, N] of the learned head."""
        coef = self._operator.basis.pack({k: v.double() for k, v in self._operator.basis_parameters().items()})
        theta = coef[self._head].transpose(1, 2).flatten(0, 1)
        return theta if self._operator.proj is None else theta @ self._operator.proj[self._head].double().mT

    def distance(self) -> Distance:
        """Return the three figures for the rows so far."""
        best, learned = self.best(), self.learned()
        size = float((learned * (self._xx @ learned)).sum())
        fit = float((best * (self._xx @ best)).sum())
        error = self._yy - 2 * float((best * self._xy).sum()) + fit
        to_fit = _apart(float((learned * (self._xx @ best)).sum()), size, fit)
        to_softmax = _apart(float((learned * self._xy).sum()), size, self._yy)
        return Distance(to_fit, to_softmax, (max(error, 0.0) / self._yy) ** 0.5)


def _apart(inner: float, first: float, second: float) -> float:
    """Return the sine of the angle between two vectors from their inner product and squared lengths."""
    if not first or not second:
        return 1.0
    sine: float = max(1 - inner**2 / (first * second), 0.0) ** 0.5
    return sine


STAGES = ("before", "after")
Array = npt.NDArray[np.float64]
FLOOR = 1e-12
ROUNDING = float(torch.finfo(torch.float32).eps)


class Spectrum:
    """Running minimum, mean and maximum over heads and images; no matrix is kept.

    `logs` are three arrays [L, 2, N]: the natural logarithms of the smallest, the mean and the largest singular value
    at each index, by block and before / after, as in the paper. N is the largest of all blocks. They are nan where a
    block has fewer values, or where a value is 0, which has no logarithm. Values within the rounding error of float32,
    sqrt(N) eps times the largest of a matrix, count as 0.
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

    def logs(self) -> tuple[Array, Array, Array]:
        """Return low, mean and high, see the class."""
        known = (self._low, np.where(np.isnan(self._low), np.nan, self._sum / self._count), self._high)
        low, mean, high = (np.log(x, out=np.full_like(x, np.nan), where=x > 0) for x in known)
        return low, mean, high

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
    result.arrays = dict(zip(("ln_min", "ln_mean", "ln_max"), spectrum.logs(), strict=True))
    what = run.matrix_name
    _draw_block(result, spectrum, what)
    _draw_ranks(result, spectrum, what)
    of_scores, of_learned = spectrum.ranks[-1, :, 0]
    result.findings.append(
        f"In the last block, the scores A have an effective rank of {of_scores:.1f}, and {what}, made of them, of "
        f"{of_learned:.1f}."
    )
    rows = [[block, *own.T.flatten().tolist()] for block, own in enumerate(spectrum.ranks)]
    columns = ["block", *(f"{name.split('_')[0]} rank, {of}" for name in names for of in ("A", what))]
    result.tables.append(Table("Ranks of the attention matrices", columns, rows))
    note_bad_images(result, images.bad)
    return result


def _draw_block(result: Result, spectrum: Spectrum, what: str) -> None:
    figure, axes = new_axes(6, 3.6)
    block = len(spectrum.ranks) - 1
    low, mean, high = (values[block] for values in spectrum.logs())
    index = np.arange(1, mean.shape[-1] + 1)
    for stage, name in enumerate((f"before: A, block {block}", f"after: {what}, block {block}")):
        (line,) = axes.plot(index, mean[stage], label=name)
        axes.fill_between(index, low[stage], high[stage], alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(xlabel="index of the singular value", ylabel="ln of the singular value")
    axes.legend()
    caption = (
        "Singular values of the last block's attention matrices: natural logarithms of the mean (line), the smallest "
        "and the largest over all heads and images. Values within the rounding error of float32 are left out."
    )
    result.figures["last_block"] = figure, caption


def _draw_ranks(result: Result, spectrum: Spectrum, what: str) -> None:
    figure = new_figure(9, 3.2)
    ranks = spectrum.ranks
    for number, (axes, name) in enumerate(zip(figure.subplots(1, 3), ("effective", "stable", "scree"), strict=True)):
        for stage, label in enumerate(("before: A", f"after: {what}")):
            axes.plot(ranks[:, stage, number], marker="o", label=label, **layered(stage, 2))
        top = 1.08 * ranks[..., number].max()
        axes.set(xlabel="block", title=f"{name} rank", xticks=range(len(ranks)), ylim=(0, top))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    caption = (
        "Mean rank of each block's matrices, before and after the operator. Effective: exp of the entropy of the "
        "singular values' shares of their sum. Stable: the sum of their squares over the largest square. Scree: how "
        "many come before the elbow of their curve."
    )
    result.figures["ranks"] = figure, caption
