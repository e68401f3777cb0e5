"""Other labels: ReaL's list by ImageNet's numbers, or an object by the images' names."""

import json
from pathlib import Path

import numpy as np
import pytest

from karat_scale.commands.evaluate.predictions import Predictions
from karat_scale.commands.evaluate.test_set import OtherLabels, imagenet_wnids, with_other_labels
from karat_scale.foundation.errors import DataError


def predicted(*labels: int) -> Predictions:
    count = len(labels)
    top = np.array(labels, dtype=np.int64)[:, None]
    ones = np.ones((count, 1), np.float32)
    return Predictions(np.arange(count), np.zeros(count, np.int64), top, ones, ones[:, 0], 0, ())


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_real_counts_any_of_its_labels_and_skips_images_without_one(tmp_path: Path) -> None:
    labels = OtherLabels(write(tmp_path / "real.json", [[5], [0, 7], [], [1]]), imagenet_wnids())
    keys = [f"n01440764/ILSVRC2012_val_{number:08}.JPEG" for number in (1, 2, 3, 4, 5)]
    assert [labels.of(key) for key in keys] == [{5}, {0, 7}, set(), {1}, None]
    top1, images, left_out = with_other_labels(predicted(5, 7, 3, 0, 1), keys, labels)
    assert (top1, images) == (pytest.approx(200 / 3), 3)
    assert left_out == "1 image without a label and 1 image that the file does not have"


def test_reals_numbers_mean_imagenets_classes_in_any_order_of_the_runs(tmp_path: Path) -> None:
    wnids = imagenet_wnids()
    labels = OtherLabels(write(tmp_path / "real.json", [[1, 900]]), ("goldfish", wnids[0]))
    assert labels.of("ILSVRC2012_val_00000001") == {0}  # 1 is the goldfish; 900 is no class of the run


def test_an_object_names_classes_or_numbers(tmp_path: Path) -> None:
    content = {"a": "cat", "b": ["dog", "cat"], "x/c": 1, "d": []}
    labels = OtherLabels(write(tmp_path / "own.json", content), ("cat", "dog"))
    assert [labels.of(key) for key in ("a", "dog/b.png", "x/c", "d", "e")] == [{0}, {0, 1}, {1}, set(), None]


def test_a_wrong_file_is_one_line(tmp_path: Path) -> None:
    for content, words in (("[", "it is no JSON"), ("{}", "JSON list or object"), ("[3]", "'3' should be a list")):
        file = tmp_path / "labels.json"
        file.write_text(content)
        with pytest.raises(DataError, match=words):
            OtherLabels(file, ("cat",))
    with pytest.raises(DataError, match="No such file"):
        OtherLabels(tmp_path / "none.json", ("cat",))
    labels = OtherLabels(write(tmp_path / "labels.json", {"a": "cat"}), ("cat",))
    with pytest.raises(DataError, match="has labels for none of the 1 image, such as 'z'"):
        with_other_labels(predicted(0), ["z"], labels)
