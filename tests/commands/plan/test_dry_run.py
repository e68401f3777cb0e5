"""A fake world finds what a real one would stumble over."""

from pathlib import Path

import pytest

from karat_scale.commands.cli import main
from karat_scale.commands.plan.command import dry_run
from karat_scale.foundation.errors import UserError
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import load_recipe


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(recipe_file)


def changed(recipe: Recipe, section: str, **fields: object) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=fields)})


def test_a_right_recipe_is_right_on_four_ranks(recipe: Recipe) -> None:
    lines = list(dry_run(recipe, 4))
    assert "64 training and 28 validation images" in "\n".join(lines)
    assert "16 steps of 8 = 4 x 1 x 2" in "\n".join(lines)
    assert "4 logits" in lines[-1]


def test_classes_that_are_never_seen_are_told(recipe: Recipe) -> None:
    lines = list(dry_run(changed(recipe, "model", num_classes=5), 1))
    assert "classes: the data has 4 classes, but model.num_classes = 5" in "\n".join(lines)


@pytest.mark.parametrize(
    ("section", "fields", "world", "message"),
    [
        ("train", {}, 3, "does not divide over 3 ranks"),
        ("train", {}, 8, "in even parts"),
        ("train", {"micro_batch": 6}, 1, "use 4"),
        ("train", {"global_batch": 128}, 4, "fewer than train.global_batch"),
        ("model", {"num_classes": 2}, 1, "set model.num_classes=4"),
        ("deepspeed", {"config": "zero7"}, 1, "neither a file nor a shipped configuration"),
        ("data", {"train_split": "test"}, 1, "no samples of split 'test'"),
        ("model", {"name": "vit_tinny"}, 1, "timm has no such model"),
    ],
)
def test_mistakes_are_found(recipe: Recipe, section: str, fields: dict[str, object], world: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(dry_run(changed(recipe, section, **fields), world))


def test_the_command_reports_a_mistake_in_one_line(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe_file), "--gpus", "3", "--dry-run"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "does not divide over 3 ranks" in line
