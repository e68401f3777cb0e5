"""`data.verify: hash`: which rank hashes which files, how often, and that ranks show progress meanwhile."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from karat_scale.engine.reporting.progress import Reporter, SilentDisplay
from karat_scale.foundation.errors import DataError
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.tasks.classification.task import ClassificationTask
from tests.conftest import ROOT, SMALL, rank_environments
from tests.warm import run_program


def two_ranks(directory: Path, nodes: str = "one") -> list[dict[str, Any]]:
    """Return what each of two ranks reports."""
    script = Path(__file__).with_name("hashing_rank.py")
    done = run_program(str(script), [str(directory), nodes], rank_environments(2), timeout=120, directory=ROOT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def flip_a_byte(tar: Path) -> None:
    data = bytearray(tar.read_bytes())
    data[1000] ^= 1
    tar.write_bytes(data)


@pytest.mark.multiprocess
def test_the_ranks_of_a_node_share_its_files_and_beat_while_they_read(shards) -> None:
    tars = sorted(tar.name for tar in shards.glob("*.tar"))
    told = two_ranks(shards)
    assert sorted(told[0]["files"] + told[1]["files"]) == tars
    assert abs(len(told[0]["files"]) - len(told[1]["files"])) <= 1
    assert told[0]["beats"] == told[1]["beats"] >= len(tars) / 2
    assert [rank["error"] for rank in told] == ["", ""]


@pytest.mark.multiprocess
def test_each_node_hashes_all_of_its_own_copy(shards) -> None:
    tars = sorted(tar.name for tar in shards.glob("*.tar"))
    assert [rank["files"] for rank in two_ranks(shards, "each")] == [tars, tars]


@pytest.mark.multiprocess
def test_what_one_rank_finds_ends_all(shards, tmp_path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    flip_a_byte(copy / "train-000001.tar")
    first, second = two_ranks(copy)
    assert "train-000001.tar has changed since it was written: its SHA-256 differs" in first["error"]
    assert first["error"] == second["error"]


def recipe_of(directory: Path, tmp_path: Path) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"data: {{path: {directory}, verify: hash}}\nschedule: {{warmup_epochs: 0}}\n")
    growing = "schedule.image_sizes=[[0, 8], [1, 16]]"
    return load_recipe(file, [*SMALL, growing, f"run.dir={tmp_path / 'run'}"])


def test_the_files_are_hashed_at_the_start_and_not_for_each_image_size(shards, tmp_path, world) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    reporter = Reporter(SilentDisplay(), None)
    task = ClassificationTask(recipe_of(copy, tmp_path), world, reporter)
    flip_a_byte(copy / "train-000001.tar")
    smaller = task.at(0)
    assert smaller.recipe.model.image_size == 8
    larger = smaller.at(8)
    larger.close()
    with pytest.raises(DataError, match=r"train-000001.tar has changed since it was written: its SHA-256 differs"):
        ClassificationTask(recipe_of(copy, tmp_path), world, reporter)
