"""Tests of annotations in COCO's format, and of the jitter of images and masks."""

import itertools
import json
import math
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from karat_scale.foundation.errors import DataError, RecipeError
from karat_scale.training.tasks.detection.coco import (
    CocoSplit,
    DetectionBatch,
    boxes_of,
    check_classes,
    draw_jitter,
    jitter_image,
    jitter_masks,
)
from karat_scale.training.tasks.detection.recipe import JitterConfig
from karat_scale.training.tasks.detection.task import describe, score

SQUARE = [10.0, 10.0, 20.0, 10.0, 20.0, 20.0, 10.0, 20.0]


@pytest.fixture
def own(tmp_path) -> dict:
    """Write two images, and return their annotations; the second image has only a crowd."""
    for name in ("a.jpg", "b.jpg"):
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / name)
    return {
        "images": [{"id": number, "file_name": f"{'ab'[number]}.jpg", "width": 40, "height": 30} for number in (0, 1)],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 9, "area": 100, "iscrowd": 0, "segmentation": [SQUARE]},
            {"id": 2, "image_id": 0, "category_id": 2, "area": 0, "iscrowd": 0, "segmentation": []},
            {"id": 3, "image_id": 1, "category_id": 2, "area": 50, "iscrowd": 1, "segmentation": [SQUARE]},
        ],
        "categories": [{"id": 9, "name": "square"}, {"id": 2, "name": "thing"}],
    }


