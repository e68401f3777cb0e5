"""The Fourier basis: sines and cosines of the scores, the paper's choice."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from karat_scale.attention.bases.base import FeatureBasis, Shape, is_paper

GAINS = ("gain", "base_gain")


@dataclass(frozen=True)
class Fourier(FeatureBasis):
    """phi(x) = sum_{m=1..G} a_m cos(m x) + b_m sin(m x) (arXiv 2503.10632, section 4).

    Parameters `cos_coef` and `sin_coef` [h, p, q, G]; the features are all cosines, then all sines. With `gains`, there
    are KAN's two gains for each function as well, `gain` and `base_gain` [h, p, q], which start at 1:
    phi(x) = w_b b(x) + w_s (the series), with b = 0. So w_b has no effect except on the number of parameters.
    """

    amplitudes = ("cos_coef", "sin_coef")

    grid: int = 3
    gains: bool = False

    reach = math.pi
    # Its features follow from the shape of the coefficients, so every G shares one name.
    key = "fourier"

    @property
    def num_features(self) -> int:
        """F = 2 G."""
        return 2 * self.grid

    def value(self, x: Tensor) -> Sequence[Tensor]:
        """cos(m x), then sin(m x)."""
        phases = [m * x for m in range(1, self.grid + 1)]
        return [*map(torch.cos, phases), *map(torch.sin, phases)]

    def derivative(self, x: Tensor) -> Sequence[Tensor]:
        """-m sin(m x), then m cos(m x)."""
        values, orders = self.value(x), range(1, self.grid + 1)
        return [-m * values[self.grid + m - 1] for m in orders] + [m * values[m - 1] for m in orders]

    def shapes(self, heads: int, units: int, keys: int) -> dict[str, Shape]:
        """See `Basis`."""
        series: dict[str, Shape] = dict.fromkeys(("cos_coef", "sin_coef"), (heads, units, keys, self.grid))
        return series | dict.fromkeys(GAINS, (heads, units, keys)) if self.gains else series

    def initialise(self, parameters: Mapping[str, Tensor], scheme: str) -> None:
        """Draw from N(0, 1), as the paper does, or from N(0, 1 / (q G)), with which H has variance near 1."""
        for coef in (parameters["cos_coef"], parameters["sin_coef"]):
            nn.init.normal_(coef, std=1.0 if is_paper(scheme) else (coef.shape[2] * coef.shape[3]) ** -0.5)
        for name in GAINS if self.gains else ():
            nn.init.ones_(parameters[name])

    def series(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The coefficients of cosines and sines [h, p, q, G], gains included."""
        cos, sin = parameters["cos_coef"], parameters["sin_coef"]
        if not self.gains:
            return cos, sin
        # The second term, b = 0, gives the unused gain a gradient of 0, as optimizers and DeepSpeed expect.
        gain = (parameters["gain"] + 0 * parameters["base_gain"]).unsqueeze(-1)
        return gain * cos, gain * sin

    def pack(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The coefficients in feature order, [h, 2 G, p, q]."""
        cos, sin = self.series(parameters)
        # As plain transposes, which are copied faster than a permutation of four dimensions.
        packed: Tensor = torch.cat((cos.flatten(1, 2).mT, sin.flatten(1, 2).mT), 1).unflatten(2, cos.shape[1:3])
        return packed

    def bind(self, scores: Tensor, values: Tensor) -> "FourierFeatures":
        """See `FeatureBasis`."""
        return FourierFeatures(scores, values)


class FourierFeatures:
    """The harmonics of one tile: one cosine and one sine per element, the rest by angle addition."""

    def __init__(self, scores: Tensor, values: Tensor) -> None:
        grid = values.shape[0] // 2
        self._scores = scores
        # Index m holds cos(m x) and sin(m x).
        self._cos = [scores.new_ones(()), *values[:grid].unbind()]
        self._sin = [scores.new_zeros(()), *values[grid:].unbind()]

    def evaluate(self) -> None:
        """exp(i m x) = exp(i (a - b) x) + 2i sin(b x) exp(i a x), where a + b = m and a - b is 0 or 1.

        Its errors grow with log m; those of the recurrence from m - 1 and m - 2 grow with m^2 near x = 0.
        """
        cos, sin = self._cos, self._sin
        torch.cos(self._scores, out=cos[1])
        torch.sin(self._scores, out=sin[1])
        for m in range(2, len(cos)):
            b = m // 2
            a = m - b
            torch.addcmul(cos[a - b], sin[a], sin[b], value=-2, out=cos[m])
            torch.addcmul(sin[a - b], cos[a], sin[b], value=2, out=sin[m])

    def pull_back(self, grad_hidden: Tensor, coef: Tensor) -> Tensor:
        """sum_m m ((dH b_m) cos(m x) - (dH a_m) sin(m x)), where a_m and b_m are [r, N]."""
        grid = len(coef) // 2
        total, factor = self._gradient_arrays
        flat_factor = factor.flatten(0, 1)
        for m in range(1, grid + 1):
            torch.mm(grad_hidden, coef[grid + m - 1], out=flat_factor)
            if m == 1:
                torch.mul(factor, self._cos[1], out=total)
            else:
                total.addcmul_(factor, self._cos[m], value=m)
            torch.mm(grad_hidden, coef[m - 1], out=flat_factor)
            total.addcmul_(factor, self._sin[m], value=-m)
        return total

    @cached_property
    def _gradient_arrays(self) -> tuple[Tensor, Tensor]:
        return torch.empty_like(self._scores), torch.empty_like(self._scores)
