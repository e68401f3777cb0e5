"""The documentation names only files that exist, its recipes are valid, and the source tree in it is the real one."""

import re
from pathlib import Path

from karat_scale.recipe.loading import load_recipe
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("karat_scale", "data_prep", "slurm", "examples", "benchmarks", "paper", "docs", "tests")
FILES = [f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]


def test_every_program_that_the_docs_name_exists() -> None:
    for page in PAGES:
        for name in re.findall(r"`([\w./-]+\.(?:py|sh|cpp|h))\b", page.read_text()):
            assert any(file.endswith(f"/{name}") for file in FILES), f"{page.name} names {name}"


def test_every_recipe_in_the_docs_is_valid(tmp_path: Path) -> None:
    texts = [text for page in PAGES for text in re.findall(r"```yaml\n(extends:.*?)```", page.read_text(), re.DOTALL)]
    assert len(texts) == 3
    for text in texts:
        (tmp_path / "photos.yaml").write_text(text)
        load_recipe(str(tmp_path / "photos.yaml"))


def test_the_source_tree_has_every_module_and_no_other() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = text.split("```\nkarat_scale/\n")[1].split("```")[0]
    listed = set(re.findall(r"^  (\w[\w.]*)", tree, flags=re.MULTILINE))
    package = ROOT / "karat_scale"
    modules = {path.name for path in package.iterdir() if not path.name.startswith("__")}
    assert listed == modules
