"""Cuts the score matrices of a head into tiles, and computes a tile's scores and units in bounded memory.

A tile is a slice of the batch and of the query rows of one head: scores [b, rows, M] over M keys. M is N but where
the scores of a form are no matrix of token pairs.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple, overload

import torch
from torch import Tensor

from karat_scale.attention.bases import BaseActivation, Basis, ElementwiseBasis, FeatureBasis

# Matrix products over fewer rows than this are slow, so very long sequences take more room instead.
MIN_ROWS = 32


class Tiling(NamedTuple):
    """The slices that cut a head."""

    batches: list[slice]
    rows: list[slice]

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Every pair of a batch slice and a row slice, always in the same order."""
        return itertools.product(self.batches, self.rows)

    @property
    def one_item(self) -> bool:
        """Whether no tile holds two items of the batch."""
        return all(batch.stop - batch.start == 1 for batch in self.batches)


def workspace_budget(device: torch.device) -> int:
    """Feature elements a tile may hold: what stays in cache on a CPU, what fills the device elsewhere."""
    return 2**18 * torch.get_num_threads() if device.type == "cpu" else 2**24


def plan_tiles(batch: int, queries: int, row: int, budget: int) -> Tiling:
    """As many whole score matrices as fit, else some rows of one.

    `row` is what a tile holds for each row, in elements; a tile holds at most `budget` (or MIN_ROWS rows).
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
        """The gradient of the scores, in an array the next tile overwrites; adds to that of coef [K, r, M]."""
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
    """The plan of a call's tiles and the memory they share.

    `learned` is the length of the rows of S, where these may be formed.
    """

    def __init__(
        self, query: Tensor, coef: Tensor, bias: Tensor | None, mask: Tensor | None, basis: Basis, learned: int = 0
    ) -> None:
        batch, _, queries, width = query.shape
        keys = coef.shape[3]
        # An elementwise basis holds a few arrays of a tile's shape while it works.
        self.has_features = isinstance(basis, FeatureBasis)
        self._num_features = coef.shape[1] if self.has_features else 4
        self.scale = width**-0.5
        # S and its gradient are two rows.
        row = max(self._num_features * keys, 2 * learned)
        self.tiling = plan_tiles(batch, queries, row, workspace_budget(query.device))
        self._bias, self._mask, self._basis = bias, mask, basis
        pairs = [(b.stop - b.start) * (r.stop - r.start) for b, r in self.tiling.tiles()]
        self._room = coef.new_empty(self._num_features * max(pairs, default=0) * keys if self.has_features else 0)
        self._tiles: dict[tuple[int, ...], Tile] = {}

    def load(self, query: Tensor, key: Tensor, head: int, batch: slice, rows: slice) -> Tile:
        """The tile at (batch, rows) of a head's query [B, N, d] and key [B, M, d]."""
        query, key = query[batch, rows], key[batch]
        tile = self._tile((*query.shape[:2], key.shape[1]))
        bias, keep = (pick_broadcast(x, head, batch, rows) for x in (self._bias, self._mask))
        tile.load(query, key, self.scale, bias, keep)
        return tile

    def _tile(self, shape: tuple[int, ...]) -> Tile:
        if shape not in self._tiles:
            if isinstance(self._basis, FeatureBasis):
                self._tiles[shape] = FeatureTile(shape, self._basis, self._num_features, self._room)
            elif isinstance(self._basis, ElementwiseBasis):
                self._tiles[shape] = ElementwiseTile(shape, self._basis, self._room)
            else:
                raise TypeError(f"{self._basis}: neither a FeatureBasis nor an ElementwiseBasis")
        return self._tiles[shape]
