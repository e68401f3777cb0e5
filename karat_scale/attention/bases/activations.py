"""Base activations b(x), which every unit adds to its learnable part."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


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
