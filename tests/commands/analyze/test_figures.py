"""Figures that are compared have equal axes, and their ink follows dark mode."""

import xml.etree.ElementTree as ET

import numpy as np
from matplotlib.figure import Figure

from karat_scale.commands.figures import INK, OWN_LIMITS, new_figure, rendered, share_axes, show_map, themed


def line(values: list[float], label: str = "") -> Figure:
    figure = new_figure(2, 2)
    axes = figure.subplots()
    axes.plot(values)
    axes.set_label(label)
    return figure


def test_corresponding_axes_get_the_same_limits() -> None:
    first, second = line([0, 1]), line([-5, 0, 3])
    share_axes([first, second])
    assert first.axes[0].get_ylim() == second.axes[0].get_ylim()
    low, high = first.axes[0].get_ylim()
    assert low < -5
    assert high > 3


def test_own_limits_and_other_layouts_stay() -> None:
    first, second = line([0, 1], OWN_LIMITS), line([0, 9], OWN_LIMITS)
    share_axes([first, second])
    assert first.axes[0].get_ylim() != second.axes[0].get_ylim()
    other = new_figure(2, 2)
    other.subplots(1, 2)
    before = second.axes[0].get_ylim()
    share_axes([second, other])
    assert second.axes[0].get_ylim() == before


def test_maps_get_the_same_colours_and_keep_their_size() -> None:
    figures = []
    for size, top in ((2, 1.0), (3, 4.0)):
        figure = new_figure(2, 2)
        figure.colorbar(show_map(figure.subplots(), np.linspace(0, top, size * size).reshape(size, size)))
        figures.append(figure)
    share_axes(figures)
    assert [figure.axes[0].images[0].get_clim() for figure in figures] == [(0, 4), (0, 4)]
    assert [figure.axes[0].get_xlim() for figure in figures] == [(-0.5, 1.5), (-0.5, 2.5)]


def test_an_svg_is_transparent_and_its_ink_has_two_colours() -> None:
    svg = rendered(line([0, 1]), "svg")
    assert INK.encode() in svg
    page = themed(svg).decode()
    ET.fromstring(page)
    assert page.count(INK) == 1  # the definition
    assert "var(--c0)" in page
    assert "prefers-color-scheme:dark" in page
    assert "#ffffff" not in page
