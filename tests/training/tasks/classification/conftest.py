"""The fixtures that build small engines, and a recipe of the small shards."""

from pathlib import Path

import pytest

from tests.small_engines import make_checkpoints, make_engine, small_recipe

__all__ = ["make_checkpoints", "make_engine", "small_recipe"]


@pytest.fixture(scope="module")
def recipe(shards, tmp_path_factory) -> Path:
    """A recipe file whose data are the small shards."""
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(f"data: {{path: {shards}}}\n")
    return path
