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
    "--disable-dev-shm-usage",  # as containers often have too little shared memory
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--window-size=1300,1000",
)


class Browser:
    """A browser that shows one page at a time."""

    def __init__(self, driver) -> None:
        self._driver = driver

    def open(self, page: Path) -> None:
        """Load a file."""
        self._driver.get(page.as_uri())

    def go(self, url: str) -> None:
        """Load a page from a server."""
        self._driver.get(url)

    def count(self, selector: str) -> int:
        """Return how many elements match."""
        return len(self._driver.find_elements("css selector", selector))

    def text(self, selector: str) -> str:
        """Return the text of the first element that matches."""
        return self._driver.find_element("css selector", selector).text

    def choose_file(self, selector: str, file: Path) -> None:
        """Choose a file for an input, which may be hidden."""
        self._driver.find_element("css selector", selector).send_keys(str(file))

    def run(self, script: str, *arguments: object):
        """Run a script and return its result."""
        return self._driver.execute_script(script, *arguments)

    def click(self, selector: str, number: int = 0) -> None:
        """Scroll to an element and click on it, as a person would."""
        element = self._driver.find_elements("css selector", selector)[number]
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def shown(self, selector: str) -> bool:
        """Return whether the first element that matches can be seen."""
        return self._driver.find_element("css selector", selector).is_displayed()

    def press_escape(self) -> None:
        """Press the Escape key."""
        from selenium.webdriver.common.keys import Keys

        self._driver.switch_to.active_element.send_keys(Keys.ESCAPE)

    def resize(self, width: int, height: int) -> None:
        """Give the page another size, even one that a window cannot have."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        """Set the colour scheme that the reader's system prefers, "dark" or "light"."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def screenshot(self, path: Path) -> None:
        """Save a picture of the whole page, not only of what is in the window."""
        width, height = self.run("return [innerWidth, document.documentElement.scrollHeight]")
        before = width, self.run("return innerHeight")
        self.resize(width, min(height, 16_000))
        self._driver.save_screenshot(str(path))
        self.resize(*before)

    def messages(self) -> list[str]:
        """Return what the console has shown since the last call."""
        return [entry["message"] for entry in self._driver.get_log("browser")]


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Yield a fresh browser, or skip the test if Chromium or its driver is not installed."""
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
