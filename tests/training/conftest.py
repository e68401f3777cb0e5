"""The fixtures that build small engines, and small runs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import karat_run_here
from tests.small_engines import make_checkpoints, make_engine, small_recipe

__all__ = ["make_checkpoints", "make_engine", "small_recipe"]


@pytest.fixture
def trained(recipe_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that trains by the small recipe to the end, in the directory of a name, and returns the run."""

    def train(name: str, *overrides: str, processes: int = 1) -> Path:
        arguments = ("train", str(recipe_file), f"run.dir={tmp_path / name}", *overrides)
        done = karat_run_here(*arguments, processes=processes)
        assert done.returncode == 0, done.stdout + done.stderr
        return tmp_path / name

    return train
