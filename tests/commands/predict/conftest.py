"""One short real run on a folder of images, trained once."""

from pathlib import Path

import pytest

from tests.commands.export.conftest import make_engine, make_run, small_recipe
from tests.conftest import TrainOnce

__all__ = ["make_engine", "make_run", "small_recipe"]


@pytest.fixture(scope="session")
def run(image_folder: Path, train_once: TrainOnce) -> Path:
    """Return the directory of a KArAt run of 16 steps."""
    return train_once("predicting", f"path: {image_folder}, backend: folder", "attention.kind=karat")
