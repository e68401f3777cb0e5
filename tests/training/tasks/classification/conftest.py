"""The fixtures that build small engines, a recipe of the small shards, and commands that train by it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SMALL
from tests.small_engines import make_checkpoints, make_engine, small_recipe

__all__ = ["make_checkpoints", "make_engine", "small_recipe"]


@pytest.fixture(scope="module")
def recipe(shards, tmp_path_factory) -> Path:
    """Return a recipe file whose data are the small shards."""
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(f"data: {{path: {shards}}}\n")
    return path


@pytest.fixture(scope="module")
def command(recipe: Path) -> Callable[..., list[str]]:
    """Return a function that gives the arguments of `karat` to train by the recipe for 8 steps in a directory."""
    quick = (*SMALL, "train.epochs=1", "schedule.warmup_epochs=0", "checkpoint.every_minutes=null")
    return lambda run, *overrides: ["train", str(recipe), *quick, f"run.dir={run}", *overrides]
