"""One short real run on a folder of images, trained once."""

from pathlib import Path

import pytest

from tests.commands.export.conftest import make_engine, make_run, small_recipe
from tests.conftest import SMALL, karat, made_once

__all__ = ["make_engine", "make_run", "small_recipe"]


@pytest.fixture(scope="session")
def run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a KArAt run of 16 steps."""

    def train(root: Path) -> None:
        recipe = root / "owls.yaml"
        recipe.write_text(
            f"data: {{path: {image_folder}, backend: folder}}\nattention: {{kind: karat}}\n"
            "schedule: {warmup_epochs: 0.5}\n"
        )
        done = karat("train", str(recipe), *SMALL, f"run.dir={root / 'run'}")
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "predict-run", train) / "run"
