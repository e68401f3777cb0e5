"""A report as a reader sees it: headless Chromium, driven by Selenium."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

QUIET = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # which containers often have too little of
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--window-size=1300,1000",
)


class Browser:
    """One page at a time."""

    def __init__(self, driver) -> None:
        self._driver = driver

    def open(self, page: Path) -> None:
        """Load a file."""
        self._driver.get(page.as_uri())

    def go(self, url: str) -> None:
        """Load a page from a server."""
        self._driver.get(url)

    def count(self, selector: str) -> int:
        """How many such elements there are."""
        return len(self._driver.find_elements("css selector", selector))

    def text(self, selector: str) -> str:
        """What the first such element shows."""
        return self._driver.find_element("css selector", selector).text

    def choose_file(self, selector: str, file: Path) -> None:
        """Choose a file for an input, which may be hidden."""
        self._driver.find_element("css selector", selector).send_keys(str(file))

    def run(self, script: str, *arguments: object):
        """What a script returns."""
        return self._driver.execute_script(script, *arguments)

    def click(self, selector: str, number: int = 0) -> None:
        """Click where a person would, on the element in sight."""
        element = self._driver.find_elements("css selector", selector)[number]
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def shown(self, selector: str) -> bool:
        """Whether the first such element can be seen."""
        return self._driver.find_element("css selector", selector).is_displayed()

    def press_escape(self) -> None:
        """Press the Escape key."""
        from selenium.webdriver.common.keys import Keys

        self._driver.switch_to.active_element.send_keys(Keys.ESCAPE)

    def resize(self, width: int, height: int) -> None:
        """Give the page another width, also one that a window cannot have."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        """As the reader's system does, "dark" or "light"."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def screenshot(self, path: Path) -> None:
        """The whole page, not only what is in the window."""
        width, height = self.run("return [innerWidth, document.documentElement.scrollHeight]")
        before = width, self.run("return innerHeight")
        self.resize(width, min(height, 16_000))
        self._driver.save_screenshot(str(path))
        self.resize(*before)

    def messages(self) -> list[str]:
        """What the console has shown since it was last asked."""
        return [entry["message"] for entry in self._driver.get_log("browser")]


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """A fresh browser; the test is skipped where Debian's packages are not installed."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromium-driver: as root, apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in (*QUIET, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield Browser(started)
    finally:
        started.quit()
