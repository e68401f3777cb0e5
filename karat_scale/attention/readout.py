"""O = (H W^T * keep) V and its derivative for one head and a slice of the batch, by tiles of query rows."""

from typing import Protocol

import torch
from torch import Tensor


class Readout(Protocol):
    """Reads tiles of H out to O, or gathers the gradients of V and W over the tiles that are pulled back."""

    def output(self, hidden: Tensor, keep: Tensor | None) -> Tensor:
        """O [b, rows, dv] of H [b, rows, r]."""

    def pull_back(self, hidden: Tensor, grad_output: Tensor, keep: Tensor | None) -> Tensor:
        """The gradient of the tile's H, [b, rows, r]."""

    def grad_value(self) -> Tensor:
        """The gradient of V, [b, N, dv]."""

    def grad_proj(self) -> Tensor:
        """The gradient of W, [N, r]."""


def readout_of(value: Tensor, proj: Tensor, masked: bool) -> Readout:
    """The cheapest readout of value [b, N, dv] by proj [N, r]."""
    return MaskedReadout(value, proj) if masked else NarrowReadout(value, proj)


class NarrowReadout:
    """O = H (W^T V): the r x dv matrix W^T V stands for all keys."""

    def __init__(self, value: Tensor, proj: Tensor) -> None:
        self._value, self._proj = value, proj.expand(value.shape[0], -1, -1)
        self._narrow = torch.bmm(self._proj.mT, value)
        self._grad_narrow = torch.zeros_like(self._narrow)

    def output(self, hidden: Tensor, keep: Tensor | None) -> Tensor:
        """See `Readout`."""
        return torch.bmm(hidden, self._narrow)

    def pull_back(self, hidden: Tensor, grad_output: Tensor, keep: Tensor | None) -> Tensor:
        """See `Readout`."""
        self._grad_narrow.baddbmm_(hidden.mT, grad_output)
        return torch.bmm(grad_output, self._narrow.mT)

    def grad_value(self) -> Tensor:
        """See `Readout`."""
        return torch.bmm(self._proj, self._grad_narrow)

    def grad_proj(self) -> Tensor:
        """See `Readout`."""
        return torch.bmm(self._value, self._grad_narrow.mT).sum(0)


class MaskedReadout:
    """A mask cuts single entries of S = H W^T, so rows of S are formed."""

    def __init__(self, value: Tensor, proj: Tensor) -> None:
        self._value, self._proj = value, proj.expand(value.shape[0], -1, -1)
        self._grad_value = value.new_zeros(value.shape)
        self._grad_proj = proj.new_zeros(self._proj.shape)

    def output(self, hidden: Tensor, keep: Tensor | None) -> Tensor:
        """See `Readout`."""
        return torch.bmm(self._learned(hidden, keep), self._value)

    def pull_back(self, hidden: Tensor, grad_output: Tensor, keep: Tensor | None) -> Tensor:
        """See `Readout`."""
        self._grad_value.baddbmm_(self._learned(hidden, keep).mT, grad_output)
        grad_learned = torch.bmm(grad_output, self._value.mT) * keep
        self._grad_proj.baddbmm_(grad_learned.mT, hidden)
        return torch.bmm(grad_learned, self._proj)

    def grad_value(self) -> Tensor:
        """See `Readout`."""
        return self._grad_value

    def grad_proj(self) -> Tensor:
        """See `Readout`."""
        return self._grad_proj.sum(0)

    def _learned(self, hidden: Tensor, keep: Tensor | None) -> Tensor:
        return torch.bmm(hidden, self._proj.mT) * keep
