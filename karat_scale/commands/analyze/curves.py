"""The functions phi_pq of one head as curves, and the scores on which they are used."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karat_scale.attention import KaratOperator
from karat_scale.attention.bases import BASE_ACTIVATIONS, ElementwiseBasis, FeatureBasis, Fourier

LIMIT, BINS = 64.0, 2048
Counts = npt.NDArray[np.int64]


@torch.no_grad()
def unit_curves(operator: KaratOperator, head: int, x: Tensor) -> Tensor:
    """Return phi_pq(x) of the first (or only) set of functions, including b(x): x [n] to [n, p, q], in x's dtype."""
    parameters = {k: v.to(x) for k, v in operator.basis_parameters().items() if not k.startswith("second_")}
    coef = operator.basis.pack(parameters)[head]
    basis = operator.basis
    if isinstance(basis, FeatureBasis):
        curves = torch.einsum("fx,fpq->xpq", torch.stack(list(basis.value(x))), coef)
    else:
        assert isinstance(basis, ElementwiseBasis)
        curves = basis.value(x[:, None, None], *coef.unbind(0))
    base = BASE_ACTIVATIONS[operator.base]
    return curves if base is None else curves + base.value(x)[:, None, None]


@torch.no_grad()
def energy_per_frequency(operator: KaratOperator) -> npt.NDArray[np.float64] | None:
    """Return the share of each harmonic m in sum_pq a_pqm^2 + b_pqm^2, [h, G]; None if the basis is not Fourier."""
    if not isinstance(operator.basis, Fourier):
        return None
    cos, sin = operator.basis.series(operator.basis_parameters())
    energy = cos.double().square().sum((1, 2)) + sin.double().square().sum((1, 2))
    return (energy / energy.sum(-1, keepdim=True)).cpu().numpy()


class ScoreHistogram:
    """A histogram of the scores, per block and head; scores beyond +-64 count in the outermost bins.

    Scores of exactly 0 are not counted: those are masked pairs.
    """

    edges = np.linspace(-LIMIT, LIMIT, BINS + 1)

    def __init__(self, blocks: int, heads: int) -> None:
        self.counts: Counts = np.zeros((blocks, heads, BINS), dtype=np.int64)

    def add(self, block: int, scores: Tensor) -> None:
        """Add scores [B, h, rows, columns]."""
        for head, values in enumerate(scores.transpose(0, 1).flatten(1).float().cpu()):
            counted = torch.histc(values[values != 0].clamp(-LIMIT, LIMIT), BINS, -LIMIT, LIMIT)
            self.counts[block, head] += counted.to(torch.int64).numpy()

    def span(self, block: int, head: int, share: float = 0.998) -> tuple[float, float]:
        """Return the range that holds the middle `share` of the scores."""
        below = self.counts[block, head].cumsum() / max(self.counts[block, head].sum(), 1)
        low = int(np.searchsorted(below, (1 - share) / 2))
        high = int(np.searchsorted(below, 1 - (1 - share) / 2))
        return float(self.edges[low]), float(self.edges[min(high, BINS - 1) + 1])
