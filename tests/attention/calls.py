"""Random calls of Fourier-KArAt attention, and how far two results lie apart."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from karat_scale.attention import FourierKaratOperator, fourier_karat_attention
from karat_scale.attention.variants import ContentOperator


class Call(NamedTuple):
    """The tensors of a call, in the public functions' order."""

    query: Tensor
    key: Tensor
    value: Tensor
    cos_coef: Tensor
    sin_coef: Tensor
    proj: Tensor

    def to(self, dtype: torch.dtype) -> "Call":
        """Return the call in another dtype, with its tensors as leaves of a new graph."""
        return Call(*(x.detach().to(dtype).requires_grad_() for x in self))

    @property
    def largest_score(self) -> float:
        """Return max|A|. The phases of the harmonics reach G times that."""
        scores = self.query.double() @ self.key.double().mT / self.query.shape[-1] ** 0.5
        return scores.abs().max().item()


def make_call(
    batch: int, heads: int, tokens: int, width: int, rank: int, grid: int, *, logits: float = 1.0, seed: int = 0
) -> Call:
    """Return a float64 call with scores of standard deviation `logits` and variance-preserving parameters."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(shape, generator=generator, dtype=torch.float64)

    heads_first = (batch, heads, tokens, width)
    coefficients = (heads, rank, tokens, grid)
    return Call(
        normal(*heads_first, std=math.sqrt(logits)),
        normal(*heads_first, std=math.sqrt(logits)),
        normal(*heads_first),
        normal(*coefficients, std=(tokens * grid) ** -0.5),
        normal(*coefficients, std=(tokens * grid) ** -0.5),
        normal(heads, tokens, rank, std=(rank * tokens) ** -0.5),
    ).to(torch.float64)


def output_and_gradients(
    call: Call, upstream: Tensor, *, bias: Tensor | None = None, attend: Callable[..., Tensor] | None = None, **options
) -> list[Tensor]:
    """Return O, the gradients of the call's tensors and, if there is a bias, that of the bias."""
    output = (attend or fourier_karat_attention)(*call, bias=bias, **options)
    leaves = [*call, *([] if bias is None else [bias])]
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]


def gradients_of(attend: Callable[..., Tensor], tensors: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Return O, the gradients of the tensors and, if `attend` is a module, those of its parameters."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = attend(*leaves)
    own = attend.parameters() if isinstance(attend, torch.nn.Module) else ()
    return [output.detach(), *torch.autograd.grad(output, (*leaves, *own), upstream.to(output.dtype))]


def content_module(
    tokens: int, heads: int = 2, rank: int = 4, grid: int = 3, implementation: str = "auto"
) -> ContentOperator:
    """Return a module with parameters away from their start, where W is 0."""
    torch.manual_seed(tokens)
    made = ContentOperator(FourierKaratOperator(tokens, heads, rank, grid, implementation=implementation))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the L2 norm of the difference divided by that of `expected`, or undivided if `expected` is 0."""
    difference = (actual.double() - expected.double()).norm().item()
    return difference / (expected.double().norm().item() or 1.0)


NAMES = ("output", "query", "key", "value", "cos_coef", "sin_coef", "proj", "bias")


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Assert that every result has the expected shape and lies within the tolerance."""
    assert 0 < len(actual) == len(expected)
    for name, a, e in zip(NAMES, actual, expected, strict=False):
        assert a.shape == e.shape, name
        assert relative_error(a, e) <= tolerance, f"{name}: {relative_error(a, e):.2e} > {tolerance:.2e}"


class LargestTensor(TorchDispatchMode):
    """A dispatch mode that records the largest storage any operation makes, in elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                made = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.elements = max(self.elements, made)
        return result
