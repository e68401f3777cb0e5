"""Figures in one style, drawn without a window and without pyplot's global state.

An SVG has no background of its own: `themed` adapts its lines and text to the reader's dark mode.
"""

import io
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from cycler import cycler
from matplotlib.figure import Figure

DPI = 130
INK, GRID = "#1d1d1b", "#8a8a86"
# Distinct also for colour-blind readers (Okabe and Ito; grey instead of black, which dark mode would hide).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c88")
# The replacements of colours in dark mode; the other colours are bright enough.
_DARK = {INK: "#ececea", "#0072b2": "#4ba6e0", "#d55e00": "#ff8a3d", "#009e73": "#2dc79a"}
OWN_LIMITS, OWN_X = "own limits", "own x limits"
"""Labels of axes: `share_axes` leaves all limits of the first, and the x limits of the second, as they are."""

STYLE: Any = {
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.alpha": 0.3,
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "image.interpolation": "nearest",
    # Equal numbers give equal files.
    "svg.hashsalt": "karat_scale",
}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches."""
    matplotlib.rcParams.update(STYLE)
    return Figure(figsize=(width, height), layout="constrained")


def new_axes(width: float, height: float) -> tuple[Figure, Any]:
    """Return a figure of this size in inches, and its only axes."""
    figure = new_figure(width, height)
    return figure, figure.subplots()


def layered(number: int, count: int, width: float = 1.5) -> dict[str, Any]:
    """Return the style of one of `count` lines. Earlier ones are wider, so they show below equal later ones."""
    wider = (count - 1 - number) / max(count - 1, 1)
    return {"linestyle": ("-", "--", ":", "-.")[number % 4], "linewidth": width + wider}


def rendered(figure: Figure, kind: Literal["png", "svg"] = "png", dpi: int = DPI) -> bytes:
    """Return a figure as a file of this kind: a PNG is white behind the figure, an SVG is transparent."""
    content = io.BytesIO()
    # Without the date, equal numbers give equal files.
    options: Any = {"metadata": {"Date": None}} if kind == "svg" else {"facecolor": "white"}
    figure.savefig(content, format=kind, dpi=dpi, **options)
    return content.getvalue()


def themed(svg: bytes) -> bytes:
    """Return an SVG of `rendered` with bright lines and text where the page around it is dark."""
    text = svg.decode()
    for number, colour in enumerate(_DARK):
        text = text.replace(colour, f"var(--c{number})")
    light, dark = (";".join(f"--c{n}:{pair[which]}" for n, pair in enumerate(_DARK.items())) for which in (0, 1))
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    start = text.index(">", text.index("<svg")) + 1
    return (text[:start] + style + text[start:]).encode()


def show_map(axes: Any, values: npt.NDArray[Any], title: str = "", **options: Any) -> Any:
    """Draw a matrix as an image without ticks."""
    image = axes.imshow(np.asarray(values), **options)
    axes.set(xticks=[], yticks=[], title=title)
    axes.grid(False)
    return image


def share_axes(figures: Sequence[Figure]) -> None:
    """Give the axes of the same place in each figure the same limits and colours, so that figures can be compared.

    Figures with different numbers of axes stay as they are, and so do the limits of images and of `OWN_LIMITS`.
    """
    if len({len(figure.axes) for figure in figures}) != 1:
        return
    for place in zip(*(figure.axes for figure in figures), strict=True):
        scaled = [[one for one in (*axes.images, *axes.collections) if one.get_array() is not None] for axes in place]
        for group in zip(*scaled, strict=False):
            colours = [one.get_clim() for one in group]
            if all(None not in pair for pair in colours):
                for one in group:
                    one.set_clim(min(low for low, _ in colours), max(high for _, high in colours))
        labels = {axes.get_label() for axes in place}
        fixed = labels & {OWN_LIMITS, "<colorbar>"} or any(axes.images for axes in place)
        for side in "" if fixed else "yz" if OWN_X in labels else "xyz":
            if all(hasattr(axes, f"set_{side}lim") for axes in place):
                limits = np.array([getattr(axes, f"get_{side}lim")() for axes in place])
                for axes in place:
                    getattr(axes, f"set_{side}lim")(limits[:, 0].min(), limits[:, 1].max())
