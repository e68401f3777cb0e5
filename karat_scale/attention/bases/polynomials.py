"""Piecewise and orthogonal polynomials as shared features: B-splines and Chebyshev."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from karat_scale.attention.bases.activations import silu_derivative
from karat_scale.attention.bases.base import FeatureBasis, Shape, is_paper


@dataclass(frozen=True)
class BSpline(FeatureBasis):
    """phi(x) = w (silu(x) + sum_i c_i B_i(x)): G + k splines of degree k on a uniform grid over [-I, I].

    The grid goes on by k steps on both sides, and outside it the sum is 0. Parameters `weight` w [h, p, q] and `coef`
    c [h, G + k, p, q].
    """

    grid: int = 3
    degree: int = 3
    range: float = 3.0

    @property
    def num_features(self) -> int:
        """SiLU and the splines."""
        return 1 + self.grid + self.degree

    def value(self, x: Tensor) -> Sequence[Tensor]:
        """silu(x), then B_i(x)."""
        return [functional.silu(x), *(_bell(u, self.degree) for u in self._offsets(x))]

    def derivative(self, x: Tensor) -> Sequence[Tensor]:
        """The derivatives of `value`."""
        step = 2 * self.range / self.grid
        return [silu_derivative(x), *(_bell_slope(u, self.degree) / step for u in self._offsets(x))]

    def shapes(self, heads: int, units: int, keys: int) -> dict[str, Shape]:
        """See `Basis`."""
        functions = (heads, units, keys)
        return {"weight": functions, "coef": (heads, self.grid + self.degree, units, keys)}

    def initialise(self, parameters: Mapping[str, Tensor], scheme: str) -> None:
        """c ~ N(0, 1); w ~ N(0, 1), or N(0, 1 / q), with which H has variance near 1."""
        weight = parameters["weight"]
        nn.init.normal_(parameters["coef"])
        nn.init.normal_(weight, std=1.0 if is_paper(scheme) else weight.shape[2] ** -0.5)

    def pack(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """w and w c_i, [h, 1 + G + k, p, q]."""
        weight = parameters["weight"].unsqueeze(1)
        return torch.cat((weight, weight * parameters["coef"]), 1)

    def _offsets(self, x: Tensor) -> Iterator[Tensor]:
        """x in steps from the centre of each spline."""
        steps = self.grid / (2 * self.range)
        scaled = x * steps
        for i in range(self.grid + self.degree):
            yield scaled + (self.range * steps + (self.degree - 1) / 2 - i)


@dataclass(frozen=True)
class Chebyshev(FeatureBasis):
    """phi(x) = sum_{n=1..G} c_n T_n(tanh x): tanh maps any score into [-1, 1], where T_n are orthogonal. Ours."""

    grid: int = 3

    @property
    def num_features(self) -> int:
        """G."""
        return self.grid

    def value(self, x: Tensor) -> Sequence[Tensor]:
        """T_n(u) = 2 u T_{n-1}(u) - T_{n-2}(u), where u = tanh x."""
        u = torch.tanh(x)
        return _recur(u, torch.ones_like(u), u, self.grid + 1)[1:]

    def derivative(self, x: Tensor) -> Sequence[Tensor]:
        """n U_{n-1}(u) (1 - u^2), where U_n are the polynomials of the second kind."""
        u = torch.tanh(x)
        second_kind = _recur(u, torch.ones_like(u), 2 * u, self.grid)
        slope = 1 - u * u
        return [n * slope * second_kind[n - 1] for n in range(1, self.grid + 1)]


@dataclass(frozen=True)
class Linear(FeatureBasis):
    """phi(x) = c x: the part of the forms that learns no function."""

    @property
    def num_features(self) -> int:
        """One."""
        return 1

    def value(self, x: Tensor) -> Sequence[Tensor]:
        """x."""
        return [x]

    def derivative(self, x: Tensor) -> Sequence[Tensor]:
        """1."""
        return [torch.ones_like(x)]


def _recur(u: Tensor, first: Tensor, second: Tensor, count: int) -> list[Tensor]:
    terms = [first, second]
    for _ in range(count - 2):
        terms.append(2 * u * terms[-1] - terms[-2])
    return terms[:count]


def _bell(u: Tensor, degree: int) -> Tensor:
    """The cardinal B-spline about 0, by truncated powers of its lower half."""
    return _truncated_powers((degree + 1) / 2 - u.abs(), degree, degree)


def _bell_slope(u: Tensor, degree: int) -> Tensor:
    return _truncated_powers((degree + 1) / 2 - u.abs(), degree, degree - 1) * torch.sign(u).neg_()


def _truncated_powers(v: Tensor, degree: int, power: int) -> Tensor:
    """sum_j (-1)^j C(degree + 1, j) max(v - j, 0)^power / power!, for v up to (degree + 1) / 2."""
    total = _truncated_power(v, power) * (1 / math.factorial(power))
    for j in range(1, degree // 2 + 1):
        factor = (-1) ** j * math.comb(degree + 1, j) / math.factorial(power)
        total.add_(_truncated_power(v - j, power), alpha=factor)
    return total


def _truncated_power(v: Tensor, power: int) -> Tensor:
    if power == 0:
        return (v > 0).to(v.dtype)
    above = v.clamp(min=0)
    product = above
    for _ in range(power - 1):  # pow is slow
        product = product * above
    return product
