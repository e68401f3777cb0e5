"""How a head's scores become its output O = S V, and back, tile by tile in bounded memory.

A tile is a slice of the batch and of the query rows of one head: scores [b, rows, M] over M keys. M is N, except in
forms whose scores are no matrix of token pairs.

There are three routes, and the cheapest possible one is taken.

- Narrow: with a W, O = H (W^T V), and the r x dv matrix W^T V stands for all keys.
- Rows: what acts on entries or rows of S (a mask, the simplex) needs these, formed one tile at a time.
- Spread: without a W, O = sum_f f(A) (C_f^T V). Where heads are narrow, C_f^T V [M, dv] is less work than S.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor

from karat_scale.attention import call as simplex
from karat_scale.attention.bases import BaseActivation, ElementwiseBasis, FeatureBasis
from karat_scale.attention.call import UnitsCall

# Matrix products over fewer rows than this are slow, so very long sequences take more memory instead.
MIN_ROWS = 32


class Tiling(NamedTuple):
    """The slices that divide a head into tiles."""

    batches: list[slice]
    rows: list[slice]

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Every pair of a batch slice and a row slice, always in the same order."""
        return itertools.product(self.batches, self.rows)

    @property
    def one_item(self) -> bool:
        """Return whether no tile holds two items of the batch."""
        return all(batch.stop - batch.start == 1 for batch in self.batches)


def workspace_budget(device: torch.device) -> int:
    """Feature elements a tile may hold: what stays in cache on a CPU, what fills the device elsewhere."""
    return 2**18 * torch.get_num_threads() if device.type == "cpu" else 2**24


