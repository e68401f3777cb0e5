"""O = S V with S = H W^T for one head, and its derivative.

Plainly, O = H (W^T V), and the r x dv matrix W^T V stands for all keys. Whatever acts on single entries or rows of
S (a mask, the simplex) or has no W (a form of full rank) needs rows of S, formed one tile at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from karat_scale.attention import simplex


def read_out(hidden: Tensor, value: Tensor, proj: Tensor) -> Tensor:
    """O [B, N, dv] of H [B, N, r], V [B, N, dv] and W [N, r]."""
    return torch.bmm(hidden, torch.bmm(_per_item(proj.mT, value), value))


def pull_back(hidden: Tensor, value: Tensor, proj: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of H, V and W."""
    narrow = torch.bmm(_per_item(proj.mT, value), value)
    grad_narrow = torch.bmm(hidden.mT, grad_output)
    grad_hidden = torch.bmm(grad_output, narrow.mT)
    grad_value = torch.bmm(_per_item(proj, value), grad_narrow)
    return grad_hidden, grad_value, torch.bmm(value, grad_narrow.mT).sum(0)


class Rows(NamedTuple):
    """How rows of S follow from those of H: S = project(H W^T * keep), where each step may be absent."""

    proj: Tensor | None
    keep: Tensor | None
    on_simplex: bool

    def learned(self, hidden: Tensor) -> Tensor:
        """S [b, rows, N] of H [b, rows, r]; may be H itself."""
        rows = hidden if self.proj is None else hidden @ self.proj.mT
        if self.on_simplex:
            return simplex.project(rows, self.keep)
        return rows if self.keep is None else rows * self.keep

    def pull_back(self, learned: Tensor, grad_learned: Tensor) -> Tensor:
        """The gradient of H W^T, given S and its gradient."""
        if self.on_simplex:
            return simplex.pull_back(learned, grad_learned)
        return grad_learned if self.keep is None else grad_learned * self.keep

    def pull_back_tile(
        self, hidden: Tensor, value: Tensor, grad_output: Tensor, grad_value: Tensor, grad_proj: Tensor | None
    ) -> Tensor:
        """The gradient of a tile's H; adds to those of V [b, N, dv] and W [N, r]."""
        learned = self.learned(hidden)
        grad_rows = self.pull_back(learned, torch.bmm(grad_output, value.mT))
        grad_value.baddbmm_(learned.mT, grad_output)
        if self.proj is None or grad_proj is None:
            return grad_rows
        grad_proj += torch.bmm(grad_rows.mT, hidden).sum(0)
        return grad_rows @ self.proj


def _per_item(matrix: Tensor, value: Tensor) -> Tensor:
    return matrix.expand(value.shape[0], -1, -1)
