"""Cuts an attention call into tiles whose features fit a bounded workspace."""

from typing import NamedTuple

import torch


class Tiling(NamedTuple):
    """Groups of (heads, batch), each cut by query rows. Together they cover the call once, in a fixed order."""

    groups: list[tuple[slice, slice]]
    rows: list[slice]


def workspace_budget(device: torch.device) -> int:
    """Feature elements a tile may hold: what stays in cache on a CPU, what fills the device elsewhere."""
    return 2**18 * torch.get_num_threads() if device.type == "cpu" else 2**24


def plan_tiles(batch: int, heads: int, tokens: int, features: int, budget: int) -> Tiling:
    """Whole score matrices while they fit `budget` elements, else rows of a single one.

    A matrix has tokens x tokens x features elements. A tile takes several batch items of a head, several heads
    once it takes the whole batch, and never less than one row.
    """
    matrix = tokens * tokens * features
    matrices = max(1, budget // matrix)
    rows = tokens if matrix <= budget else budget // (tokens * features)
    groups = [(h, b) for h in split(heads, matrices // max(batch, 1)) for b in split(batch, matrices)]
    return Tiling(groups, split(tokens, rows))


def split(total: int, largest: int) -> list[slice]:
    """Parts of 0..total of near-equal length, none longer than `largest` (at least 1)."""
    parts = -(-total // max(largest, 1))
    return [slice(i * total // parts, (i + 1) * total // parts) for i in range(parts)]
