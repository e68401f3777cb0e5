"""A detector under the trainer: saving beside training, steps that are not finite, and COCO's scores."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from karat_scale.engine.distributed import ALONE
from karat_scale.foundation.errors import DataError, RunDirectoryError, UserError
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.tasks.detection.coco import CocoSplit, DetectionBatch, boxes_of
from karat_scale.training.tasks.detection.recipe import DetectionRecipe
from karat_scale.training.tasks.detection.task import DetectionState, DetectionTask, describe, evaluate, score
from karat_scale.training.trainer import Trainer
from tests.small_engines import equal, make_trainer

Small = Callable[..., DetectionRecipe]


@pytest.fixture
def begin(world) -> Iterator[Callable[[DetectionRecipe], Trainer]]:
    """Yield a function that makes a recipe's trainer; all trainers are closed after the test."""
    made: list[Trainer] = []

    def make(recipe: DetectionRecipe) -> Trainer:
        made.append(make_trainer(recipe, world, task_type=DetectionTask))
        return made[-1]

    yield make
    for trainer in made:
        trainer.task.close()


def learned(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return copies of the weights and of AdamW's states."""
    engine = trainer.engine.deepspeed
    both = engine.module.state_dict(), engine.basic_optimizer.state_dict()["state"]
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), both)


def take_steps(trainer: Trainer, count: int) -> None:
    batches = trainer.feed(trainer.state.step + count)
    for _ in range(count):
        trainer.step(trainer.micro_batches(batches))


def test_a_save_beside_training_holds_the_state_of_its_step(small, begin) -> None:
    trainer = begin(small(train={"epochs": 1}))
    take_steps(trainer, 2)
    saved = learned(trainer)
    assert trainer.checkpoints.save(trainer.state, wait=False)
    assert trainer.checkpoints.is_under_way
    take_steps(trainer, 1)
    assert not equal(learned(trainer), saved)
    assert trainer.checkpoints.finish()
    assert trainer.checkpoints.store.pointed("latest") == "step-00000002"
    resumed = begin(small(train={"epochs": 1}))
    assert resumed.checkpoints.load().step == 2
    assert equal(learned(resumed), saved)


def test_a_step_that_is_not_finite_is_skipped_and_its_samples_are_noted(small, begin, monkeypatch, capsys) -> None:
    trainer = begin(small())
    take_steps(trainer, 1)
    losses = trainer.task.losses

    def spoiled(forward: Any, batch: Any) -> dict[str, torch.Tensor]:
        found = losses(forward, batch)
        return {**found, "loss": found["loss"] + math.nan}

    monkeypatch.setattr(trainer.task, "losses", spoiled)
    before = learned(trainer)
    take_steps(trainer, 1)
    assert equal(learned(trainer), before)
    said = capsys.readouterr().out
    assert "warning: step 2 has a loss or gradients that are not finite; skipped; " in said
    assert "incidents/step-00000002.json has its samples" in said  # karat replay reads no detectors


def test_checkpoints_of_the_other_kind_are_refused(small, small_recipe, begin, world, tmp_path) -> None:
    detector = begin(small())
    assert detector.checkpoints.save(DetectionState(step=1, samples=4))
    classifier = make_trainer(small_recipe("data.workers=0", f"run.dir={tmp_path / 'classifier'}"), world)
    with pytest.raises(RunDirectoryError, match=r"is of a run that trains detection, this one trains classification"):
        classifier.checkpoints.load(str(tmp_path / "run"))
    classifier.task.close()


@pytest.mark.parametrize(
    "sections",
    [
        {"deepspeed": {"config": "zero3"}, "train": {"recompute": {"policy": "all"}}},
        pytest.param({"deepspeed": {"config": "zero1"}}, marks=pytest.mark.slow),
        pytest.param({"deepspeed": {"config": "zero2_offload", "cpu_adam": "torch"}}, marks=pytest.mark.slow),
    ],
    ids=["zero3 and recompute", "zero1", "zero2_offload"],
)
def test_losses_are_the_same_at_each_stage_and_recomputed(small, begin, tmp_path, sections) -> None:
    def losses(name: str, **changes: dict[str, object]) -> list[float]:
        recipe = small(run={"dir": str(tmp_path / name)}, **changes)
        trainer, found = begin(recipe), []
        task_losses = trainer.task.losses

        def noted(forward: Any, batch: Any) -> dict[str, torch.Tensor]:
            made = task_losses(forward, batch)
            found.append(float(made["loss"].detach()))
            return made

        trainer.task.losses = noted
        take_steps(trainer, 3)
        return found

    assert losses("other", **sections) == pytest.approx(losses("plain"), rel=1e-5)


