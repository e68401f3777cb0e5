"""The functions phi_pq(x) that KArAt learns: features with coefficients, plus a fixed base activation b(x).

A feature basis writes phi_pq(x) = b(x) + sum_f C_pqf f(x): every learnable unit (p, q) has coefficients of its
own over features it shares with all others, so H = sum_f f(A) C_f^T is a sum of matrix products
(arXiv 2503.10632, section 4).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

INITIALISATIONS = ("paper", "variance_preserving")


class BoundFeatures(Protocol):
    """A basis tied to the arrays of a tile: scores [b, rows, N] and values [F, b, rows, N]."""

    def evaluate(self) -> None:
        """Writes f(scores) into values[f] for every feature f."""

    def pull_back(self, grad_hidden: Tensor, coef: Tensor) -> Tensor:
        """The gradient of the scores, sum_f (dH C_f) f'(scores), given evaluated values.

        `grad_hidden` is dH [b rows, r] and `coef` is C [F, r, N]. The next call overwrites the result.
        """


class FeatureBasis(Protocol):
    """What an implementation needs of a basis."""

    @property
    def num_features(self) -> int:
        """F."""

    def bind(self, scores: Tensor, values: Tensor) -> BoundFeatures:
        """Ties the basis to contiguous arrays that are used again for many tiles."""


@dataclass(frozen=True)
class FourierBasis:
    """cos(m x) and sin(m x) for m = 1..G, as features: all cosines, then all sines."""

    num_features: int

    def bind(self, scores: Tensor, values: Tensor) -> "FourierFeatures":
        """See `FeatureBasis`."""
        return FourierFeatures(scores, values)

    @staticmethod
    def pack(cos_coef: Tensor, sin_coef: Tensor) -> Tensor:
        """The coefficients in feature order: two [h, r, N, G] become [h, 2G, r, N]."""
        return torch.stack((cos_coef, sin_coef)).permute(1, 0, 4, 2, 3).flatten(1, 2)


class FourierFeatures:
    """The harmonics of one tile: one cosine and one sine an element, the rest by angle addition."""

    def __init__(self, scores: Tensor, values: Tensor) -> None:
        grid = values.shape[0] // 2
        self._scores = scores
        # Index m holds cos(m x) and sin(m x).
        self._cos = [scores.new_ones(()), *values[:grid].unbind()]
        self._sin = [scores.new_zeros(()), *values[grid:].unbind()]

    def evaluate(self) -> None:
        """exp(i m x) = exp(i (a - b) x) + 2i sin(b x) exp(i a x), where a + b = m and a - b is 0 or 1.

        Its errors grow with log m where those of the recurrence from m - 1 and m - 2 grow with m^2 near x = 0.
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


# By name, given the number of features F.
FEATURE_BASES: dict[str, Callable[[int], FeatureBasis]] = {"fourier": FourierBasis}


@dataclass(frozen=True)
class BaseActivation:
    """b(x) and b'(x), elementwise; b(0) = 0."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _silu_derivative(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def _gelu_derivative(x: Tensor) -> Tensor:
    normal_cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return normal_cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


# The paper's choice is no base at all.
BASE_ACTIVATIONS: dict[str, BaseActivation | None] = {
    "zero": None,
    "identity": BaseActivation(lambda x: x, torch.ones_like),
    "silu": BaseActivation(functional.silu, _silu_derivative),
    "gelu": BaseActivation(functional.gelu, _gelu_derivative),
}


@torch.no_grad()
def initialise_fourier(cos_coef: Tensor, sin_coef: Tensor, proj: Tensor, scheme: str) -> None:
    """Draws the operator's start in place: cos_coef, sin_coef [h, r, N, G] and proj = W [h, N, r].

    "paper": coefficients N(0, 1) (arXiv 2503.10632); W, which the paper leaves open, truncated normal of std 0.02.
    "variance_preserving": coefficients N(0, 1 / (N G)) and W ~ N(0, 1 / (r N)), so that H has variance near 1
    and the output the variance of the values.

    Raises ValueError on any other scheme.
    """
    _, rank, tokens, grid = cos_coef.shape
    if scheme == "paper":
        coefficient_std = 1.0
        nn.init.trunc_normal_(proj, std=0.02)
    elif scheme == "variance_preserving":
        coefficient_std = (tokens * grid) ** -0.5
        nn.init.normal_(proj, std=(rank * tokens) ** -0.5)
    else:
        raise ValueError(f"init = {scheme!r}: expected one of {', '.join(INITIALISATIONS)}")
    nn.init.normal_(cos_coef, std=coefficient_std)
    nn.init.normal_(sin_coef, std=coefficient_std)
