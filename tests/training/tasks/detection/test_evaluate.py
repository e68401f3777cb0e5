from pathlib import Path

import pytest
import torch

from karat_scale.engine.distributed import ALONE
from karat_scale.training.tasks.detection.coco import CocoSplit, DetectionBatch, boxes_of
from karat_scale.training.tasks.detection.task import describe, evaluate, score


@pytest.fixture(scope="module")
def split(coco_set: Path) -> CocoSplit:
    return CocoSplit(str(coco_set), "val", "val.json", False)


def predictions(split: CocoSplit, sample: int, keep: int | None = None) -> dict[str, torch.Tensor]:
    """The truth, as a detector would say it."""
    labels, masks = split.objects(sample)
    return {
        "boxes": torch.from_numpy(boxes_of(masks[:keep])),
        "labels": torch.from_numpy(labels[:keep]),
        "scores": torch.full((len(labels[:keep]),), 0.9),
        "masks": torch.from_numpy(masks[:keep])[:, None].float(),
    }


def results(split: CocoSplit, samples: list[int], keep: int | None = None) -> list[dict]:
    return describe(DetectionBatch([], [], samples), [predictions(split, s, keep) for s in samples], split)


def test_the_truth_scores_100_and_nothing_0(split: CocoSplit) -> None:
    scores = score(split, results(split, list(range(len(split)))))
    assert (scores.box_ap, scores.mask_ap, scores.box_ap75, scores.images) == (100.0, 100.0, 100.0, len(split))
    assert score(split, []).mask_ap == 0.0
    assert score(split, []).detections == 0


def test_every_image_counts_whether_something_was_found_in_it_or_not(split: CocoSplit) -> None:
    some = score(split, results(split, list(range(len(split) // 2))))
    assert 30 < some.box_ap < 70
    assert some.images == len(split)


def test_a_wrong_label_and_a_wrong_mask_are_wrong(split: CocoSplit) -> None:
    everything = results(split, list(range(len(split))))
    shifted = [{**one, "category_id": {3: 7, 7: 8, 8: 3}[one["category_id"]]} for one in everything]
    assert score(split, shifted).box_ap < 5
    other = next(one["segmentation"] for one in everything)
    masked = score(split, [{**one, "segmentation": other} for one in everything])
    assert masked.box_ap == 100.0
    assert masked.mask_ap < 50


@pytest.mark.parametrize("batch", [5, 12])
def test_a_detector_is_asked_about_each_image_once(small, split: CocoSplit, batch: int) -> None:
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
