"""The style of the figures. They are drawn without a window and without pyplot's global state."""

import io
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from cycler import cycler
from matplotlib.figure import Figure

DPI = 130
# Distinct also for colour-blind readers (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

STYLE: Any = {
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    # Equal numbers give equal files.
    "svg.hashsalt": "karat_scale",
}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches."""
    matplotlib.rcParams.update(STYLE)
    return Figure(figsize=(width, height), layout="constrained")


def rendered(figure: Figure, kind: Literal["png", "svg"] = "png", dpi: int = DPI) -> bytes:
    """Return a figure as a file of this kind."""
    content = io.BytesIO()
    # Without the date, equal numbers give equal files.
    figure.savefig(content, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()


def show_map(axes: Any, values: npt.NDArray[Any], title: str = "", **options: Any) -> Any:
    """Draw a matrix as an image without ticks."""
    image = axes.imshow(np.asarray(values), **options)
    axes.set(xticks=[], yticks=[], title=title)
    axes.grid(False)
    return image
