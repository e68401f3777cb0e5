"""B-splines on a uniform grid as shared features."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from karat_scale.attention.bases.base import FeatureBasis, Shape, is_paper, silu_derivative


@dataclass(frozen=True)
class BSpline(FeatureBasis):
    """phi(x) = w (silu(x) + sum_i c_i B_i(x)): G + k splines of degree k on a uniform grid over [-I, I].

    The grid has k more steps on both sides, and outside it the sum is 0. Parameters `weight` w [h, p, q] and `coef`
    c [h, G + k, p, q].
    """

    amplitudes = ("weight",)

    grid: int = 3
    degree: int = 3
    range: float = 3.0

    @property
    def num_features(self) -> int:
        """SiLU and the splines."""
        return 1 + self.grid + self.degree

    @property
    def step(self) -> float:
        """The distance of two knots."""
        return 2 * self.range / self.grid

    def value(self, x: Tensor) -> Sequence[Tensor]:
        """silu(x), then B_i(x)."""
        return [functional.silu(x), *self._bells(x, self.degree, self.grid + self.degree)]

    def derivative(self, x: Tensor) -> Sequence[Tensor]:
        """silu'(x), then B_i'(x), differences of splines of one degree less."""
        lower = self._bells(x, self.degree - 1, self.grid + self.degree + 1)
        return [silu_derivative(x), *((a - b) / self.step for a, b in pairwise(lower))]

    def shapes(self, heads: int, units: int, keys: int) -> dict[str, Shape]:
        """See `Basis`."""
        functions = (heads, units, keys)
        return {"weight": functions, "coef": (heads, self.grid + self.degree, units, keys)}

    def initialise(self, parameters: Mapping[str, Tensor], scheme: str) -> None:
        """c ~ N(0, 1); w ~ N(0, 1), or N(0, 1 / (q (E silu(x)^2 + sum_i E B_i(x)^2))), with which H has variance 1."""
        weight = parameters["weight"]
        nn.init.normal_(parameters["coef"])
        nn.init.normal_(weight, std=1.0 if is_paper(scheme) else (weight.shape[2] * self.mean_square()) ** -0.5)

    def pack(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """w and w c_i, [h, 1 + G + k, p, q]."""
        weight = parameters["weight"].unsqueeze(1)
        return torch.cat((weight, weight * parameters["coef"]), 1)

    def bind(self, scores: Tensor, values: Tensor) -> "SplineFeatures":
        """See `FeatureBasis`."""
        return SplineFeatures(self, scores, values)

    def centre(self, number: int, degree: int) -> float:
        """Of a spline of any degree, in steps; number 0 begins where the extended grid does."""
        return number - self.grid / 2 - self.degree + (degree + 1) / 2

    def _bells(self, x: Tensor, degree: int, count: int) -> list[Tensor]:
        return [_cardinal((x / self.step - self.centre(i, degree)).abs(), degree) for i in range(count)]


class SplineFeatures:
    """The splines of one tile, in arrays that are used again.

    The derivative of a spline is a difference of splines of one degree less, so the coefficients' differences say
    how these add up.
    """

    def __init__(self, basis: BSpline, scores: Tensor, values: Tensor) -> None:
        self._basis, self._scores, self._values = basis, scores, values
        self._scaled, self._v, self._w, self._power = (torch.empty_like(scores) for _ in range(4))

    def evaluate(self) -> None:
        """See `BoundFeatures`."""
        self._values[0] = functional.silu(self._scores)
        self._scale(self._basis.degree)
        for number, out in enumerate(self._values[1:]):
            self._write_bell(number, self._basis.degree, out)

    def pull_back(self, grad_hidden: Tensor, coef: Tensor) -> Tensor:
        """See `BoundFeatures`."""
        degree = self._basis.degree - 1
        total = silu_derivative(self._scores).mul_((grad_hidden @ coef[0]).view_as(self._scores))
        differences = torch.diff(functional.pad(coef[1:], (0, 0, 0, 0, 1, 1)), dim=0) / self._basis.step
        slope, factor = torch.empty_like(total), torch.empty_like(total)
        self._scale(degree)
        for number, difference in enumerate(differences):
            self._write_bell(number, degree, slope)
            torch.mm(grad_hidden, difference, out=factor.flatten(0, 1))
            total.addcmul_(slope, factor)
        return total

    def _scale(self, degree: int) -> None:
        """In units of k!^(1/k) steps the powers need no factor 1 / k!."""
        self._unit = math.factorial(degree) ** (-1 / max(degree, 1))
        torch.mul(self._scores, self._unit / self._basis.step, out=self._scaled)

    def _write_bell(self, number: int, degree: int, out: Tensor) -> None:
        """As `_cardinal`."""
        v, w, power = self._v, self._w, self._power
        torch.sub(self._scaled, self._unit * self._basis.centre(number, degree), out=v)
        v.abs_().neg_().add_(self._unit * (degree + 1) / 2).clamp_(min=0)
        if degree < 2:
            out.copy_(v if degree else v > 0)
            return
        torch.mul(v, v, out=out)
        for _ in range(degree - 2):
            out.mul_(v)
        for j in range(1, degree // 2 + 1):
            torch.sub(v, self._unit * j, out=w).clamp_(min=0)
            power.copy_(w)
            for _ in range(degree - 2):
                power.mul_(w)
            out.addcmul_(power, w, value=(-1) ** j * math.comb(degree + 1, j))


def _cardinal(distance: Tensor, degree: int) -> Tensor:
    """The B-spline of unit steps at a distance from its centre.

    sum_j (-1)^j C(k + 1, j) max(v - j, 0)^k / k! over the half with v = (k + 1) / 2 - distance.
    """
    v = (degree + 1) / 2 - distance
    if degree == 0:
        return (v > 0).to(v.dtype)
    terms = [(-1) ** j * math.comb(degree + 1, j) * (v - j).clamp(min=0) ** degree for j in range(degree // 2 + 1)]
    return torch.stack(terms).sum(0) / math.factorial(degree)
