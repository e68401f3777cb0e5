"""TensorBoard: curves of the main figures, and histograms of what each head learned."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from karat_scale.recipe import RunRecipe

# TensorBoard shows these; the rest of an event is context.
_SCALARS = {
    "train": ("loss", "lr", "grad_norm", "loss_scale", "images_per_second", "tflops", "mfu"),
    "eval": ("loss", "top1", "top5", "box_ap", "mask_ap"),
}


def _silence_its_thread() -> None:
    """Leave out the traceback of TensorBoard's own thread: the next call raises the same error, as one warning."""
    before = threading.excepthook

    def hook(error: threading.ExceptHookArgs) -> None:
        if not type(error.thread).__module__.startswith("tensorboard."):
            before(error)

    threading.excepthook = hook


class TensorBoard:
    """Writes event files to `tensorboard/` in the run's directory. See Tracker."""

    def __init__(self, name: str, directory: Path, recipe: RunRecipe) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _silence_its_thread()
        self._board: Any = SummaryWriter(str(directory / "tensorboard"))

    def write(self, event: str, step: int, figures: Mapping[str, Any]) -> None:
        """Add the scalars of an event."""
        for name in _SCALARS.get(event, ()):
            if figures.get(name) is not None:
                self._board.add_scalar(f"{event}/{name}", figures[name], step)
        for name, blocks in figures.get("content", {}).items():
            for block, value in enumerate(blocks):
                self._board.add_scalar(f"content, {name}/block {block}", value, step)

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        """Add a distribution."""
        self._board.add_histogram(name, values.float().cpu(), step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._board.close()
