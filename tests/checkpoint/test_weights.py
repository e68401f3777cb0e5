"""Whole weights: their description, and the snapshots of a run."""

import pytest
import torch

from karat_scale.checkpoint.weights import describe_weights, snapshot_steps
from karat_scale.models import create_model
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.weights_file import load_exported
from tests.small_engines import make_trainer, weights


def test_accuracies_belong_to_an_image_size_and_parts_of_training_hold_both_ends():
    recipe = load_recipe("cifar10_vit_tiny", ["train.ema_decay=0"])
    saved = {"step": 3, "evaluated_step": 3, "last_top1": 62.5, "last_top5": 99.0, "has_ema": False}
    assert describe_weights(recipe, {**saved, "image_size": 224}, "step-00000003", "raw")["top1"] == "62.5"
    assert "top1" not in describe_weights(recipe, {**saved, "image_size": 128}, "step-00000003", "raw")
    assert sorted(snapshot_steps(1000, 10)) == list(range(0, 1001, 100))
    assert sorted(snapshot_steps(10, 4)) == [0, 2, 5, 8, 10]
    assert snapshot_steps(2, 10) == {0, 1, 2}
    assert snapshot_steps(1000, 0) == frozenset()


@pytest.mark.parametrize("config", ["zero0", pytest.param("zero2_offload", marks=pytest.mark.slow), "zero3"])
def test_a_run_keeps_its_weights_and_a_resumed_one_takes_none_twice(small_recipe, world, config) -> None:
    own = (f"deepspeed.config={config}", "checkpoint.snapshots=4", "data.workers=0", "train.freeze=[patch_embed*]")
    recipe = small_recipe(*own, "train.epochs=1")
    directory = RunDirectory(recipe.run.dir)
    directory.store.root.mkdir(parents=True)
    directory.snapshots.mkdir()
    for step in (0, 2):
        (directory.snapshots / f"step-{step:08d}.safetensors").write_bytes(b"of a start that left no checkpoint")
    for _ in range(2):  # the second time all is there already
        trainer = make_trainer(recipe, world)
        first = weights(trainer.engine)
        trainer.resume()
        before = {path: path.stat().st_mtime_ns for path in directory.snapshots.glob("*")}
        trainer.run()
        trainer.task.close()
    files = sorted(directory.snapshots.iterdir())
    assert [path.name for path in files] == [f"step-{step:08d}.safetensors" for step in range(5)]
    assert before == {path: path.stat().st_mtime_ns for path in files}
    model = create_model(recipe.model, recipe.attention)
    load_exported(model, files[2])
    load_exported(model, files[0])
    assert all(map(torch.equal, model.parameters(), first))


def test_a_snapshot_that_cannot_be_written_is_a_warning(small_recipe, world, capsys) -> None:
    recipe = small_recipe("checkpoint.snapshots=1", "train.max_steps=1", "data.workers=0")
    directory = RunDirectory(recipe.run.dir)
    directory.store.root.mkdir(parents=True)
    directory.snapshots.write_text("in the way")
    trainer = make_trainer(recipe, world)
    trainer.run()
    trainer.task.close()
    assert "warning: snapshot step-00000000.safetensors not saved: File exists" in capsys.readouterr().out
