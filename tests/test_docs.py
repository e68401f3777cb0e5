"""The documentation names only files that exist, and the source tree in it is the real one."""

import re

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("karat_scale", "data_prep", "slurm", "examples", "benchmarks", "paper", "docs", "tests")
FILES = [f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]


def test_every_program_that_the_docs_name_exists() -> None:
    for page in PAGES:
        for name in re.findall(r"`([\w./-]+\.(?:py|sh|cpp|h))\b", page.read_text()):
            assert any(file.endswith(f"/{name}") for file in FILES), f"{page.name} names {name}"


def test_the_source_tree_has_every_module_and_no_other() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = text.split("```\nkarat_scale/\n")[1].split("```")[0]
    listed = set(re.findall(r"^  (\w[\w.]*)", tree, flags=re.MULTILINE))
    package = ROOT / "karat_scale"
    modules = {path.name for path in package.iterdir() if not path.name.startswith("__")}
    assert listed == modules