def test_a_detector_says_which_run_its_weights_are_from(small, world, tmp_path) -> None:
    classifier = tmp_path / "classifier"
    classifier.mkdir()
    RunDirectory(classifier).begin(load_recipe("imagenet_vit_base", ["data.path=images"]))
    for source, name in ((str(classifier), "imagenet_vit_base"), ("", None)):
        task = DetectionTask(small().changed(init_from=source), world, None)
        lineage = task.facts(task.begin())["lineage"]
        assert lineage.get("init_from", {}).get("name") == name


def test_splits_whose_labels_differ_are_refused(small, coco_set, world, tmp_path) -> None:
    for name in ("train", "val", "val.json"):
        (tmp_path / name).symlink_to(coco_set / name)
    train = json.loads((coco_set / "train.json").read_text())
    train["categories"][0]["name"] = "dog"
    (tmp_path / "train.json").write_text(json.dumps(train))
    task = DetectionTask(small(data={"path": str(tmp_path)}), world, None)
    with pytest.raises(DataError, match=r"category 1 by id is dog in .*train.json and cat in .*val.json; give"):
        task.plan()


@pytest.fixture(scope="module")
def split(coco_set) -> CocoSplit:
    return CocoSplit(str(coco_set), "val", "val.json", False)


def predictions(split: CocoSplit, sample: int, keep: int | None = None) -> dict[str, torch.Tensor]:
    """Return the first `keep` objects of an image, by default all, as if a detector had predicted them."""
    labels, made = split.objects(sample)
    masks = np.stack([*made])
    return {
        "boxes": torch.from_numpy(boxes_of(masks[:keep])),
        "labels": torch.from_numpy(labels[:keep]),
        "scores": torch.full((len(labels[:keep]),), 0.9),
        "masks": torch.from_numpy(masks[:keep])[:, None].float(),
    }


def results(split: CocoSplit, samples: list[int], keep: int | None = None) -> list[dict]:
    return describe(DetectionBatch([], [], samples), [predictions(split, s, keep) for s in samples], split)


def test_the_truth_scores_100_and_nothing_0(split) -> None:
    scores = score(split, results(split, list(range(len(split)))))
    assert (scores.box_ap, scores.mask_ap, scores.box_ap75, scores.images) == (100.0, 100.0, 100.0, len(split))
    assert score(split, []).mask_ap == 0.0
    assert score(split, []).detections == 0


def test_every_image_counts_whether_something_was_found_in_it_or_not(split) -> None:
    some = score(split, results(split, list(range(len(split) // 2))))
    assert 30 < some.box_ap < 70
    assert some.images == len(split)


def test_a_wrong_label_and_a_wrong_mask_are_wrong(split) -> None:
    everything = results(split, list(range(len(split))))
    shifted = [{**one, "category_id": {3: 7, 7: 8, 8: 3}[one["category_id"]]} for one in everything]
    assert score(split, shifted).box_ap < 5
    other = next(one["segmentation"] for one in everything)
    masked = score(split, [{**one, "segmentation": other} for one in everything])
    assert masked.box_ap == 100.0
    assert masked.mask_ap < 50


@pytest.mark.parametrize("batch", [5, 12])
def test_a_detector_is_asked_about_each_image_once(small, split, batch) -> None:
    asked = []

    class Knowing(torch.nn.Module):
        def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            assert all(image.shape == (3, 72, 96) and float(image.max()) <= 1 for image in images)
            first = len(asked)
            asked.extend(images)
            return [predictions(split, first + number) for number in range(len(images))]

    heard = []
    recipe = small(train={"eval_batch": batch})
    scores = evaluate(Knowing(), split, recipe, ALONE, lambda done, total: heard.append((done, total)))
    assert scores.mask_ap == 100.0
    assert len(asked) == len(split)
    assert heard == [(number, -(-12 // batch)) for number in range(1, -(-12 // batch) + 1)]


def test_an_evaluation_that_runs_out_of_memory_is_one_line(small, split) -> None:
    with pytest.raises(UserError, match=r"^out of memory: .*; lower train\.eval_batch \(now 8\) or detector\.detec"):
        evaluate(lambda images: torch.empty(2**52), split, small(), ALONE, print)