def opened(root: Path, content: object, for_training: bool = True) -> CocoSplit:
    (root / "a.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return CocoSplit(str(root), ".", "a.json", for_training)


def objects(split: CocoSplit, sample: int) -> tuple[np.ndarray, np.ndarray]:
    labels, masks = split.objects(sample)
    return labels, np.stack([*masks])


def test_labels_follow_category_ids_and_what_cannot_be_learned_is_left_out(own, tmp_path) -> None:
    split = opened(tmp_path, own)
    assert split.classes == ("thing", "square")
    assert split.image_ids == [0]
    labels, masks = objects(split, 0)
    assert labels.tolist() == [2]
    assert masks.shape == (1, 30, 40)
    assert masks[0, 10:20, 10:20].all()
    assert masks.sum() == 100
    assert len(opened(tmp_path, own, for_training=False)) == 2


def test_what_is_left_out_is_told_and_other_images_have_another_identity(own, tmp_path) -> None:
    split = opened(tmp_path, own)
    flat = "1 annotation left out: no area above 0"
    assert split.notices == ["1 image of 2 left out: no object to learn", flat]
    assert opened(tmp_path, own, for_training=False).notices == [flat]
    strangers = [{**own["annotations"][0], "id": number, "image_id": "0"} for number in (4, 5)]
    more = opened(tmp_path, {**own, "annotations": [*own["annotations"], *strangers]})
    assert more.notices[2:] == ["2 annotations left out: no image has the id '0'"]
    assert more.identity == split.identity
    renamed = [{**own["images"][0], "file_name": "c.jpg"}, own["images"][1]]
    assert opened(tmp_path, {**own, "images": renamed}).identity != split.identity


def test_an_evaluation_has_what_exporters_leave_out(own, tmp_path) -> None:
    """An evaluation adds missing areas, boxes and crowd flags, drops objects without area, and numbers none 0."""
    square, nothing, crowd = own["annotations"]
    del square["area"]
    square |= {"id": 0, "bbox": [], "iscrowd": None}
    content = {**own, "annotations": [square, nothing, crowd, {**square, "image_id": 7}]}
    split = opened(tmp_path, content, for_training=False)
    labels, masks = objects(split, 0)
    found = {"boxes": boxes_of(masks), "labels": labels, "scores": np.ones(1, np.float32), "masks": masks[:, None]}
    truth = {key: torch.from_numpy(value) for key, value in found.items()}
    scores = score(split, describe(DetectionBatch([], [], [0]), [truth], split))
    assert (scores.box_ap, scores.mask_ap) == (100.0, 100.0)
    assert sorted(split.index.anns) == [1, 2]


def test_polygons_and_run_lengths_are_one_mask(own, tmp_path) -> None:
    polygon = own["annotations"][0]
    _, masks = objects(opened(tmp_path, own), 0)
    columns = masks[0].T.ravel().tolist()
    changes = [0, *(i for i in range(1, 1200) if columns[i] != columns[i - 1]), 1200]
    runs = {"size": [30, 40], "counts": [b - a for a, b in itertools.pairwise(changes)]}
    _, same = objects(opened(tmp_path, {**own, "annotations": [{**polygon, "segmentation": runs}]}), 0)
    assert np.array_equal(same, masks)


def test_masks_of_the_made_set_are_exact(coco_set) -> None:
    split = CocoSplit(str(coco_set), "train", "train.json", False)
    for sample in range(5):
        image, (labels, masks) = split.read(sample), objects(split, sample)
        assert masks.shape == (len(labels), image.height, image.width)
        assert masks.sum(0).max() == 1  # the one in front hides the one behind
        areas = [annotation["area"] for annotation in split.index.imgToAnns[split.image_ids[sample]]]
        assert masks.sum((1, 2)).tolist() == areas


def read(root: Path, content: object, for_training: bool) -> None:
    split = opened(root, content, for_training)
    split.read(0)
    objects(split, 0)


def test_bad_files_are_one_line_that_names_them(own, tmp_path, monkeypatch) -> None:
    def refused(content: object, for_training: bool = True) -> str:
        with pytest.raises(DataError) as caught:
            read(tmp_path, content, for_training)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    first, image = own["annotations"][0], own["images"][0]
    unreadable = "annotation 1 has no readable segmentation or box"
    boxes_alone = "annotation 1 has no segmentation, and Mask R-CNN learns masks, not boxes alone; add it"
    wrong = {"size": [3, 4], "counts": [2, 10]}
    runs = [{"size": [30, 40], "counts": counts} for counts in ([310, 100, 700], [310, 100, 791], "?")]
    for content, said in (
        ('{"images": [', "a.json is not JSON"),
        ("[1, 2]", "a.json is not in COCO's format"),
        ({**own, "categories": []}, "it has no categories"),
        ({**own, "annotations": own["annotations"][1:]}, "has no image with objects"),
        *(({**own, "annotations": [{**first, "segmentation": bad}]}, unreadable) for bad in ([[1.0]], wrong, *runs)),
        ({**own, "images": [{"id": 0, "width": 40, "height": 30}]}, "image 0 has no file_name"),
        *(
            ({**own, "images": [{**image, key: value}]}, f"image 0 has {key} = {value!r}, not {what}")
            for key, value, what in (("file_name", 3, "a name"), ("width", "40", "pixels"), ("height", None, "pixels"))
        ),
        *(
            ({**own, "annotations": [{**first, "area": area}]}, f"annotation 1 has area = {area!r}, not a number")
            for area in (None, "big", math.nan)
        ),
        *(
            ({**own, "annotations": [{**first, key: value}]}, f"annotation 1 has {key} = {value!r}, not {what}")
            for key, value, what in (("category_id", "9", "the id of a category"), ("iscrowd", "0", "0 or 1"))
        ),
        *(({**own, key: 2 * own[key][:1]}, f"two of its {key} have the id") for key in ("images", "categories")),
        ({**own, "images": [image, {**image, "id": "one"}]}, "a.json is not in COCO's format"),
        ({**own, "images": [{**image, "width": 41}]}, "a.jpg is 40 x 30, but a.json says 41 x 30; use the annotated"),
        ({**own, "images": [{**image, "width": 30, "height": 40}]}, "says 30 x 40; turn its pixels as its EXIF says"),
    ):
        assert said in refused(content)
    # An evaluation checks all of them at its start: pycocotools would hang, or not name the wrong one.
    for bad in ([], None, ""):
        for for_training in (True, False):
            assert boxes_alone in refused({**own, "annotations": [{**first, "segmentation": bad}]}, for_training)
    for bad in ([[1.0]], {"counts": "?"}, *runs):
        whole = {**first, "bbox": [10, 10, 10, 10], "segmentation": bad}
        assert unreadable in refused({**own, "annotations": [whole]}, for_training=False)
    for bad in ([1, 2, 3], [1, 2, 3, -4], [1, 2, 3, math.inf], ["left", 2, 3, 4]):
        assert unreadable in refused({**own, "annotations": [{**first, "bbox": bad}]}, for_training=False)
    assert "has no image with objects" in refused({**own, "annotations": own["annotations"][1:]}, for_training=False)
    with pytest.raises(DataError, match=r"none.json cannot be read: No such file"):
        CocoSplit(str(tmp_path), ".", "none.json", True)
    split = opened(tmp_path, own)
    check_classes(split, 2)
    for classes in (1, 80):
        with pytest.raises(DataError, match=rf"has 2 categories, but model.num_classes = {classes}; set model.num_cl"):
            check_classes(split, classes)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:200])
    assert "a.jpg cannot be decoded" in refused(own)
    (tmp_path / "a.jpg").unlink()
    assert "a.jpg cannot be read: No such file" in refused(own)
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(RecipeError, match=r"pip install -e '\.\[detection\]'"):
        opened(tmp_path, own)


