"""Recipes with keys of earlier versions still load, such as those in old run directories."""

from pathlib import Path

import pytest

from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe.loading import dump_recipe, load_recipe

OLD = """
data: {backend: synthetic}
train:
  recompute: {policy: all, method: deepspeed, partition: %s, cpu: %s, budget_gb: null}
log: {every_steps: 20, tensorboard: %s}
"""


@pytest.mark.parametrize(("tensorboard", "trackers"), [("true", ("tensorboard",)), ("false", ())])
def test_an_old_recipe_loads_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tensorboard: str, trackers: tuple[str, ...]
) -> None:
    old = tmp_path / "old.yaml"
    old.write_text(OLD % ("false", "false", tensorboard))
    recipe = load_recipe(old)
    assert (recipe.train.recompute.policy, recipe.log.trackers) == ("all", trackers)
    assert capsys.readouterr().err == ""
    (tmp_path / "new.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "new.yaml").log == recipe.log


def test_a_retired_key_that_asked_for_something_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old.yaml"
    old.write_text(OLD % ("true", "true", "true"))
    load_recipe(old)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"note: {old}: train.recompute.partition = true is ignored: ")
    assert "train.recompute.cpu = true is ignored" in second


def test_the_old_key_works_as_an_override(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {backend: synthetic}\n")
    assert load_recipe(recipe, ["log.tensorboard=false"]).log.trackers == ()
    assert load_recipe(recipe, ["log.trackers=[]", "log.tensorboard=true"]).log.trackers == ("tensorboard",)


@pytest.mark.parametrize(("trackers", "expected"), [("wandb", ("wandb", "tensorboard")), ("", ("tensorboard",))])
def test_one_tracker_beside_the_old_key_is_a_list(tmp_path: Path, trackers: str, expected: tuple[str, ...]) -> None:
    old = tmp_path / "old.yaml"
    old.write_text(OLD % ("false", "false", "true"))
    assert load_recipe(old, [f"log.trackers={trackers}"]).log.trackers == expected


def test_what_is_no_tracker_beside_the_old_key_is_one_line(tmp_path: Path) -> None:
    old = tmp_path / "old.yaml"
    old.write_text(OLD % ("false", "false", "true"))
    with pytest.raises(RecipeError, match=r"log\.trackers\.0 = 3"):
        load_recipe(old, ["log.trackers=3"])
