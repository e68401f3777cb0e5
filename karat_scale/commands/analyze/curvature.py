"""Sharpness: the top eigenvalues of the loss's Hessian, and its trace, from Hessian-vector products."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from karat_scale.commands.analyze.eigenvalues import Eigenvalue, Vector, largest_eigenvalues

Vectors = list[Tensor]


class Hessian:
    """The Hessian of a mean of losses, as products with vectors. The matrix itself is never stored.

    Args:
        parameters: the parameters of the derivative.
        losses: called for each product. It yields parts whose sum is the loss, so that one part's graph at a time is in
            memory. The graph must be differentiable twice (the operator's "reference").
    """

    def __init__(self, parameters: Sequence[Tensor], losses: Callable[[], Any]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._losses = losses

    def times(self, vectors: Sequence[Tensor]) -> Vectors:
        """Return H v, in parts with the parameters' shapes."""
        total = [torch.zeros_like(v) for v in vectors]
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            for loss in self._losses():
                grads = torch.autograd.grad(loss, self._parameters, create_graph=True, materialize_grads=True)
                inner = sum((g * v).sum() for g, v in zip(grads, vectors, strict=True))
                assert isinstance(inner, Tensor)
                parts = torch.autograd.grad(inner, self._parameters, materialize_grads=True)
                torch._foreach_add_(total, list(parts))
                del (
                    loss,
                    grads,
                    inner,
                    parts,
                )  # as large as the model, beside the next part's graph
        return total

    def top_eigenvalues(self, count: int, products: int, seed: int) -> list[Eigenvalue]:
        """Return the `count` eigenvalues largest in size, with sign, largest first. See `largest_eigenvalues`."""
        sizes = [p.numel() for p in self._parameters]

        def times(vector: Vector) -> Vector:
            parts = zip(torch.from_numpy(vector).split(sizes), self._parameters, strict=True)
            product = self.times([part.view_as(p).to(p) for part, p in parts])
            return torch.cat([part.flatten().float().cpu() for part in product]).numpy()

        return largest_eigenvalues(times, sum(sizes), count, products, seed)

    def trace(self, probes: int, seed: int) -> tuple[float, float]:
        """Return Hutchinson's estimate of the trace with Rademacher probes, and its standard error."""
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
