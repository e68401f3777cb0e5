"""Sharpness as numbers: the top eigenvalues of the loss's Hessian, and its trace, from Hessian-vector products."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Vectors = list[Tensor]
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Eigenvalue:
    """`converged`: whether the iteration settled before its last step."""

    value: float
    converged: bool


class Hessian:
    """The Hessian of a mean of losses, as products with vectors; nothing of its size is held.

    Args:
        parameters: by which the loss is differentiated.
        losses: called anew for each product; gives parts whose sum is the loss, so that one part's graph at a time is
            in memory. The graph must be differentiable twice (the operator's "reference").
    """

    def __init__(self, parameters: Sequence[Tensor], losses: Callable[[], Any]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._losses = losses

    def times(self, vectors: Sequence[Tensor]) -> Vectors:
        """H v, in parts of the parameters' shapes."""
        total = [torch.zeros_like(v) for v in vectors]
        with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivative
            for loss in self._losses():
                grads = torch.autograd.grad(loss, self._parameters, create_graph=True, materialize_grads=True)
                inner = sum((g * v).sum() for g, v in zip(grads, vectors, strict=True))
                assert isinstance(inner, Tensor)
                parts = torch.autograd.grad(inner, self._parameters, materialize_grads=True)
                torch._foreach_add_(total, list(parts))
                del loss, grads, inner, parts  # each of the model's size, beside the next part's graph
        return total

    def top_eigenvalues(self, count: int, steps: int, seed: int) -> list[Eigenvalue]:
        """The `count` eigenvalues largest in size, signed, by power iteration and deflation, the largest first.

        Each stops at a relative change below 1 %, or after `steps` products.
        """
        generator = torch.Generator().manual_seed(seed)
        found: list[Vectors] = []
        values: list[Eigenvalue] = []
        for _ in range(count):
            vector = _unit(self._draw(generator, torch.randn), found)
            value, settled = 0.0, False
            for _step in range(steps):
                product = self.times(vector)
                before, value = value, _inner(product, vector)
                vector = _unit(product, found)
                settled = abs(value - before) <= TOLERANCE * abs(value)
                if settled:
                    break
            found.append(vector)
            values.append(Eigenvalue(value, settled))
        return sorted(values, key=lambda found: -abs(found.value))

    def trace(self, probes: int, seed: int) -> tuple[float, float]:
        """Hutchinson's estimate with Rademacher probes, and its standard error."""
        generator = torch.Generator().manual_seed(seed)
        samples = []
        for _ in range(probes):
            signs = [torch.where(x < 0, -1.0, 1.0).to(x.dtype) for x in self._draw(generator, torch.randn)]
            samples.append(_inner(self.times(signs), signs))
        values = torch.tensor(samples, dtype=torch.float64)
        error = values.std().item() / probes**0.5 if probes > 1 else float("nan")
        return values.mean().item(), error

    def _draw(self, generator: torch.Generator, draw: Callable[..., Tensor]) -> Vectors:
        return [draw(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in self._parameters]


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return float(sum((a * b).sum(dtype=torch.float64) for a, b in zip(left, right, strict=True)))


def _unit(vector: Vectors, away_from: Sequence[Vectors]) -> Vectors:
    """In place, of length one and orthogonal to those found."""
    for other in away_from:
        torch._foreach_add_(vector, other, alpha=-_inner(vector, other))
    torch._foreach_div_(vector, max(_inner(vector, vector) ** 0.5, 1e-30))
    return vector
