"""Polynomials and their quotients: Chebyshev, the linear function, and the safe Pade approximant without poles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from karat_scale.attention.bases.base import ElementwiseBasis, FeatureBasis, Shape, is_paper, normal_mean


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
            points = x.to(b.device, b.dtype).view(-1, 1, 1, 1)
            below = (_horner(points, b.unbind(1)) * points).abs() + 1
            return sum(points.pow(2 * i) for i in range(a.shape[1])) / below.square()

        a.mul_((normal_mean(square) * a.shape[3]).rsqrt().unsqueeze(1))

    def value(self, x: Tensor, *theta: Tensor) -> Tensor:
        """phi(x)."""
        above, below = self._polynomials(x, theta)
        return above / below.abs().add_(1)

    def derivative(self, x: Tensor, *theta: Tensor) -> Sequence[Tensor]:
        """By x, then by a_0..a_m and b_1..b_n."""
        by_above, by_below, slope = self._partial(x, theta)
        m, n = self.orders
        powers = [x.pow(i) for i in range(max(m, n) + 1)]
        return [slope, *(by_above * powers[i] for i in range(m + 1)), *(by_below * powers[j + 1] for j in range(n))]

    def pull_back(self, x: Tensor, upstream: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """As `derivative`, by running products with x in place of its powers."""
        by_above, by_below, slope = self._partial(x, theta.unbind())
        moments = [by_above.mul_(upstream).sum(0)]
        moments += [by_above.mul_(x).sum(0) for _ in range(self.orders[0])]
        by_below.mul_(upstream)
        moments += [by_below.mul_(x).sum(0) for _ in range(self.orders[1])]
        return slope.mul_(upstream), torch.stack(moments)

    def _partial(self, x: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives of phi by the two polynomials, and by x."""
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
    """coef_0 + coef_1 x + ..., in memory of its own."""
    *rest, last = coef
    total = last.expand(torch.broadcast_shapes(x.shape, last.shape))
    for c in reversed(rest):
        total = torch.addcmul(c, total, x)
    return total if rest else total.clone()