SIDES = st.integers(5, 90)


@settings(max_examples=60)
@given(st.integers(0, 2**64 - 1), SIDES, SIDES, st.sampled_from([32, 64]))
def test_image_and_masks_go_together_and_fit(seed, width, height, image_size) -> None:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2 + 1, width // 3 :] = 1
    jitter = draw_jitter(seed, width, height, image_size, JitterConfig(scale=(0.5, 2.0)))
    assert jitter == draw_jitter(seed, width, height, image_size, JitterConfig(scale=(0.5, 2.0)))
    assert 1 <= min(jitter.size) <= max(jitter.size) <= image_size
    assert 0 <= jitter.box[0] < jitter.box[2] <= width + 1e-9
    image = jitter_image(Image.fromarray(255 * mask).convert("RGB"), jitter)
    (moved,) = jitter_masks(mask[None], jitter)
    assert image.shape == (3, *moved.shape) == (3, jitter.size[1], jitter.size[0])
    # Away from its edges, where bilinear and nearest differ, the object is where its mask is.
    decided = (image[0] < 5) | (image[0] > 250)
    assert np.array_equal(image[0][decided] > 127, moved[decided] == 1)


def test_the_scale_is_of_what_fits() -> None:
    whole = draw_jitter(0, 100, 50, 64, JitterConfig(scale=(1.0, 1.0), hflip=0.0))
    assert (whole.box, whole.size, whole.flip) == ((0.0, 0.0, 100.0, 50.0), (64, 32), False)
    small = draw_jitter(0, 100, 50, 64, JitterConfig(scale=(0.5, 0.5), hflip=1.0))
    assert (small.box, small.size, small.flip) == ((0.0, 0.0, 100.0, 50.0), (32, 16), True)
    crop = draw_jitter(0, 100, 50, 64, JitterConfig(scale=(2.0, 2.0)))
    assert crop.size == (64, 64)
    assert (round(crop.box[2] - crop.box[0], 6), round(crop.box[3] - crop.box[1], 6)) == (50.0, 50.0)


def test_boxes_just_fill_masks() -> None:
    masks = np.zeros((2, 6, 8), np.uint8)
    masks[0, 2:4, 1:6] = 1
    masks[1, 5, 7] = 1
    assert boxes_of(masks).tolist() == [[1, 2, 6, 4], [7, 5, 8, 6]]
    assert boxes_of(masks[:0]).shape == (0, 4)


def test_masks_of_a_large_photograph_are_made_one_by_one(own, tmp_path) -> None:
    side, count = 3000, 40
    image = {**own["images"][0], "width": side, "height": side}
    content = {**own, "images": [image], "annotations": count * own["annotations"][:1]}
    split = opened(tmp_path, content)
    jitter = draw_jitter(0, side, side, 32, JitterConfig())
    tracemalloc.start()
    masks = jitter_masks(split.objects(0)[1], jitter)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(masks) == count
    assert peak < 10 * side * side  # bytes; all 40 masks at once take four times that
