"""Where a classifier looks in each image: the attention of the last block, laid over what the model saw."""

from pathlib import Path

from torch import Tensor

from karat_scale.analysis.figures import new_figure, rendered, show_map
from karat_scale.analysis.last_block import LastBlock
from karat_scale.console import printable
from karat_scale.files import write_atomically


def write_overlay(path: Path, picture: Tensor, maps: LastBlock, row: int, title: str) -> None:
    """Write a PNG: the image uint8 [3, H, W] as the model saw it, and the dominant head's weights S over it."""
    head, weights = maps.overlay(row, (picture.shape[1], picture.shape[2]))
    figure = new_figure(6, 3.3)
    axes = figure.subplots(1, 2)
    pixels = picture.permute(1, 2, 0).numpy()
    show_map(axes[0], pixels, "image")
    show_map(axes[1], pixels, f"block {maps.block}, head {head}")
    show_map(axes[1], weights.numpy(), f"block {maps.block}, head {head}", alpha=0.55, cmap="magma")
    figure.suptitle(printable(title).replace("$", r"\$"))
    write_atomically(path, rendered(figure, dpi=100))
