"""The documentation site builds without a warning, its search knows all names, and a browser shows its pages."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from karat_scale.commands.cli import build_parser
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import schema_keys
from karat_scale.training.tasks.detection.recipe import DetectionRecipe
from tests.commands.analyze.browser import Browser, open_browser
from tests.conftest import ROOT, karat_environment, output_of, run_to_end

TEXTS = "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent.trim())"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="needs the extra docs")
    out = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out)
    done = run_to_end(*command, env={**karat_environment(), "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def described_keys(schema: type) -> set[str]:
    """Return the keys of a recipe that hold a value."""
    keys = set(schema_keys(schema))
    return {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}


@pytest.mark.slow
def test_the_site_shows_every_key_and_every_command(site: Path, browser: Browser) -> None:
    for page, schema in (("recipe", Recipe), ("recipe_detection", DetectionRecipe)):
        browser.open(site / f"{page}.html")
        cells = browser.run(TEXTS, "td")
        rows = [cells[start : start + 5] for start in range(0, len(cells), 5)]
        assert {row[0] for row in rows} == described_keys(schema)
        assert all(all(row) for row in rows), [row for row in rows if not all(row)]
    (action,) = [action for action in build_parser()._actions if action.dest == "command"]
    for command in action.choices:
        browser.open(site / "commands" / f"{command}.html")
        assert browser.run(TEXTS, "h1")[0].startswith(f"karat {command}")
    browser.open(site / "api" / "attention.html")
    assert any("fourier_karat_attention" in heading for heading in browser.run(TEXTS, "h2"))


@pytest.mark.slow
def test_the_search_knows_each_part_of_each_key_and_each_command(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    split = re.compile(index["config"]["separator"])
    words = {page: set() for page in ("recipe.html", "recipe_detection.html", "commands")}
    for entry in index["docs"]:
        page = entry["location"].split("#")[0].split("/")[0]
        words.get(page, set()).update(split.split(re.sub("<.*?>", " ", f"{entry['title']} {entry['text']}")))
    for page, schema in (("recipe.html", Recipe), ("recipe_detection.html", DetectionRecipe)):
        assert {word for key in described_keys(schema) for word in split.split(key)} <= words[page]
    (action,) = [action for action in build_parser()._actions if action.dest == "command"]
    assert action.choices.keys() <= words["commands"]


@pytest.mark.slow
def test_each_version_of_the_site_stays(tmp_path: Path) -> None:
    pytest.importorskip("mike", reason="needs the extra docs")
    subprocess.run(["git", "clone", "-q", "--depth=1", f"file://{ROOT}", "clone"], cwd=tmp_path, check=True)
    clone = tmp_path / "clone"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(clone)}
    environment |= {"DOCS_VERSIONS": "mike", "NO_MKDOCS_2_WARNING": "1"}
    environment |= dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"), "a")
    environment |= dict.fromkeys(("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "a@b")
    for version in ("0.2", "0.3"):
        output_of("mike", "deploy", "--update-aliases", version, "latest", cwd=clone, env=environment)
    versions = json.loads(output_of("git", "show", "gh-pages:versions.json", cwd=clone))
    assert {entry["version"]: entry["aliases"] for entry in versions} == {"0.3": ["latest"], "0.2": []}
    assert '"provider": "mike"' in output_of("git", "show", "gh-pages:0.2/index.html", cwd=clone)


@pytest.mark.slow
def test_the_start_page_leads_to_the_guides(site: Path, browser: Browser) -> None:
    browser.open(site / "index.html")
    assert browser.run("return document.querySelector('img[src=\"figures/functions.png\"]').naturalWidth > 0")
    assert browser.run("return document.querySelector('.md-content a[href=\"contributing.html\"]') !== null")
    assert 'href="../attention.html"' in (site / "api" / "attention.html").read_text()
    browser.click(".md-content a[href='data.html']")
    assert browser.run(TEXTS, "h1")[0].startswith("Data")
    assert browser.messages() == []
