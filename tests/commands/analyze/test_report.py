import base64
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from karat_scale.commands.analyze.command import write_report
from karat_scale.commands.analyze.result import Result, Settings, Table, Tile, read_written, write_result
from karat_scale.commands.figures import INK, OWN_LIMITS, new_figure, rendered, share_axes, show_map, themed

PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
NASTY = "<script>alert('x')</script>&\"'"


def make_page(tmp_path: Path) -> Path:
    """Write a report of one figure, one table and one picture, with names that are markup, and return its path."""
    figure = new_figure(2, 2)
    figure.subplots().plot([1, 2])
    result = Result(numbers={"x": float("nan")}, notes=[NASTY], findings=[NASTY])
    result.figures[NASTY] = figure, NASTY
    result.tables.append(Table(NASTY, ["class", NASTY], [[NASTY, 1.23456], ["b", None], ["c", -30], ["d", np.nan]]))
    result.galleries[NASTY] = [Tile(NASTY, [NASTY, "50 %"], PICTURE)]
    write_result(result, "run", Settings(directory=tmp_path / "spectrum"))
    written = read_written(tmp_path / "spectrum", "run")
    runs = [
        {"label": NASTY, "facts": {"directory": NASTY}, "score": NASTY, "summary": [("spectrum", NASTY)]},
        {"label": "other", "facts": {}, "score": "12.5 % top-1", "summary": []},
    ]
    path = tmp_path / "report.html"
    problems = {("other", NASTY, False): ["Attention maps", "Accuracy"], ("other", NASTY, True): ["Sharpness"]}
    write_report(path, runs, {"spectrum": {NASTY: written}}, problems)
    return path


@pytest.fixture
def page(tmp_path: Path) -> str:
    return make_page(tmp_path).read_text()


def test_text_is_escaped_and_nothing_is_fetched(page: str) -> None:
    assert "<script>alert" not in page
    assert page.count("<script") == 1
    links = re.findall(r'\b(?:src|href|srcset|data|action)=["\']?([^"\' >]*)', page)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "1.235" in page
    assert "missing for it: Attention maps, Accuracy" in page
    assert page.count("Not in this report") == 1
    assert page.count('<td data-key="">-</td>') == 2
    assert page.count('<a href="#spectrum">') == 2  # in the navigation, and after the finding
    assert page.index("12.5 % top-1") < page.index("Spectral behaviour</h2>")


def test_files_beside_the_report(page: str, tmp_path: Path) -> None:
    names = sorted(path.name for path in (tmp_path / "spectrum").iterdir())
    assert names[:2] == ["_script_alert_x_script_.png", "_script_alert_x_script_.svg"]
    assert names[2:] == ["arrays.npz", "numbers.json", "pictures", "shown.json"]
    assert [path.name for path in (tmp_path / "spectrum" / "pictures").iterdir()] == ["_script_alert_x_script_.png"]
    assert '"x": null' in (tmp_path / "spectrum" / "numbers.json").read_text()


def test_what_was_written_can_be_shown_again(page: str, tmp_path: Path) -> None:
    again = read_written(tmp_path / "spectrum", "run")
    assert again is not None
    again.is_earlier = True
    assert again.findings == [NASTY]
    report = tmp_path / "again.html"
    run = {"label": NASTY, "facts": {}, "score": "", "summary": []}
    write_report(report, [run], {"spectrum": {NASTY: again}}, {})
    for part in (
        "data:image/svg+xml;base64,PD94",
        "data:image/png;base64,iVBOR",
        "1.235",
        ">-30<",
        ">-<",
        "made by an earlier command",
    ):
        assert part in report.read_text(), part
    assert read_written(tmp_path / "spectrum", "another") is None
    assert read_written(tmp_path / "maps", "run") is None
    next((tmp_path / "spectrum").glob("*.svg")).unlink()
    assert read_written(tmp_path / "spectrum", "run") is None


def line(values: list[float], label: str = "") -> Figure:
    figure = new_figure(2, 2)
    axes = figure.subplots()
    axes.plot(values)
    axes.set_label(label)
    return figure


def test_corresponding_axes_get_the_same_limits_unless_they_have_their_own_or_another_layout() -> None:
    first, second = line([0, 1]), line([-5, 0, 3])
    share_axes([first, second])
    assert first.axes[0].get_ylim() == second.axes[0].get_ylim()
    low, high = first.axes[0].get_ylim()
    assert (low < -5, high > 3) == (True, True)
    other = new_figure(2, 2)
    other.subplots(1, 2)
    for figures in ([line([0, 1], OWN_LIMITS), line([0, 9], OWN_LIMITS)], [line([0, 9]), other]):
        before = [figure.axes[0].get_ylim() for figure in figures]
        share_axes(figures)
        assert [figure.axes[0].get_ylim() for figure in figures] == before


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
