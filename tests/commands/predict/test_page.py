"""The page of `karat demo`, in a real browser that may reach nothing but this machine."""

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from karat_scale.foundation.tables import is_installed
from tests.commands.analyze.browser import open_browser
from tests.conftest import karat_environment, karat_here, wait_until

needs_gradio = pytest.mark.skipif(not is_installed("gradio"), reason="the extra demo is not installed")


@needs_gradio
@pytest.mark.slow
def test_a_picture_is_classified_on_a_page_of_this_machine_alone_that_keeps_no_upload(run, image_folder, tmp_path):
    from gradio_client import Client, handle_file

    picture, uploads, damaged = next(image_folder.rglob("*.jpg")), tmp_path / "uploads", tmp_path / "damaged.jpg"
    uploads.mkdir()
    damaged.write_bytes(b"no picture")
    command = [sys.executable, "-m", "karat_scale", "demo", str(run), "--port", "0"]
    environment = {**karat_environment(), "PYTHONUNBUFFERED": "1", "GRADIO_TEMP_DIR": str(uploads)}
    with (tmp_path / "errors").open("w") as errors, open_browser(tmp_path / "browser") as browser:
        server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            url = re.search(r"http://127\.0\.0\.1:\d+", next(line for line in server.stdout if "classifies" in line))[0]
            for host, code in {"evil.example": 400, url.removeprefix("http://"): 200, "localhost": 200}.items():
                answer = httpx.get(f"{url}/config", headers={"Host": host, "Origin": f"http://{host}"}, timeout=None)
                assert answer.status_code == code
            browser.go(url)
            wait_until(lambda: browser.count("#picture input[type=file]"))
            browser.choose_file("#picture input[type=file]", picture)
            text = wait_until(lambda: "%" in browser.text("#classes") and browser.text("#classes"))
            assert "class" in text
            wait_until(lambda: browser.count("#overlay img"))
            client = Client(url, verbose=False, download_files=False)
            top, _ = client.predict(handle_file(picture), api_name="/classify")
            assert top["label"].startswith("class")
            with pytest.raises(Exception, match=r"damaged\.jpg: not an image in a supported format"):
                client.predict(handle_file(damaged), api_name="/classify")
            assert list(uploads.rglob("*.jpg"))
        finally:
            server.terminate()
            assert server.wait(60) == 0
    assert not list(uploads.iterdir())
    assert (tmp_path / "errors").read_text() == ""


def test_without_gradio_the_way_to_add_it_is_said(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("karat_scale.commands.predict.command.is_installed", lambda module: False)
    assert karat_here("demo", str(run)) == 2
    assert "pip install -e '.[demo]'" in capsys.readouterr().err
