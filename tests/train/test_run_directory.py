from pathlib import Path

import pytest

from karat_scale.errors import RunDirectoryError
from karat_scale.train.run_directory import RunDirectory


def test_a_new_directory_is_claimed_and_begun(small_recipe, tmp_path: Path) -> None:
    recipe = small_recipe()
    directory = RunDirectory(tmp_path / "new" / "run")
    directory.open(recipe)
    assert directory.summary() is None
    directory.begin(recipe)
    assert directory.recipe() == recipe
    directory.write_summary({"exit": 0})
    assert directory.summary() == {"exit": 0}


def test_two_cannot_hold_one_directory(small_recipe, tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    first.open(small_recipe())
    with pytest.raises(RunDirectoryError, match="in use by process"):
        second.open(small_recipe())


def test_a_place_that_cannot_be_written_is_one_line(small_recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"run.dir = .*choose another run.dir"):
        RunDirectory(tmp_path / "file" / "run").open(small_recipe())


def test_keys_that_do_not_matter_may_change(small_recipe, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    directory.begin(small_recipe())
    directory.open(small_recipe("data.workers=0", "log.every_steps=3", "train.micro_batch=2"))


def test_many_differing_keys_are_counted(small_recipe, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    directory.begin(small_recipe())
    changes = [
        f"augment.{key}=0" for key in ("hflip", "color_jitter", "mixup", "cutmix", "mix_prob", "label_smoothing")
    ]
    with pytest.raises(RunDirectoryError, match="and 1 more"):
        directory.open(small_recipe(*changes, "optim.lr=1"))
