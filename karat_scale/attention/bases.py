"""The functions phi_pq(x) that KArAt learns: features with coefficients, plus a fixed base activation b(x).

A feature basis writes phi_pq(x) = b(x) + sum_f C_pqf f(x): every learnable unit (p, q) has coefficients of its
own over features it shares with all others, so H = sum_f f(A) C_f^T is a sum of matrix products
(arXiv 2503.10632, section 4).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

INITIALISATIONS = ("paper", "variance_preserving")


class BoundFeatures(Protocol):
    """A basis tied to the arrays of a tile: scores of any shape, values and upstream [F, *scores.shape]."""

    def evaluate(self) -> None:
        """Writes f(scores) into values[f] for every feature f."""

    def pull_back(self) -> Tensor:
        """Returns sum_f upstream[f] * f'(scores), given evaluated values; may overwrite upstream."""


class FeatureBasis(Protocol):
    """What an implementation needs of a basis."""

    @property
    def num_features(self) -> int:
        """F."""

    def bind(self, scores: Tensor, values: Tensor, upstream: Tensor | None) -> BoundFeatures:
        """Ties the basis to contiguous arrays that are used again for many tiles; only `pull_back` needs upstream."""


@dataclass(frozen=True)
class FourierBasis:
    """s_m cos(m x) and s_m sin(m x) for m = 1..G, as features: all cosines, then all sines.

    The signs s = +, -, -, +, +, -, -, ... let one fused operation make each harmonic; `pack` undoes them.
    """

    num_features: int

    def bind(self, scores: Tensor, values: Tensor, upstream: Tensor | None) -> "FourierFeatures":
        """See `FeatureBasis`."""
        return FourierFeatures(scores, values, upstream)

    @staticmethod
    def pack(cos_coef: Tensor, sin_coef: Tensor) -> Tensor:
        """The coefficients of the features: two [h, r, N, G] become [h, 2G, r, N]."""
        orders = torch.arange(1, cos_coef.shape[-1] + 1, device=cos_coef.device)
        signs = 1 - (orders // 2 % 2) * 2
        return (torch.stack((cos_coef, sin_coef)) * signs).permute(1, 0, 4, 2, 3).flatten(1, 2)


class FourierFeatures:
    """The harmonics of one tile: one cosine and one sine an element, the rest by angle addition."""

    def __init__(self, scores: Tensor, values: Tensor, upstream: Tensor | None) -> None:
        grid = values.shape[0] // 2
        waves = values.unflatten(0, (2, grid))
        self._scores = scores
        self._cosines, self._sines = waves.unbind()
        self._harmonics = waves.unbind(1)
        self._cosine, self._sine = self._harmonics[0].unbind()
        self._zeroth = scores.new_tensor([1.0, 0.0]).view(2, *(1,) * scores.dim())
        if upstream is not None:
            self._from_cosines, self._from_sines = upstream.unflatten(0, (2, grid)).unbind()
            self._by_element = self._from_sines.flatten(1).t()
            self._orders = torch.arange(1, grid + 1, dtype=scores.dtype, device=scores.device)
            self._grad_scores = torch.empty_like(scores)

    def evaluate(self) -> None:
        """f((m + 1) x) = 2 cos(x) f(m x) - f((m - 1) x), for cosine and sine together, up to sign."""
        torch.cos(self._scores, out=self._cosine)
        torch.sin(self._scores, out=self._sine)
        before, last = self._zeroth, self._harmonics[0]
        for m, harmonic in enumerate(self._harmonics[1:], 1):
            # s_{m+1} = -s_{m-1}, so 2 cos(x) s_m f(m x) enters with the sign s_{m+1} s_m = (-1)^m.
            torch.addcmul(before, last, self._cosine, value=2 * (-1) ** m, out=harmonic)
            before, last = last, harmonic

    def pull_back(self) -> Tensor:
        """sum_m m (upstream_sin cos(m x) - upstream_cos sin(m x)), in an array the next call overwrites."""
        self._from_sines.mul_(self._cosines).addcmul_(self._from_cosines, self._sines, value=-1)
        return torch.mv(self._by_element, self._orders, out=self._grad_scores.view(-1)).view_as(self._grad_scores)


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
