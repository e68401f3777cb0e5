"""The page of `karat demo`, in a real browser that may reach nothing but this machine."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from karat_scale.tables import is_installed
from tests.analysis.browser import open_browser
from tests.conftest import karat_environment, karat_here

needs_gradio = pytest.mark.skipif(not is_installed("gradio"), reason="the extra demo is not installed")


def wait_for(found, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return result


@needs_gradio
@pytest.mark.slow
def test_a_picture_dropped_into_the_page_is_classified(run: Path, image_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "karat_scale", "demo", str(run), "--port", "0"]
    environment = {**karat_environment(), "PYTHONUNBUFFERED": "1"}
    with (
        open_browser(tmp_path / "browser") as browser,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server,
    ):
        try:
            line = next(line for line in server.stdout if "classifies pictures" in line)
            browser.go(re.search(r"http://127\.0\.0\.1:\d+", line)[0])
            picture = next(image_folder.rglob("*.jpg"))
            wait_for(lambda: browser.count("#picture input[type=file]"))
            browser.choose_file("#picture input[type=file]", picture)
            text = wait_for(lambda: "%" in browser.text("#classes") and browser.text("#classes"))
            assert "class" in text
            wait_for(lambda: browser.count("#overlay img"))
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(30) in (0, 1, -signal.SIGINT, 130)


def test_without_gradio_the_way_to_add_it_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("karat_scale.predict.page.is_installed", lambda module: False)
    assert karat_here("demo", str(run)) == 2
    assert "pip install -e '.[demo]'" in capsys.readouterr().err
