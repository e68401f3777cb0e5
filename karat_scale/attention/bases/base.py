"""The interface of a basis: the functions phi_pq(x) of a learnable unit, as value, derivative and initialisation.

There are two kinds. A `FeatureBasis` is linear in the coefficients: phi_pq(x) = sum_f C_pqf f(x) over features that
all units share, so H = sum_f f(A) C_f^T is a sum of matrix products. An `ElementwiseBasis` has parameters inside
the function, so every pair of a score and a unit costs an evaluation. Your own basis subclasses one of them. Every unit
adds a base activation b(x) to its learnable part.
"""

import ast
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from karat_scale.foundation import tables

INITIALISATIONS = ("paper", "variance_preserving")
Shape = tuple[int, ...]


class Basis(ABC):
    """One kind of function phi_pq; its settings decide the parameters' shapes.

    An instance never changes, and its attributes are its settings (a frozen dataclass is best).
    """

    amplitudes: ClassVar[tuple[str, ...]] = ()
    """The parameters that multiply phi: if all of them are scaled by s, so is phi.

    Without them, N is fixed, and O starts with the values' variance in the modular form only.
    """

    @property
    def reach(self) -> float:
        """Return the largest |x| up to which different scores can give different phi(x); infinity by default."""
        return math.inf

    @cached_property
    def key(self) -> str:
        """Return the class and its settings as text."""
        kind = type(self)
        # The text of a tensor is rounded, its list is not.
        settings = {name: x.tolist() if hasattr(x, "tolist") else x for name, x in vars(self).items()}
        return f"{kind.__module__}.{kind.__qualname__}({settings})"

    @abstractmethod
    def shapes(self, heads: int, units: int, keys: int) -> dict[str, Shape]:
        """Return names and shapes of the parameters of [h, p, q] functions."""

    @abstractmethod
    def initialise(self, parameters: Mapping[str, Tensor], scheme: str) -> None:
        """Draw the parameters in place, by the scheme "paper" or "variance_preserving".

        With the second, sum_q phi_pq(x_q) has variance 1 over standard normal scores x_q.
        """

    def pack(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the input of `value` and `derivative`, [h, K, p, q], computed by differentiable operations.

        The default joins the parameters, in the order of `shapes`; those of shape [h, p, q] become K = 1.
        """
        return torch.cat([x.unsqueeze(1) if x.dim() == 3 else x for x in parameters.values()], 1)


class BoundFeatures(Protocol):
    """A feature basis bound to the arrays of a tile: scores [b, rows, N] and values [F, b, rows, N]."""

    def evaluate(self) -> None:
        """Writes f(scores) into values[f] for every feature f."""

    def pull_back(self, grad_hidden: Tensor, coef: Tensor) -> Tensor:
        """The gradient of the scores, sum_f (dH C_f) f'(scores), given evaluated values.

        `grad_hidden` is dH [b rows, r] and `coef` is C [F, r, N]. The next call overwrites the result.
        """


class FeatureBasis(Basis):
    """phi_pq(x) = sum_f C_pqf f(x). Its parameter is `coef` [h, F, p, q], unless `shapes` and `pack` are overridden."""

    amplitudes: ClassVar[tuple[str, ...]] = ("coef",)

    @property
    @abstractmethod
    def num_features(self) -> int:
        """F."""

    @abstractmethod
    def value(self, x: Tensor) -> Sequence[Tensor]:
        """Return f(x) for every feature, each of x's shape."""

    @abstractmethod
    def derivative(self, x: Tensor) -> Sequence[Tensor]:
        """Return f'(x) for every feature, each of x's shape."""

    def shapes(self, heads: int, units: int, keys: int) -> dict[str, Shape]:
        """See `Basis`."""
        return {"coef": (heads, self.num_features, units, keys)}

    def initialise(self, parameters: Mapping[str, Tensor], scheme: str) -> None:
        """Draw from N(0, 1), or from N(0, 1 / (q sum_f E f(x)^2)), with which H has variance 1."""
        coef = parameters["coef"]
        nn.init.normal_(coef, std=1.0 if is_paper(scheme) else (coef.shape[3] * self.mean_square()) ** -0.5)

    def mean_square(self) -> float:
        """Return sum_f E f(x)^2 over standard normal scores x."""
        return float(normal_mean(lambda x: torch.stack(list(self.value(x)), 1).square().sum(1)))

    def bind(self, scores: Tensor, values: Tensor) -> BoundFeatures:
        """Bind the basis to contiguous arrays that are reused for many tiles."""
        return _PlainFeatures(self, scores, values)


class ElementwiseBasis(Basis):
    """phi_pq(x) with parameters inside; `theta` is what `pack` gives, unbound to K tensors that broadcast with x."""

    @abstractmethod
    def value(self, x: Tensor, *theta: Tensor) -> Tensor:
        """phi(x)."""

    @abstractmethod
    def derivative(self, x: Tensor, *theta: Tensor) -> Sequence[Tensor]:
        """Return the derivatives with respect to x and to each of theta, each of x's shape."""

    def sum_over_keys(self, x: Tensor, theta: Tensor) -> Tensor:
        """sum_q phi_q(x[:, q]) [rows] of x [rows, q] and theta [K, q]."""
        return self.value(x, *theta).sum(-1)

    def pull_back(self, x: Tensor, upstream: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of x [rows, q] and theta [K, q], given the gradient of phi, which broadcasts to x's shape.

        Both methods use `value` and `derivative`; a basis whose parts share work may override them.
        """
        by_x, *by_theta = self.derivative(x, *theta)
        return by_x * upstream, torch.stack([(by * upstream).sum(0) for by in by_theta])


class _PlainFeatures:
    """`BoundFeatures` made of the `value` and `derivative` of a basis."""

    def __init__(self, basis: FeatureBasis, scores: Tensor, values: Tensor) -> None:
        self._basis, self._scores, self._values = basis, scores, values

    def evaluate(self) -> None:
        for target, value in zip(self._values, self._basis.value(self._scores), strict=True):
            target.copy_(value)

    def pull_back(self, grad_hidden: Tensor, coef: Tensor) -> Tensor:
        total = torch.zeros_like(self._scores)
        for slope, unit in zip(self._basis.derivative(self._scores), coef, strict=True):
            total.addcmul_((grad_hidden @ unit).view_as(total), slope)
        return total


def is_paper(scheme: str) -> bool:
    """Return True if the scheme is the paper's, False if it is ours. Raises ValueError for any other."""
    if scheme not in INITIALISATIONS:
        raise ValueError(f"init = {scheme!r}: expected one of {', '.join(INITIALISATIONS)}")
    return scheme == "paper"


def normal_mean(function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mean of a function over standard normal scores; the function maps points [n] to values [n, ...]."""
    with torch.device("cpu"):  # also if a model is built on the meta device: the basis may create tensors
        points = torch.linspace(-6, 6, 97, dtype=torch.float64)
        density = (points.square() * -0.5).exp()
        values = function(points)
        mean: Tensor = torch.tensordot((density / density.sum()).to(values), values, 1)
        return mean


@torch.no_grad()
def initialise_projector(proj: Tensor, scheme: str, form: str = "modular") -> None:
    """Draw W [h, N, r]; the paper does not define its initial values.

    "paper": truncated normal of std 0.02. "variance_preserving": N(0, 1 / (r N)), so that H W^T V has the values'
    variance where H has variance 1, or, where W projects the scores, N(0, 1 / N), so that A W has the scores' variance.
    """
    tokens, rank = proj.shape[1:]
    if is_paper(scheme):
        nn.init.trunc_normal_(proj, std=0.02)
    else:
        nn.init.normal_(proj, std=(tokens * (1 if form == "project_first" else rank)) ** -0.5)


@dataclass(frozen=True)
class BaseActivation:
    """b(x) and b'(x), elementwise; b(0) = 0."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def silu_derivative(x: Tensor) -> Tensor:
    """The derivative of x sigmoid(x)."""
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def _gelu_derivative(x: Tensor) -> Tensor:
    normal_cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return normal_cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


# The paper's choice is no base at all.
BASE_ACTIVATIONS: dict[str, BaseActivation | None] = {
    "zero": None,
    "identity": BaseActivation(lambda x: x, torch.ones_like),
    "silu": BaseActivation(functional.silu, silu_derivative),
    "gelu": BaseActivation(functional.gelu, _gelu_derivative),
}


# The bases by key: registered operations take strings, not objects.
_KNOWN: dict[str, Basis] = {}


def basis_class(name: str) -> type[Basis]:
    """Return the class of a name in the table, or the one at `package.module:Class`.

    Raises ValueError if there is none, or if it is not a basis that can be built.
    """
    if name in tables.BASES:
        listed: type[Basis] = tables.load(tables.BASES[name].place)
        return listed
    module, colon, class_name = name.partition(":")
    if not (colon and module and class_name):
        raise ValueError(f"basis = {name!r}: expected one of {', '.join(tables.BASES)}, or package.module:Class")
    return tables.load_class("basis", name, FeatureBasis, ElementwiseBasis)


def make_basis(name: str, **settings: Any) -> Basis:
    """Return a basis by name, built with the settings that its constructor takes.

    Raises ValueError like `basis_class`, and if the constructor refuses the settings.
    """
    found = basis_class(name)
    taken = inspect.signature(found).parameters
    try:
        basis = found(**{key: value for key, value in settings.items() if key in taken})
    except TypeError as error:
        raise ValueError(f"basis = {name!r}: cannot be built from {', '.join(settings)}: {error}") from error
    key_of(basis)
    return basis


def key_of(basis: Basis) -> str:
    """Return the basis's name for registered operations; `basis_of` finds it under this name."""
    key = basis.key
    while type(_KNOWN.setdefault(key, basis)) is not type(basis):  # a class that was defined again, as in a notebook
        key += "'"
    return key


def basis_of(key: str) -> Basis:
    """Return the basis that `key_of` named; in another process only a basis of the table is found."""
    for row in tables.BASES.values() if key not in _KNOWN else ():  # as a saved program names it
        kind = tables.load(row.place)
        start = f"{kind.__module__}.{kind.__qualname__}("
        if key.startswith(start):
            key_of(kind(**ast.literal_eval(key.removeprefix(start).removesuffix(")"))))
    return _KNOWN[key]
