"""Cuts the score matrices of a head into tiles, and computes a tile's scores and features in bounded memory.

A tile is a slice of the batch and of the query rows of one head: scores [b, rows, N], features [F, b, rows, N],
so that each feature is one contiguous matrix.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from karat_scale.attention.bases import FEATURE_BASES, BaseActivation, FeatureBasis

# Matrix products over fewer rows than this are slow, so very long sequences take more room instead.
MIN_ROWS = 32


class Tiling(NamedTuple):
    """The slices that cut a head."""

    batches: list[slice]
    rows: list[slice]

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Every pair of a batch slice and a row slice, always in the same order."""
        return itertools.product(self.batches, self.rows)


def workspace_budget(device: torch.device) -> int:
    """Feature elements a tile may hold: what stays in cache on a CPU, what fills the device elsewhere."""
    return 2**18 * torch.get_num_threads() if device.type == "cpu" else 2**24


def plan_tiles(batch: int, tokens: int, features: int, budget: int) -> Tiling:
    """As many whole score matrices as fit, else some rows of one.

    A matrix has tokens x tokens x features elements in its features, of which a tile holds at most `budget` (or
    MIN_ROWS rows).
    """
    matrices = budget // (tokens * tokens * features)
    if matrices > 0:
        return Tiling(split(batch, matrices), [slice(0, tokens)])
    return Tiling(split(batch, 1), split(tokens, max(MIN_ROWS, budget // (tokens * features))))


def split(total: int, largest: int) -> list[slice]:
    """Parts of 0..total of near-equal length, none longer than `largest`."""
    parts = -(-total // largest)
    return [slice(i * total // parts, (i + 1) * total // parts) for i in range(parts)]


def pick_broadcast(tensor: Tensor, head: int, batch: slice, rows: slice) -> Tensor:
    """A tile's part of a tensor broadcastable to [B, h, N, N]; it broadcasts to [b, rows, N]."""
    by_head = tensor[:, head if tensor.shape[1] > 1 else 0]
    return by_head[batch if by_head.shape[0] > 1 else slice(None), rows if by_head.shape[1] > 1 else slice(None)]


class Tile:
    """One tile at a time, in arrays and views that all tiles of its shape [b, rows, N] share."""

    def __init__(self, shape: tuple[int, ...], basis: FeatureBasis, room: Tensor) -> None:
        self._scores = room.new_empty(shape)
        self._values = room[: basis.num_features * math.prod(shape)].view(-1, *shape)
        self._flat_values = self._values.flatten(1, 2)
        self._features = basis.bind(self._scores, self._values)

    def load(self, query: Tensor, key: Tensor, scale: float, bias: Tensor | None, keep: Tensor | None) -> None:
        """Computes the scores and their features; both are zero where `keep` is false."""
        self._scores.baddbmm_(query, key.mT, beta=0, alpha=scale)
        if bias is not None:
            self._scores += bias
        if keep is not None:
            self._scores.masked_fill_(~keep, 0)
        self._features.evaluate()
        if keep is not None:
            self._values.mul_(keep)

    def sum_units(self, coef: Tensor, activation: BaseActivation | None, out: Tensor) -> None:
        """Writes H [b, rows, r], given the head's coefficients [F, r, N]."""
        by_feature = torch.bmm(self._flat_values, coef.mT)
        torch.sum(by_feature.view(-1, *out.shape), 0, out=out)
        if activation is not None:
            out += activation.value(self._scores).sum(-1, keepdim=True)

    def add_grad_coef(self, grad_hidden: Tensor, grad_coef: Tensor) -> None:
        """Adds the tile's share to the gradient of the head's coefficients [F, r, N]."""
        by_unit = grad_hidden.flatten(0, 1).t()
        grad_coef.baddbmm_(by_unit.expand(len(grad_coef), -1, -1), self._flat_values)

    def pull_back(
        self, grad_hidden: Tensor, coef: Tensor, activation: BaseActivation | None, keep: Tensor | None
    ) -> Tensor:
        """The gradient of the scores, in an array the next tile overwrites."""
        grad_scores = self._features.pull_back(grad_hidden.flatten(0, 1), coef)
        if activation is not None:
            grad_scores += activation.derivative(self._scores) * grad_hidden.sum(-1, keepdim=True)
        return grad_scores if keep is None else grad_scores.mul_(keep)


class Workspace:
    """The plan of a call's tiles and the memory they share."""

    def __init__(self, query: Tensor, coef: Tensor, bias: Tensor | None, mask: Tensor | None, basis: str) -> None:
        batch, _, tokens, width = query.shape
        num_features = coef.shape[1]
        self.scale = width**-0.5
        self.tiling = plan_tiles(batch, tokens, num_features, workspace_budget(query.device))
        self._bias, self._mask = bias, mask
        self._basis = FEATURE_BASES[basis](num_features)
        pairs = [(b.stop - b.start) * (r.stop - r.start) for b, r in self.tiling.tiles()]
        self._room = coef.new_empty(num_features * max(pairs, default=0) * tokens)
        self._tiles: dict[tuple[int, ...], Tile] = {}

    def load(self, query: Tensor, key: Tensor, head: int, batch: slice, rows: slice) -> tuple[Tile, Tensor | None]:
        """The tile at (batch, rows) of a head's query and key [B, N, d], and its part of the mask."""
        query, key = query[batch, rows], key[batch]
        shape = (*query.shape[:2], key.shape[1])
        if shape not in self._tiles:
            self._tiles[shape] = Tile(shape, self._basis, self._room)
        bias = None if self._bias is None else pick_broadcast(self._bias, head, batch, rows)
        keep = None if self._mask is None else pick_broadcast(self._mask, head, batch, rows)
        self._tiles[shape].load(query, key, self.scale, bias, keep)
        return self._tiles[shape], keep
