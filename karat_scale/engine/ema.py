"""Exponential moving average of the weights, kept where the fp32 master weights are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from karat_scale.engine.deepspeed_internals import master_weights, refresh_module
from karat_scale.recipe import TrainConfig


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

    @torch.no_grad()
    def update(self, step: int, was_taken: torch.Tensor | None = None) -> None:
        """Take in the weights after `step` finished steps, but for a step that was not taken.

        Args:
            was_taken: bool, 0-dim, on any device, which is not read; None for True.
        """
        weight = 1.0 - ema_decay(step, self._decay, self._warmup)
        masters = master_weights(self._engine)
        if was_taken is None:
            torch._foreach_lerp_(self.shards, masters, weight)
        else:
            lerp_where(self.shards, masters, weight, was_taken)

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


def lerp_where(averages: list[torch.Tensor], weights: list[torch.Tensor], weight: float, where: torch.Tensor) -> None:
    """averages += weight * (weights - averages) where `where`, bool, 0-dim, is True. `where` is not read."""
    if not averages:
        return
    share = (where * weight).to(averages[0].device)
    if averages_one_by_one(share.device):
        for average, other in zip(averages, weights, strict=True):
            average.lerp_(other, share)
    else:
        lerp_by_foreach(averages, weights, share)


def averages_one_by_one(device: torch.device) -> bool:
    """Return True on a CPU, where three passes over memory cost more than a call for each tensor."""
    return device.type == "cpu"


def lerp_by_foreach(averages: list[torch.Tensor], weights: list[torch.Tensor], share: torch.Tensor) -> None:
    """averages += share * (weights - averages), share 0-dim, in three kernels for all tensors."""
    difference = torch._foreach_sub(weights, averages)
    torch._foreach_mul_(difference, share)
    torch._foreach_add_(averages, difference)
