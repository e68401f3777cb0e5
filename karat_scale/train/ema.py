"""Exponential moving average of the weights, kept where the fp32 master weights are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from karat_scale.recipe import TrainConfig
from karat_scale.train.deepspeed.internals import master_weights, refresh_module


def ema_decay(step: int, decay: float, warmup: bool) -> float:
    """The decay for the update after `step` finished steps; the warm-up is timm's (1 - 1 / step^(2/3))."""
    if step <= 1:
        return 0.0
    return min(decay, 1.0 - float(step) ** (-2.0 / 3.0)) if warmup else decay


class Ema:
    """average = decay * average + (1 - decay) * weights, on each rank's own fp32 shard.

    Averaging the module's parameters would average what bf16 rounded.
    """

    def __init__(self, engine: Any, train: TrainConfig) -> None:
        self._engine = engine
        self._decay = train.ema_decay
        self._warmup = train.ema_warmup
        self.shards = [master.detach().clone() for master in master_weights(engine)]
        self.decides_on_device = all(shard.device.type == "cuda" for shard in self.shards)

    @torch.no_grad()
    def update(self, step: int, norm: torch.Tensor | None = None) -> None:
        """Take in the weights after `step` finished steps; not where `norm`, of the last one, says that it was skipped.

        On a GPU that is decided there, and the norm is not read.
        """
        weight = 1.0 - ema_decay(step, self._decay, self._warmup)
        masters = master_weights(self._engine)
        if norm is not None and self.decides_on_device:
            weight_or_0 = (0 * norm == 0) * weight
            torch._foreach_mul_(self.shards, 1.0 - weight_or_0)
            torch._foreach_add_(self.shards, torch._foreach_mul(masters, weight_or_0))
        elif norm is None or norm.isfinite():
            torch._foreach_lerp_(self.shards, masters, weight)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Let the module hold the averages inside the block, and its own weights again after it. Collective."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(self.shards, master_weights(self._engine), strict=True):
            held = average.clone()
            average.copy_(master)
            master.data.copy_(held)
        refresh_module(self._engine)
