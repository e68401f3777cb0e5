"""Cuts the score matrices of a head into tiles, and computes a tile's scores and features in bounded memory.

A tile is a slice of the batch and of the query rows of one head: scores [b, rows, N], features [F, b, rows, N],
so that each feature is one contiguous matrix.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from karat_scale.attention.bases import FEATURE_BASES, BaseActivation, FeatureBasis

# Matrix products over fewer rows than this are slow, so very long sequences take more room instead.
MIN_ROWS = 32


class Tiling(NamedTuple):
    """Every pair of a batch slice and a query-row slice is one tile."""

    batches: list[slice]
    rows: list[slice]


def workspace_budget(device: torch.device) -> int:
    """Feature elements a tile may hold: what stays in cache on a CPU, what fills the device elsewhere."""
    return 2**18 * torch.get_num_threads() if device.type == "cpu" else 2**24


def plan_tiles(batch: int, tokens: int, features: int, budget: int) -> Tiling:
    """As many whole matrices as fit, else some rows of one.

    A score matrix has tokens x tokens x features elements in its features, of which a tile holds at most
    `budget` (or MIN_ROWS rows).
    """
    matrices = budget // (tokens * tokens * features)
    if matrices > 0:
        return Tiling(split(batch, matrices), [slice(0, tokens)])
    return Tiling(split(batch, 1), split(tokens, max(MIN_ROWS, budget // (tokens * features))))


def split(total: int, largest: int) -> list[slice]:
    """Parts of 0..total of near-equal length, none longer than `largest`."""
    parts = -(-total // largest)
    return [slice(i * total // parts, (i + 1) * total // parts) for i in range(parts)]


class Tile:
    """One tile at a time, in arrays and views that all tiles of its shape [b, rows, N] share."""

    def __init__(self, shape: tuple[int, ...], basis: FeatureBasis, values: Tensor, upstream: Tensor | None) -> None:
        self.scores = values.new_empty(shape)
        self.values = _start_of(values, basis.num_features, shape)
        self.flat_values = self.values.flatten(1, 2)
        self._flat_upstream: Tensor | None = None
        bound_upstream = None
        if upstream is not None:
            bound_upstream = _start_of(upstream, basis.num_features, shape)
            self._flat_upstream = bound_upstream.flatten(1, 2)
        self._features = basis.bind(self.scores, self.values, bound_upstream)

    def load(self, query: Tensor, key: Tensor, scale: float, bias: Tensor | None, keep: Tensor | None) -> None:
        """Computes the scores and their features; both are zero where `keep` is false."""
        self.scores.baddbmm_(query, key.mT, beta=0, alpha=scale)
        if bias is not None:
            self.scores += bias
        if keep is not None:
            self.scores.masked_fill_(~keep, 0)
        self._features.evaluate()
        if keep is not None:
            self.values.mul_(keep)

    def hidden(self, coef: Tensor, activation: BaseActivation | None) -> Tensor:
        """H [b, rows, r], given the head's coefficients [F, r, N]."""
        hidden = torch.bmm(self.flat_values, coef.mT).sum(0).view(*self.scores.shape[:2], -1)
        if activation is not None:
            hidden += activation.value(self.scores).sum(-1, keepdim=True)
        return hidden

    def pull_back(self, grad_hidden: Tensor, coef: Tensor, activation: BaseActivation | None) -> Tensor:
        """The gradient of the scores, in an array the next tile overwrites."""
        flat = grad_hidden.flatten(0, 1)
        torch.bmm(flat.expand(coef.shape[0], -1, -1), coef, out=self._flat_upstream)
        grad_scores = self._features.pull_back()
        if activation is not None:
            grad_scores += activation.derivative(self.scores) * grad_hidden.sum(-1, keepdim=True)
        return grad_scores


def _start_of(room: Tensor, num_features: int, shape: tuple[int, ...]) -> Tensor:
    return room[: num_features * math.prod(shape)].view(num_features, *shape)


class Workspace:
    """The plan of a call's tiles and the memory they share."""

    def __init__(
        self, query: Tensor, coef: Tensor, bias: Tensor | None, mask: Tensor | None, basis: str, backward: bool
    ) -> None:
        batch, _, tokens, width = query.shape
        num_features = coef.shape[1]
        self.scale = width**-0.5
        self.batches, self.rows = plan_tiles(batch, tokens, num_features, workspace_budget(query.device))
        self._bias, self._mask = bias, mask
        self._basis = FEATURE_BASES[basis](num_features)
        largest = max((_length(b) for b in self.batches), default=0) * max(map(_length, self.rows)) * tokens
        self._values = coef.new_empty(num_features * largest)
        self._upstream = torch.empty_like(self._values) if backward else None
        self._tiles: dict[tuple[int, ...], Tile] = {}

    def load(self, query: Tensor, key: Tensor, head: int, batch: slice, rows: slice) -> tuple[Tile, Tensor | None]:
        """The tile of queries [b, rows, d] and keys [b, N, d], and its part of the mask."""
        shape = (*query.shape[:2], key.shape[1])
        if shape not in self._tiles:
            self._tiles[shape] = Tile(shape, self._basis, self._values, self._upstream)
        tile = self._tiles[shape]
        keep = pick_broadcast(self._mask, head, batch, rows)
        tile.load(query, key, self.scale, pick_broadcast(self._bias, head, batch, rows), keep)
        return tile, keep


def _length(part: slice) -> int:
    return part.stop - part.start


def pick_broadcast(tensor: Tensor | None, head: int, batch: slice, rows: slice) -> Tensor | None:
    """The tile's part of a tensor broadcastable to [B, h, N, N], broadcastable to [b, rows, N]."""
    if tensor is None:
        return None
    by_head = tensor[:, head if tensor.shape[1] > 1 else 0]
    return by_head[batch if by_head.shape[0] > 1 else slice(None), rows if by_head.shape[1] > 1 else slice(None)]
