"""A run says which runs its weights and its attention are from, however they came and however often it starts."""

from pathlib import Path

import pytest

from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.weights_file import run_behind
from paper.record import take_record
from tests.conftest import SMALL, karat_done, summary

QUICK = ("train.epochs=1", "train.max_steps=2", "schedule.warmup_epochs=0", "data.backend=synthetic")


def train(root: Path, name: str, *overrides: str) -> Path:
    recipe = root / "base.yaml"
    recipe.write_text("data: {synthetic_samples: 32}\nattention: {kind: karat}\n")
    run = root / name
    karat_done("train", str(recipe), *SMALL, *QUICK, f"run.name={name}", f"run.dir={run}", *overrides)
    return run


@pytest.mark.slow
def test_the_run_behind_the_weights_is_remembered(tmp_path) -> None:
    base = train(tmp_path, "base")
    assert summary(base)["lineage"] == {}
    known = {"name": "base", "recipe_sha256": take_record(str(base)).recipe_sha256}

    tuned = train(tmp_path, "tuned", f"init_from={base}")
    assert summary(tuned)["lineage"] == {"init_from": known}
    exported = tmp_path / "weights.safetensors"
    karat_done("export", str(base), "--out", str(exported), "--weights", "raw")
    for source in (exported, base / "checkpoints" / "best", base / "checkpoints" / "step-00000002"):
        assert run_behind(str(source)) == known
    base.rename(tmp_path / "elsewhere")
    train(tmp_path, "tuned", f"init_from={base}", "train.max_steps=3")
    assert summary(tuned)["steps"] == 3
    assert summary(tuned)["lineage"] == {"init_from": known}

    student = train(tmp_path, "student", "attention.kind=softmax", f"attention.transfer_from={tmp_path / 'elsewhere'}")
    (behind,) = summary(student)["lineage"].items()
    assert (behind[0], behind[1]["name"]) == ("attention.transfer_from", "base")


def test_weights_that_name_no_run_have_none(tmp_path) -> None:
    assert run_behind("") == run_behind("timm:vit_tiny_patch16_224") == {}
    (tmp_path / "weights.pth").touch()
    assert run_behind(str(tmp_path / "weights.pth")) == {}
    RunDirectory(tmp_path).begin(load_recipe("cifar10_vit_tiny", ["data.path=images"], Recipe))
    assert run_behind(str(tmp_path))["name"] == "cifar10_vit_tiny"
