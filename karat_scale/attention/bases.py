"""The functions phi_pq(x) that KArAt learns: features with coefficients, plus a fixed base activation b(x).

A feature basis writes phi_pq(x) = b(x) + sum_f C_pqf f(x): every learnable unit (p, q) has coefficients of its
own over features it shares with all others, so H = sum_f f(A) C_f^T is a sum of matrix products
(arXiv 2503.10632, section 4).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

Initialisation = Literal["paper", "variance_preserving"]


class FeatureBasis(Protocol):
    """What an implementation needs of a basis; `values` and its like are [F, ...] over scores of shape [...]."""

    num_features: int

    def evaluate(self, scores: Tensor, out: Tensor) -> None:
        """Writes f(scores) into out[f] for every feature f."""

    def pull_back(self, scores: Tensor, values: Tensor, upstream: Tensor) -> Tensor:
        """Returns sum_f upstream[f] * f'(scores), given values[f] = f(scores); may overwrite `upstream`."""


@dataclass(frozen=True)
class FourierBasis:
    """cos(m x) and sin(m x) for m = 1..G, as features cos 1..G, then sin 1..G."""

    grid: int

    @property
    def num_features(self) -> int:
        """2 G."""
        return 2 * self.grid

    def evaluate(self, scores: Tensor, out: Tensor) -> None:
        """One cosine and one sine, then f((m+1) x) = 2 cos(x) f(m x) - f((m-1) x) for both."""
        waves = out.unflatten(0, (2, self.grid))
        cosine, sine = waves[:, 0].unbind()
        torch.cos(scores, out=cosine)
        torch.sin(scores, out=sine)
        if self.grid == 1:
            return
        twice_cosine = 2 * cosine
        torch.mul(waves[:, 0], twice_cosine, out=waves[:, 1])
        waves[0, 1].sub_(1)  # cos(0 x) = 1 and sin(0 x) = 0
        for m in range(2, self.grid):
            torch.mul(waves[:, m - 1], twice_cosine, out=waves[:, m]).sub_(waves[:, m - 2])

    def pull_back(self, scores: Tensor, values: Tensor, upstream: Tensor) -> Tensor:
        """sum_m m (upstream_sin cos(m x) - upstream_cos sin(m x))."""
        cosines, sines = values.unflatten(0, (2, self.grid))
        from_cosines, from_sines = upstream.unflatten(0, (2, self.grid))
        slopes = from_sines.mul_(cosines).addcmul_(from_cosines, sines, value=-1)
        orders = torch.arange(1, self.grid + 1, dtype=scores.dtype, device=scores.device)
        return torch.mv(slopes.flatten(1).t(), orders).view_as(scores)

    def pack(self, cos_coef: Tensor, sin_coef: Tensor) -> Tensor:
        """The coefficients in feature order: two [h, r, N, G] become [2G, h, r, N]."""
        return torch.stack((cos_coef, sin_coef)).permute(0, 4, 1, 2, 3).flatten(0, 1)


FEATURE_BASES: dict[str, Callable[[int], FeatureBasis]] = {
    "fourier": lambda num_features: FourierBasis(num_features // 2),
}


def feature_basis(name: str, num_features: int) -> FeatureBasis:
    """The basis of that name with `num_features` features."""
    return FEATURE_BASES[name](num_features)


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
def initialise_fourier(cos_coef: Tensor, sin_coef: Tensor, proj: Tensor, scheme: Initialisation) -> None:
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
        raise ValueError(f"init = {scheme!r}: expected one of {', '.join(get_args(Initialisation))}")
    nn.init.normal_(cos_coef, std=coefficient_std)
    nn.init.normal_(sin_coef, std=coefficient_std)
