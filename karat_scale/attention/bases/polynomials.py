"""Polynomials: Chebyshev, the linear function, B-splines, and the safe Pade approximant without poles."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from karat_scale.attention.bases.base import (
    ElementwiseBasis,
    FeatureBasis,
    Shape,
    is_paper,
    normal_mean,
    silu_derivative,
)


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


@dataclass(frozen=True)
class Rational(ElementwiseBasis):
    """phi(x) = (a_0 + a_1 x + ... + a_m x^m) / (1 + |b_1 x + ... + b_n x^n|), of orders (m, n).

    Parameters `numerator` a [h, m + 1, p, q] and `denominator` b [h, n, p, q].
    """

    amplitudes = ("numerator",)

    orders: tuple[int, int] = (5, 4)

    def shapes(self, heads: int, units: int, keys: int) -> dict[str, Shape]:
        """See `Basis`."""
        m, n = self.orders
        return {"numerator": (heads, m + 1, units, keys), "denominator": (heads, n, units, keys)}

    def initialise(self, parameters: Mapping[str, Tensor], scheme: str) -> None:
        """b ~ N(0, 1); a ~ N(0, 1), or such that each function has variance 1 / q, with which H has variance 1."""
        a, b = parameters["numerator"], parameters["denominator"]
        nn.init.normal_(a)
        nn.init.normal_(b)
        if is_paper(scheme):
            return

        def square(x: Tensor) -> Tensor:
            wide = b.to(torch.promote_types(b.dtype, torch.float32))  # x^10 is too large for float16
            points = x.to(wide.device, wide.dtype).view(-1, 1, 1, 1)
            below = (_horner(points, wide.unbind(1)) * points).abs() + 1
            return sum(points.pow(2 * i) for i in range(a.shape[1])) / below.square()

        a.mul_((normal_mean(square) * a.shape[3]).rsqrt().unsqueeze(1))

    def value(self, x: Tensor, *theta: Tensor) -> Tensor:
        """phi(x)."""
        above, below = self._polynomials(x, theta)
        return above / below.abs().add_(1)

    def derivative(self, x: Tensor, *theta: Tensor) -> Sequence[Tensor]:
        """Return the derivatives with respect to x, to a_0..a_m and to b_1..b_n."""
        by_above, by_below, slope = self._partial(x, theta)
        m, n = self.orders
        powers = [x.pow(i) for i in range(max(m, n) + 1)]
        return [slope, *(by_above * powers[i] for i in range(m + 1)), *(by_below * powers[j + 1] for j in range(n))]

    def pull_back(self, x: Tensor, upstream: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Like `derivative`, but running products with x replace the powers of x."""
        by_above, by_below, slope = self._partial(x, theta.unbind())
        moments = [by_above.mul_(upstream).sum(0)]
        moments += [by_above.mul_(x).sum(0) for _ in range(self.orders[0])]
        by_below.mul_(upstream)
        moments += [by_below.mul_(x).sum(0) for _ in range(self.orders[1])]
        return slope.mul_(upstream), torch.stack(moments)

    def _partial(self, x: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the derivatives of phi with respect to the two polynomials and to x."""
        m, n = self.orders
        above, below = self._polynomials(x, theta)
        by_above = (below.abs() + 1).reciprocal_()
        by_below = above.mul_(by_above).mul_(by_above).mul_(torch.sign(below)).neg_()
        slope_above = _horner(x, [i * theta[i] for i in range(1, m + 1)])
        slope_below = _horner(x, [j * theta[m + j] for j in range(1, n + 1)])
        return by_above, by_below, slope_above.mul_(by_above).addcmul_(slope_below, by_below)

    def _polynomials(self, x: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        m = self.orders[0]
        return _horner(x, theta[: m + 1]), _horner(x, theta[m + 1 :]) * x


def _horner(x: Tensor, coef: Sequence[Tensor]) -> Tensor:
    """Return coef_0 + coef_1 x + ..., in new memory."""
    *rest, last = coef
    total = last.expand(torch.broadcast_shapes(x.shape, last.shape))
    for c in reversed(rest):
        total = torch.addcmul(c, total, x)
    return total if rest else total.clone()


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
    def reach(self) -> float:
        """Return I: outside [-I, I] the splines end one after the other, and only SiLU is left."""
        return self.range

    @property
    def step(self) -> float:
        """The distance between two knots."""
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
        """Return the centre of a spline of any degree, in steps; spline 0 begins where the extended grid does."""
        return number - self.grid / 2 - self.degree + (degree + 1) / 2

    def _bells(self, x: Tensor, degree: int, count: int) -> list[Tensor]:
        return [_cardinal((x / self.step - self.centre(i, degree)).abs(), degree) for i in range(count)]


class SplineFeatures:
    """The splines of one tile, in arrays that are reused.

    The derivative of a spline is a difference of splines of one degree less, so the gradient is a sum of these splines
    weighted by differences of coefficients.
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
        """Write one spline, computed as in `_cardinal`."""
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

    This is sum_j (-1)^j C(k + 1, j) max(v - j, 0)^k / k! over j <= k / 2, where v = (k + 1) / 2 - distance.
    """
    v = (degree + 1) / 2 - distance
    if degree == 0:
        return (v > 0).to(v.dtype)
    terms = [(-1) ** j * math.comb(degree + 1, j) * (v - j).clamp(min=0) ** degree for j in range(degree // 2 + 1)]
    return torch.stack(terms).sum(0) / math.factorial(degree)