def plan_tiles(batch: int, queries: int, row: int, budget: int) -> Tiling:
    """Return tiles of as many whole score matrices as fit, else of some rows of one.

    `row` is the number of elements that a tile holds for each row; a tile holds at most `budget` (or MIN_ROWS rows).
    """
    matrices = budget // (queries * row)
    if matrices > 0:
        return Tiling(split(batch, matrices), [slice(0, queries)])
    return Tiling(split(batch, 1), split(queries, max(MIN_ROWS, budget // row)))


def split(total: int, largest: int) -> list[slice]:
    """Parts of 0..total of near-equal length, none longer than `largest`."""
    parts = -(-total // largest)
    return [slice(i * total // parts, (i + 1) * total // parts) for i in range(parts)]


@overload
def pick_broadcast(tensor: Tensor, head: int, batch: slice, rows: slice) -> Tensor: ...
@overload
def pick_broadcast(tensor: None, head: int, batch: slice, rows: slice) -> None: ...
def pick_broadcast(tensor: Tensor | None, head: int, batch: slice, rows: slice) -> Tensor | None:
    """A tile's part of a tensor, if any, broadcastable to [B, h, N, M]; it broadcasts to [b, rows, M]."""
    if tensor is None:
        return None
    by_head = tensor[:, head if tensor.shape[1] > 1 else 0]
    return by_head[batch if by_head.shape[0] > 1 else slice(None), rows if by_head.shape[1] > 1 else slice(None)]


class Tile(ABC):
    """One tile at a time, in arrays that all tiles of its shape [b, rows, M] share."""

    def __init__(self, shape: tuple[int, ...], room: Tensor) -> None:
        self._scores = room.new_empty(shape)
        self._keep: Tensor | None = None

    def load(self, query: Tensor, key: Tensor, scale: float, bias: Tensor | None, keep: Tensor | None) -> None:
        """Computes the scores, which are zero where `keep` is false."""
        self._scores.baddbmm_(query, key.mT, beta=0, alpha=scale)
        if bias is not None:
            self._scores += bias
        if keep is not None:
            self._scores.masked_fill_(~keep, 0)
        self._keep = keep

    def sum_units(self, coef: Tensor, activation: BaseActivation | None, out: Tensor | None = None) -> Tensor:
        """H [b, rows, r], in `out` where it is given, of the head's coefficients [K, r, M]."""
        if out is None:
            out = self._scores.new_empty(*self._scores.shape[:2], coef.shape[1])
        self._sum_learned(coef, out)
        if activation is not None:
            out += activation.value(self._scores).sum(-1, keepdim=True)
        return out

    def pull_back(
        self, grad_hidden: Tensor, coef: Tensor, grad_coef: Tensor, activation: BaseActivation | None
    ) -> Tensor:
        """The gradient of the scores, in an array the next tile overwrites; adds to the gradient of coef [K, r, M]."""
        grad_scores = self._pull_back_learned(grad_hidden, coef, grad_coef)
        if activation is not None:
            grad_scores += activation.derivative(self._scores) * grad_hidden.sum(-1, keepdim=True)
        return grad_scores if self._keep is None else grad_scores.mul_(self._keep)

    @abstractmethod
    def _sum_learned(self, coef: Tensor, out: Tensor) -> None:
        """`sum_units` without the base activation."""

    @abstractmethod
    def _pull_back_learned(self, grad_hidden: Tensor, coef: Tensor, grad_coef: Tensor) -> Tensor:
        """`pull_back` without base activation and mask."""


class FeatureTile(Tile):
    """Units as sums of matrix products of features [F, b, rows, M], each of which is one contiguous matrix."""

    def __init__(self, shape: tuple[int, ...], basis: FeatureBasis, num_features: int, room: Tensor) -> None:
        super().__init__(shape, room)
        self._values = room[: num_features * math.prod(shape)].view(-1, *shape)
        self._flat_values = self._values.flatten(1, 2)
        self._features = basis.bind(self._scores, self._values)

    def load(self, query: Tensor, key: Tensor, scale: float, bias: Tensor | None, keep: Tensor | None) -> None:
        """Computes features as well; they too are zero where `keep` is false."""
        super().load(query, key, scale, bias, keep)
        self._features.evaluate()
        if keep is not None:
            self._values.mul_(keep)

    def _sum_learned(self, coef: Tensor, out: Tensor) -> None:
        by_feature = torch.bmm(self._flat_values, coef.mT)
        torch.sum(by_feature.view(-1, *out.shape), 0, out=out)

    def _pull_back_learned(self, grad_hidden: Tensor, coef: Tensor, grad_coef: Tensor) -> Tensor:
        flat = grad_hidden.flatten(0, 1)
        grad_coef.baddbmm_(flat.t().expand(len(grad_coef), -1, -1), self._flat_values)
        return self._features.pull_back(flat, coef)


class ElementwiseTile(Tile):
    """Units evaluated one after the other, each on all scores of the tile while these are in cache."""

    def __init__(self, shape: tuple[int, ...], basis: ElementwiseBasis, room: Tensor) -> None:
        super().__init__(shape, room)
        self._basis = basis

    def _sum_learned(self, coef: Tensor, out: Tensor) -> None:
        flat_scores, flat_out = self._scores.flatten(0, 1), out.view(-1, out.shape[-1])
        for unit in range(coef.shape[1]):
            if self._keep is None:
                flat_out[:, unit] = self._basis.sum_over_keys(flat_scores, coef[:, unit])
            else:
                values = self._basis.value(self._scores, *coef[:, unit].unbind())
                torch.sum(values * self._keep, -1, out=out[..., unit])

    def _pull_back_learned(self, grad_hidden: Tensor, coef: Tensor, grad_coef: Tensor) -> Tensor:
        grad_scores = torch.zeros_like(self._scores)
        flat_scores, flat_grad = self._scores.flatten(0, 1), grad_scores.flatten(0, 1)
        for unit in range(coef.shape[1]):
            upstream = grad_hidden[..., unit, None]
            if self._keep is not None:
                upstream = upstream * self._keep
            by_scores, by_coef = self._basis.pull_back(flat_scores, upstream.flatten(0, 1), coef[:, unit])
            flat_grad += by_scores
            grad_coef[:, unit] += by_coef
        return grad_scores


class Workspace:
    """The plan of a call's tiles and the memory they share."""

    def __init__(self, call: UnitsCall) -> None:
        batch, _, queries, width = call.query.shape
        basis, coef, keys = call.basis, call.coef, call.coef.shape[3]
        # An elementwise basis holds a few arrays of a tile's shape while it works.
        self.has_features = isinstance(basis, FeatureBasis)
        self._num_features = coef.shape[1] if self.has_features else 4
        self.scale = width**-0.5
        # Without a W the rows of S may be formed; S and its gradient are two rows.
        row = max(self._num_features * keys, 2 * call.value.shape[2] if call.proj is None else 0)
        self.tiling = plan_tiles(batch, queries, row, workspace_budget(coef.device))
        self._call = call
        pairs = [(b.stop - b.start) * (r.stop - r.start) for b, r in self.tiling.tiles()]
        self._room = coef.new_empty(self._num_features * max(pairs, default=0) * keys if self.has_features else 0)
        self._tiles: dict[tuple[int, ...], Tile] = {}

    def load(self, query: Tensor, key: Tensor, head: int, batch: slice, rows: slice) -> Tile:
        """The tile at (batch, rows) of a head's query [B, N, d] and key [B, M, d]."""
        query, key = query[batch, rows], key[batch]
        tile = self._tile((*query.shape[:2], key.shape[1]))
        bias, keep = (pick_broadcast(x, head, batch, rows) for x in (self._call.bias, self._call.mask))
        tile.load(query, key, self.scale, bias, keep)
        return tile

    def _tile(self, shape: tuple[int, ...]) -> Tile:
        if shape not in self._tiles:
            basis = self._call.basis
            if isinstance(basis, FeatureBasis):
                self._tiles[shape] = FeatureTile(shape, basis, self._num_features, self._room)
            elif isinstance(basis, ElementwiseBasis):
                self._tiles[shape] = ElementwiseTile(shape, basis, self._room)
            else:
                raise TypeError(f"{basis}: neither a FeatureBasis nor an ElementwiseBasis")
        return self._tiles[shape]


@dataclass(frozen=True)
class Head:
    """One head's share of a call: V [B, P, dv], C [K, r, M], W [P, r] and, where there is a W, H [B, N, r].

    `is_cut` says that some entries of S are 0.
    """

    value: Tensor
    coef: Tensor
    proj: Tensor | None
    hidden: Tensor
    activation: BaseActivation | None
    on_simplex: bool
    is_cut: bool


@dataclass(frozen=True)
class HeadGradients:
    """dO [B, N, dv], which is given, and the sums of a head's other gradients, which start at zero."""

    output: Tensor
    value: Tensor
    coef: Tensor
    proj: Tensor


class Route:
    """All tiles of a head go, in order, through `read` or through `pull_back`."""

    def __init__(self, head: Head) -> None:
        self._head = head

    def read(self, tile: Tile, cut: Tensor | None, batch: slice, rows: slice, output: Tensor) -> None:
        """Reads the tile at (batch, rows) into O [B, N, dv]. Entries of its S where `cut` is false are 0."""
        raise NotImplementedError

    def finish_reading(self, output: Tensor) -> None:
        """Writes into O what is left after the last tile."""

    def start_pull_back(self, grads: HeadGradients) -> None:
        """Prepares for the first tile."""

    def pull_back(self, tile: Tile, cut: Tensor | None, batch: slice, rows: slice, grads: HeadGradients) -> Tensor:
        """The gradient of a tile's scores, in an array the next tile overwrites; adds to the head's other gradients."""
        raise NotImplementedError

    def finish_pull_back(self, grads: HeadGradients) -> None:
        """Adds what is left after the last tile."""


class Narrow(Route):
    """O = H (W^T V)."""

    def read(self, tile: Tile, cut: Tensor | None, batch: slice, rows: slice, output: Tensor) -> None:
        """Fills the rows of H."""
        tile.sum_units(self._head.coef, self._head.activation, out=self._head.hidden[batch, rows])

    def finish_reading(self, output: Tensor) -> None:
        """Computes every O at once."""
        output.copy_(torch.bmm(self._head.hidden, self._values()))

    def start_pull_back(self, grads: HeadGradients) -> None:
        """Computes the gradients of H, V and W."""
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

    For an item, U_f^T [dv, M] takes the place of a head's C_f [r, M], and O the place of H.
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
        """Propagates the gradient of an item's U to V and C."""
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


def choose_route(head: Head, work: Workspace) -> Route:
    """The cheapest route that gives the head's O."""
    plain = not (head.is_cut or head.on_simplex)
    if head.proj is not None:
        return Narrow(head) if plain else Rows(head)
    spreads = plain and head.activation is None and work.has_features and work.tiling.one_item
    learned, width = head.value.shape[1:]
    return Spread(head) if spreads and 2 * width < learned else Rows(head)


def _expand(matrix: Tensor, batched: Tensor) -> Tensor:
    return matrix.expand(batched.shape[0], -1, -1)
