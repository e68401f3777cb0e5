"""A small recipe on synthetic data."""

from collections.abc import Callable
from pathlib import Path

import pytest

from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import load_recipe
from tests.conftest import SMALL


@pytest.fixture
def small_recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """The small recipe with overrides."""
    path = tmp_path / "small.yaml"
    path.write_text("data: {backend: synthetic, synthetic_samples: 32}\nattention: {kind: karat}\n")

    def load(*overrides: str) -> Recipe:
        fixed = ("schedule.warmup_epochs=0", "checkpoint.every_minutes=null", f"run.dir={tmp_path / 'run'}")
        return load_recipe(path, [*SMALL, *fixed, *overrides])

    return load
