"""Polynomials as shared features: Chebyshev, and the linear function."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from karat_scale.attention.bases.base import FeatureBasis


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
