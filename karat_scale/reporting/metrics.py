"""Where figures go: `metrics.jsonl`, one event a line, and TensorBoard."""

import json
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from karat_scale.errors import not_written

# TensorBoard shows these; the rest of an event is context.
_SCALARS = {
    "train": ("loss", "lr", "grad_norm", "loss_scale", "images_per_second", "tflops", "mfu"),
    "eval": ("loss", "top1", "top5", "box_ap", "mask_ap"),
}


class MetricsLog:
    """Appends events; every line is on disk before the next step can be lost."""

    def __init__(self, file: Path, tensorboard: Path | None) -> None:
        self._file = file.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(tensorboard))

    def write(self, event: str, step: int, **figures: Any) -> None:
        """One event. A figure that is not finite is written as null: JSON has no NaN.

        Raises RunDirectoryError when the disk does not take it.
        """
        record = {"event": event, "step": step, "time": round(time.time(), 3), **figures}
        record = {key: _finite_or_none(value) for key, value in record.items()}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise not_written(self._file.name, error) from error
        if self._board is not None:
            for name in _SCALARS.get(event, ()):
                if figures.get(name) is not None:
                    self._board.add_scalar(f"{event}/{name}", figures[name], step)

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        """A distribution, for TensorBoard alone."""
        if self._board is not None:
            self._board.add_histogram(name, values.float().cpu(), step)

    def close(self) -> None:
        """Flush and close both."""
        with suppress(OSError):  # a write that failed was reported when it happened
            self._file.close()
        if self._board is not None:
            self._board.close()


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
