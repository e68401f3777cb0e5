"""Tests of the report's behaviour in Chromium, on a page with names that are markup and scripts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands.analyze.browser import Browser
from tests.commands.analyze.test_report import NASTY, make_page


@pytest.fixture
def page(tmp_path: Path, browser: Browser) -> Browser:
    browser.prefer("light")
    browser.open(make_page(tmp_path))
    return browser


def column(browser: Browser, number: int) -> list[str]:
    return browser.run(f"return [...document.querySelectorAll('tbody tr')].map(r => r.cells[{number}].textContent)")


def back(browser: Browser) -> str:
    return browser.run("return getComputedStyle(document.body).backgroundColor")


def test_hostile_names_are_shown_as_they_are_and_nothing_complains(page: Browser) -> None:
    assert page.messages() == []
    assert page.run("return document.querySelector('h3').textContent") == NASTY
    assert column(page, 0) == [NASTY, "b", "c", "d"]
    assert page.run("return document.scripts.length") == 1
    assert page.run("return performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:'))") == []
    sizes = page.run("return [...document.querySelectorAll('figure img')].map(i => i.complete && i.naturalWidth)")
    assert (len(sizes), sizes[0] > 100, sizes[1]) == (2, True, 1)


def test_a_table_is_sorted_by_the_column_that_is_clicked(page: Browser) -> None:
    assert column(page, 1) == ["1.235", "-", "-30", "-"]
    page.click("th", 1)
    assert column(page, 1) == ["-30", "1.235", "-", "-"]
    page.click("th", 1)
    assert column(page, 1) == ["1.235", "-30", "-", "-"]
    page.click("th", 0)
    assert column(page, 0) == [NASTY, "b", "c", "d"]
    assert page.run("return [...document.querySelectorAll('th')].map(h => h.ariaSort)") == ["ascending", None]
    assert page.messages() == []


def test_a_figure_opens_enlarges_and_closes(page: Browser) -> None:
    assert not page.shown("#zoom")
    page.click("figure img")
    assert page.shown("#zoom")
    fitted = page.run("return document.querySelector('#zoom img').clientWidth")
    assert page.run("return document.querySelector('figure img').clientWidth") < fitted <= 1300
    page.click("#zoom img")
    assert page.run("return document.querySelector('#zoom img').clientWidth") > fitted
    assert page.run("return document.querySelector('#zoom img').src").startswith("data:image/svg+xml")
    page.click("#zoom button")
    assert not page.shown("#zoom")
    page.click("figure img")
    page.press_escape()
    assert not page.shown("#zoom")
    page.click("figure img")
    page.run("document.getElementById('zoom').click()")
    assert not page.shown("#zoom")
    assert page.messages() == []


def ink(browser: Browser, tmp_path: Path) -> int:
    """Return the brightness of the figure's ink: of its darkest pixel on a light page, its brightest on a dark one."""
    browser.screenshot(tmp_path / "page.png")
    box = browser.run(
        "const r = document.querySelector('figure img').getBoundingClientRect();"
        "return [r.left, r.top + scrollY, r.right, r.bottom + scrollY]"
    )
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("L").crop(box)).astype(int)
    middle = np.median(pixels)
    return int(pixels.min() if middle > 128 else pixels.max())


def test_page_and_figures_follow_the_system_and_the_button(page: Browser, tmp_path: Path) -> None:
    light = back(page)
    assert ink(page, tmp_path) < 60
    page.click("#theme")
    dark = back(page)
    assert dark != light
    assert ink(page, tmp_path) > 200
    page.prefer("dark")
    page.click("#theme")
    assert back(page) == light
    assert ink(page, tmp_path) < 60
    page.click("#theme")
    assert back(page) == dark


def test_all_of_a_page_is_used_and_a_phone_does_not_scroll_sideways(page: Browser) -> None:
    widths = page.run(
        "const width = (element) => element.getBoundingClientRect().width;"
        "const rows = [...document.querySelectorAll('.row')];"
        "return rows.map(row => [row.children.length, width(row.children[0]) / width(row)])"
    )
    assert widths == [[1, 1], [1, 1], [1, 1]]
    page.resize(390, 800)
    try:
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        assert page.run("return document.querySelector('figure img').getBoundingClientRect().right <= innerWidth")
    finally:
        page.resize(1300, 1000)
