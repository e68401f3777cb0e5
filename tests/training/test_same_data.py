"""A run that goes on with data that are not its own says so."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.recipe import Recipe
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.tasks.classification.task import TrainState
from tests.conftest import karat, karat_done, summary


def test_a_state_resumes_only_with_its_own_data(small_recipe: Callable[..., Recipe]) -> None:
    recipe, state = small_recipe(), TrainState()
    keep_data = RunDirectory(recipe.run.dir).keep_data
    assert keep_data(state, 64, ("cat", "dog"), recipe, is_branch=False) == ""
    state = TrainState.from_json(state.to_json())
    assert keep_data(state, 64, ("cat", "dog"), recipe, is_branch=False) == ""
    with pytest.raises(RunDirectoryError, match=r"data.path .* has 40 training images where it had 64; put"):
        keep_data(state, 40, ("cat", "dog"), recipe, is_branch=False)
    with pytest.raises(RunDirectoryError, match=r"has other classes; put data\.path right"):
        keep_data(state, 64, ("dog", "cat"), recipe, is_branch=False)  # the labels mean something else
    changed = "40 training images where it had 64 and other classes"
    assert keep_data(replace(state), 40, ("dog", "cat"), recipe, is_branch=True) == changed
    allowed = small_recipe("resume.allow=data.path")
    assert keep_data(state, 40, ("dog", "cat"), allowed, is_branch=False) == changed
    assert keep_data(state, 40, ("dog", "cat"), recipe, is_branch=False) == ""


@pytest.mark.slow
def test_a_run_does_not_resume_with_another_data_set(recipe_file: Path, image_folder: Path, tmp_path: Path) -> None:
    run, renamed = tmp_path / "run", tmp_path / "renamed"
    karat_done("train", str(recipe_file), f"run.dir={run}", "train.max_steps=3")
    before = summary(run)

    shutil.copytree(image_folder, renamed)
    for split in ("train", "val"):
        (renamed / split / "class0").rename(renamed / split / "zebra")  # each label is one less now
    go_on = ("train", str(recipe_file), f"run.dir={run}", "data.backend=folder", "train.max_steps=4")
    refused = karat(*go_on, f"data.path={renamed}")
    assert refused.returncode == 2
    assert "has other classes; put data.path right, add 'resume.allow=[data.path]'" in refused.stderr
    assert summary(run) == before
    assert "zebra" not in (run / "classes.json").read_text()

    karat_done(*go_on, f"data.path={image_folder}")  # the images of the shards
