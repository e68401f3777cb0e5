"""Histograms, for the trackers, of what each head has learned so far: its coefficients and its projector W."""

from typing import Any

import numpy as np
import torch

from karat_scale.engine.deepspeed_internals import whole_parameters
from karat_scale.engine.engine import Engine
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.models.operators import head_parameters
from karat_scale.recipe import LogConfig

_BINS = 64


class HeadHistograms:
    """Written each `log.histogram_every_steps`; rank 0 writes, and at stage 3 all ranks bring their parts."""

    def __init__(self, engine: Engine, log: LogConfig, reporter: Reporter) -> None:
        self._engine, self._reporter = engine, reporter
        self._every = log.histogram_every_steps if log.trackers else None
        self._parameters = list(head_parameters(engine.module))

    def due(self, step: int) -> bool:
        """Whether there is something to write after `step` finished steps; the same on every rank."""
        return bool(self._every and self._parameters) and step > 0 and step % (self._every or 1) == 0

    def write(self, step: int) -> None:
        """Write one histogram of each parameter of each head. Collective at stage 3."""
        with whole_parameters(self._engine.deepspeed, [parameter for *_, parameter in self._parameters]):
            if self._reporter.is_recording:
                histograms = {
                    f"block {block}, {name}/head {head}": _histogram(values)
                    for name, block, parameter in self._parameters
                    for head, values in enumerate(parameter.detach())
                }
                self._reporter.histograms(step, histograms)


def _histogram(values: torch.Tensor) -> dict[str, Any]:
    """Count the finite values in bins of equal width."""
    numbers = values.double().flatten().cpu().numpy()
    numbers = numbers[np.isfinite(numbers)]
    counts, edges = np.histogram(numbers, _BINS)
    return {
        "counts": counts.tolist(),
        "edges": [float(f"{edge:.7g}") for edge in edges],
        "sum": float(numbers.sum()),
        "sum_squares": float(np.square(numbers).sum()),
    }
