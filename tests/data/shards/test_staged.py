"""A node's copy of the shards is read in their place, and the recipe does not learn of it."""

import shutil
from pathlib import Path

import pytest

from karat_scale.data.shards.shard_format import staged_copy
from karat_scale.training.run_directory import RunDirectory
from tests.conftest import karat


def test_only_a_whole_copy_of_just_these_shards_is_taken(tmp_path: Path) -> None:
    told = {"KARAT_SHARDS": "/shared", "KARAT_STAGED": str(tmp_path)}
    assert staged_copy("/shared", told) is None
    (tmp_path / "dataset.json").touch()
    assert staged_copy("/shared", told) == str(tmp_path)
    assert staged_copy("/other", told) is None
    assert staged_copy("/shared", {**told, "KARAT_STAGED": ""}) is None
    assert staged_copy("", {}) is None


def test_a_run_reads_the_copy_and_any_node_evaluates_it(
    recipe_file: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, copy, run = tmp_path / "shared", tmp_path / "copy", tmp_path / "run"
    for directory in (shared, copy):
        shutil.copytree(shards, directory)
    away = shared.rename(tmp_path / "away")
    monkeypatch.setenv("KARAT_SHARDS", str(shared))
    monkeypatch.setenv("KARAT_STAGED", str(copy))
    done = karat("train", str(recipe_file), f"data.path={shared}", "train.epochs=1")
    assert done.returncode == 0, done.stderr
    assert f"the images are read from {copy}, this node's copy" in done.stdout
    assert RunDirectory(run).recipe().data.path == str(shared)

    monkeypatch.delenv("KARAT_STAGED")
    shutil.rmtree(copy)
    away.rename(shared)
    done = karat("eval", str(run))
    assert done.returncode == 0, done.stderr
