"""One short real run on shards, trained once."""

from pathlib import Path

import pytest

from tests.conftest import SMALL, karat, made_once


@pytest.fixture(scope="session")
def trained_once(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a KArAt run of 16 steps on 32 px images; do not write into it."""

    def train(root: Path) -> None:
        recipe = root / "small.yaml"
        recipe.write_text(f"data: {{path: {shards}}}\nattention: {{kind: karat}}\nschedule: {{warmup_epochs: 0.5}}\n")
        done = karat("train", str(recipe), *SMALL, "model.image_size=32", f"run.dir={root / 'run'}")
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "evaluation-run", train) / "run"


@pytest.fixture
def run(trained_once: Path, tmp_path: Path) -> Path:
    """A run of a test's own; its large files are links."""
    copy = tmp_path / "run"
    copy.mkdir()
    for path in trained_once.iterdir():
        (copy / path.name).symlink_to(path)
    return copy
