"""From a head's tiles to its output O = S V, and back: three routes, of which the cheapest that can go is taken.

- Narrow: with a W, O = H (W^T V), and the r x dv matrix W^T V stands for all keys.
- Rows: what acts on entries or rows of S (a mask, the simplex) needs these, formed one tile at a time.
- Spread: without a W, O = sum_f f(A) (C_f^T V). Where heads are narrow, C_f^T V [M, dv] is less work than S.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from karat_scale.attention import simplex
from karat_scale.attention.bases import BaseActivation
from karat_scale.attention.tiles import Tile, Workspace


@dataclass(frozen=True)
class Head:
    """One head's share of a call: V [B, P, dv], C [K, r, M], W [P, r] and, where there is a W, H [B, N, r]."""

    value: Tensor
    coef: Tensor
    proj: Tensor | None
    hidden: Tensor
    activation: BaseActivation | None
    on_simplex: bool


@dataclass(frozen=True)
class HeadGradients:
    """dO [B, N, dv], which is given, and the sums of a head's other gradients, which start at zero."""

    output: Tensor
    value: Tensor
    coef: Tensor
    proj: Tensor


class Route:
    """A head's tiles, all of them and in order, go through `read`, or through `pull_back`."""

    def __init__(self, head: Head) -> None:
        self._head = head

    def read(self, tile: Tile, cut: Tensor | None, batch: slice, rows: slice, output: Tensor) -> None:
        """Reads a tile at (batch, rows), of whose S the entries where `cut` is false are 0, into O [B, N, dv]."""
        raise NotImplementedError

    def finish_reading(self, output: Tensor) -> None:
        """What is left to write into O after the last tile."""

    def start_pull_back(self, grads: HeadGradients) -> None:
        """What is to be done before the first tile."""

    def pull_back(self, tile: Tile, cut: Tensor | None, batch: slice, rows: slice, grads: HeadGradients) -> Tensor:
        """The gradient of a tile's scores, in an array the next tile overwrites; adds to the head's others."""
        raise NotImplementedError

    def finish_pull_back(self, grads: HeadGradients) -> None:
        """What is left to add after the last tile."""


class Narrow(Route):
    """O = H (W^T V)."""

    def read(self, tile: Tile, cut: Tensor | None, batch: slice, rows: slice, output: Tensor) -> None:
        """Fills the rows of H."""
        tile.sum_units(self._head.coef, self._head.activation, out=self._head.hidden[batch, rows])

    def finish_reading(self, output: Tensor) -> None:
        """Every O at once."""
        output.copy_(torch.bmm(self._head.hidden, self._values()))

    def start_pull_back(self, grads: HeadGradients) -> None:
        """The gradients of H, V and W."""
        head = self._head
        assert head.proj is not None
        self._grad_hidden = torch.bmm(grads.output, self._values().mT)
        grad_values = torch.bmm(head.hidden.mT, grads.output)
        torch.bmm(_expand(head.proj, head.value), grad_values, out=grads.value)
        torch.sum(torch.bmm(head.value, grad_values.mT), 0, out=grads.proj)

    def pull_back(self, tile: Tile, cut: Tensor | None, batch: slice, rows: slice, grads: HeadGradients) -> Tensor:
        """See `Route`."""
        return tile.pull_back(self._grad_hidden[batch, rows], self._head.coef, grads.coef, self._head.activation)

    def _values(self) -> Tensor:
        """W^T V [B, r, dv]."""
        assert self._head.proj is not None
        return torch.bmm(_expand(self._head.proj.mT, self._head.value), self._head.value)


class Rows(Route):
    """O = S V with the rows of S = project(H W^T * cut), where each step may be absent."""

    def read(self, tile: Tile, cut: Tensor | None, batch: slice, rows: slice, output: Tensor) -> None:
        """Forms the rows of S; keeps those of H where there is a W."""
        head = self._head
        kept = None if head.proj is None else head.hidden[batch, rows]
        learned = self._learned(tile.sum_units(head.coef, head.activation, out=kept), cut)
        output[batch, rows] = torch.bmm(learned, head.value[batch])

    def pull_back(self, tile: Tile, cut: Tensor | None, batch: slice, rows: slice, grads: HeadGradients) -> Tensor:
        """Forms the rows of S again."""
        head, grad_output = self._head, grads.output[batch, rows]
        hidden = tile.sum_units(head.coef, head.activation) if head.proj is None else head.hidden[batch, rows]
        learned = self._learned(hidden, cut)
        grad_rows = torch.bmm(grad_output, head.value[batch].mT)
        if head.on_simplex:
            grad_rows = simplex.pull_back(learned, grad_rows)
        elif cut is not None:
            grad_rows *= cut
        grads.value[batch].baddbmm_(learned.mT, grad_output)
        if head.proj is not None:
            grads.proj.add_(torch.bmm(grad_rows.mT, hidden).sum(0))
            grad_rows = grad_rows @ head.proj
        return tile.pull_back(grad_rows, head.coef, grads.coef, head.activation)

    def _learned(self, hidden: Tensor, cut: Tensor | None) -> Tensor:
        """S [b, rows, P] of H [b, rows, r]; may be H itself."""
        rows = hidden if self._head.proj is None else hidden @ self._head.proj.mT
        if self._head.on_simplex:
            return simplex.project(rows, cut)
        return rows if cut is None else rows * cut


class Spread(Route):
    """O = sum_f f(A) U_f with U_f = C_f^T V, for tiles of one item of the batch.

    U_f^T [dv, M] are to the item what C_f [r, M] are to a head: its "H" is O.
    """

    _item = -1

    def read(self, tile: Tile, cut: Tensor | None, batch: slice, rows: slice, output: Tensor) -> None:
        """See `Route`."""
        self._turn_to(batch.start)
        output[batch, rows] = tile.sum_units(self._spread, None)

    def pull_back(self, tile: Tile, cut: Tensor | None, batch: slice, rows: slice, grads: HeadGradients) -> Tensor:
        """Adds to the gradient of U."""
        if batch.start != self._item:
            self.finish_pull_back(grads)
            self._turn_to(batch.start)
            self._grad_spread = torch.zeros_like(self._spread)
        return tile.pull_back(grads.output[batch, rows], self._spread, self._grad_spread, None)

    def finish_pull_back(self, grads: HeadGradients) -> None:
        """From an item's U back to V and C."""
        if self._item < 0:
            return
        value, coef = self._head.value[self._item], self._head.coef
        grads.coef.baddbmm_(_expand(value, coef), self._grad_spread)
        torch.sum(torch.bmm(coef, self._grad_spread.mT), 0, out=grads.value[self._item])

    def _turn_to(self, item: int) -> None:
        """Makes U^T [F, dv, M] of an item of the batch."""
        if item != self._item:
            self._item = item
            self._spread = torch.bmm(_expand(self._head.value[item].mT, self._head.coef), self._head.coef)


def choose_route(head: Head, work: Workspace, has_cut: bool) -> Route:
    """The cheapest route that gives the head's O."""
    plain = not (has_cut or head.on_simplex)
    if head.proj is not None:
        return Narrow(head) if plain else Rows(head)
    spreads = plain and head.activation is None and work.has_features and work.tiling.one_item
    learned, width = head.value.shape[1:]
    return Spread(head) if spreads and 2 * width < learned else Rows(head)


def _expand(matrix: Tensor, batched: Tensor) -> Tensor:
    return matrix.expand(batched.shape[0], -1, -1)
