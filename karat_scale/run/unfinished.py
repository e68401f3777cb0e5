"""A step that is given up between two micro batches, so that a stop need not wait for minutes on a CPU.

Weights change only at a step's end. What changes before is put back, and the resumed run takes the step again, with the
same bits. Gradients are not kept in a checkpoint.
"""

import torch
from torch import nn

from karat_scale.engine.distributed import World
from karat_scale.reporting.interval import Interval
from karat_scale.run.task import Task


class UnfinishedStep:
    """What a step changes before its last micro batch, as it was at the step's beginning."""

    def __init__(self, task: Task, interval: Interval) -> None:
        self._task, self._interval = task, interval
        self._rng, self._counts, self._seconds = torch.get_rng_state(), task.counts, interval.seconds

    def undo(self) -> None:
        """Put it back: torch's random generator, what the task counted, and the stopwatch."""
        torch.set_rng_state(self._rng)
        self._task.counts, self._interval.seconds = self._counts, self._seconds


def can_give_up(model: nn.Module, world: World, accumulation: int) -> bool:
    """Whether steps of this rank can be given up: it is alone, on a CPU, and a forward pass changes no statistics."""
    norms = (nn.modules.batchnorm._BatchNorm,)
    return (
        accumulation > 1
        and world.size == 1
        and world.device.type == "cpu"
        and not any(isinstance(module, norms) for module in model.modules())
    )
