"""Where a model looks in each image of a batch: what the patches of the last block get, in the dominant head."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from karat_scale.commands.analyze.maps import dominant_head
from karat_scale.models.attention_matrices import can_be_watched, watched
from karat_scale.models.factory import layer_sizes
from karat_scale.models.layers import attention_layers
from karat_scale.recipe import ModelConfig


class NoMapError(Exception):
    """The model has no attention map of an image; the message is the reason."""


@dataclass
class LastBlock:
    """The attention that each patch of the last block gets in a batch: from the class token, else from all patches.

    scores, weights: A and S, [B, h, patches], of the latest forward pass.
    """

    block: int
    prefix: int
    grid: tuple[int, int]
    has_class_token: bool
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    weights: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def of(cls, model: nn.Module, config: ModelConfig) -> "LastBlock":
        """Return the place of the map in a model. Raises NoMapError if there is none."""
        if not attention_layers(model) or not can_be_watched(model):
            raise NoMapError(f"the attention matrices of {config.name} cannot be read")
        sizes = layer_sizes(config)
        last = sizes[-1]
        if last.sets != 1:
            raise NoMapError(f"the last block of {config.name} attends within {last.sets} windows, not over the image")
        prefix, grid = _layout(model, last.tokens)
        if prefix is None:
            raise NoMapError(f"the {last.tokens} tokens of {config.name}'s last block are no square grid")
        has_class_token = prefix > 0 and getattr(model, "cls_token", None) is not None
        return cls(len(sizes) - 1, prefix, grid, has_class_token)

    def overlay(self, row: int, size: tuple[int, int]) -> tuple[int, Tensor]:
        """Return the dominant head of an image of the batch, and its weights S over the image's own pixels, [H, W].

        Negative weights are shown as 0. The head is chosen by the scores, as in `karat analyze`.
        """
        head = dominant_head(self.scores[row])
        weights = self.weights[row, head].clamp(min=0).view(1, 1, *self.grid)
        return head, torch.nn.functional.interpolate(weights, size=size, mode="nearest")[0, 0]

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Keep what the last block of each forward pass computes."""
        with watched(model, self._visit):
            yield

    def _visit(self, number: int, raw: Tensor, learned: Tensor) -> None:
        if number == self.block:
            self.scores, self.weights = self._rows(raw), self._rows(learned)

    def _rows(self, matrices: Tensor) -> Tensor:
        queries = matrices[:, :, 0] if self.has_class_token else matrices[:, :, self.prefix :].mean(2)
        return queries[..., self.prefix :].cpu()


def _layout(model: Any, tokens: int) -> tuple[int | None, tuple[int, int]]:
    """Return the number of tokens before the patches, and the grid of the patches; None where there is no grid."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is not None and 0 <= tokens - grid[0] * grid[1] == getattr(model, "num_prefix_tokens", 0):
        return tokens - grid[0] * grid[1], (grid[0], grid[1])
    side = math.isqrt(tokens)  # of the last of several stages
    return (0 if side**2 == tokens else None), (side, side)
