"""Any layout of labelled images is a test set of a run."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from karat_scale.commands.evaluate.predictions import Predictions
from karat_scale.commands.evaluate.test_set import (
    OtherLabels,
    imagenet_wnids,
    match_classes,
    open_test_set,
    with_other_labels,
)
from karat_scale.data.shards import shard_format
from karat_scale.data.shards.remote import RemoteUse
from karat_scale.foundation.errors import DataError
from tests.conftest import CLASSES, VAL_PER_CLASS, karat_here, make_image_folder
from tests.data.betons import need_ffcv
from tests.data.conftest import exif
from tests.data.prepare.images import jpeg
from tests.data.prepare.making import make_betons, make_shards

OURS = tuple(f"class{label}" for label in range(CLASSES))


def labels_by_content(directory: Path, split: str = "", classes: tuple[str, ...] = OURS) -> dict[bytes, int]:
    test_set = open_test_set(directory, split, classes, RemoteUse())
    try:
        return {test_set.read(sample_id): int(test_set.labels[sample_id]) for sample_id in range(len(test_set))}
    finally:
        test_set.close()


def test_folders_shards_and_indexed_tars_hold_the_same(image_folder: Path, shards: Path, tmp_path: Path) -> None:
    whole = labels_by_content(image_folder)
    assert len(whole) == CLASSES * VAL_PER_CLASS
    assert labels_by_content(image_folder / "val") == whole
    assert labels_by_content(shards) == whole
    tars = tmp_path / "tars"
    tars.mkdir()
    for tar in shards.glob("val-*.tar"):
        shutil.copy(tar, tars)
    names = tmp_path / "classes.txt"
    names.write_text("\n".join(OURS))
    assert karat_here("index", str(tars), "--split", "val=*.tar", "--classes", str(names)) == 0
    assert labels_by_content(tars) == whole


def turned_pictures(root: Path, names: tuple[str, ...]) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / "photo.jpg").write_bytes(jpeg(number, exif=exif(6)))
        (root / name / "plain.jpg").write_bytes(jpeg(10 + number))
    return root


def test_photographs_in_folders_are_turned_as_in_shards_unless_they_are_the_runs_own(tmp_path: Path) -> None:
    folder = turned_pictures(tmp_path / "val", OURS)
    make_shards(folder, tmp_path / "shards", "--split", "val", "--workers", "1")
    as_stored = {path.read_bytes() for path in folder.rglob("*.jpg")}
    turned = labels_by_content(folder)
    assert turned == labels_by_content(tmp_path / "shards")
    assert len(turned.keys() & as_stored) == CLASSES
    own = open_test_set(folder, "", OURS, RemoteUse(), as_stored=True)
    assert {own.read(sample_id) for sample_id in range(len(own))} == as_stored


def test_photographs_of_imagenets_classes_are_not_turned(tmp_path: Path) -> None:
    wnids = ("n01440764", "n01443537")
    folder = turned_pictures(tmp_path / "val", wnids)
    assert labels_by_content(folder, classes=wnids).keys() == {path.read_bytes() for path in folder.rglob("*.jpg")}
    numbered = turned_pictures(tmp_path / "v2", ("0", "1"))  # as ImageNet-V2
    assert labels_by_content(numbered, classes=wnids).keys() == {path.read_bytes() for path in numbered.rglob("*.jpg")}


def test_labels_are_the_runs_in_any_order_of_its_classes(image_folder: Path) -> None:
    there = labels_by_content(image_folder, classes=("class3", "other", "class0", "class1", "class2"))
    here = labels_by_content(image_folder)
    assert {there[content]: label for content, label in here.items()} == {2: 0, 3: 1, 4: 2, 0: 3}


def test_classes_that_the_run_lacks_are_named_and_left_out(image_folder: Path) -> None:
    test_set = open_test_set(image_folder, "", ("class2", "class0", "owl"), RemoteUse())
    assert test_set.unmatched == ("class1", "class3")
    assert test_set.left_out == 2 * VAL_PER_CLASS
    assert test_set.notice == "2 classes that the run does not have, with 14 images, left out: class1, class3"
    assert test_set.among.tolist() == [0, 1]
    assert np.bincount(test_set.labels).tolist() == [VAL_PER_CLASS, VAL_PER_CLASS]
    assert len(test_set.keys()) == len(test_set)
    assert all(test_set.locate(sample_id)[0] == test_set.keys()[sample_id] for sample_id in range(len(test_set)))


def test_a_split_is_chosen_or_named(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "data", {"train": 1, "test": 2})
    assert len(labels_by_content(tmp_path / "data")) == 2 * CLASSES
    assert len(labels_by_content(tmp_path / "data", "train")) == CLASSES


def test_files_without_an_images_suffix_are_told(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "data", {"val": 1})
    (tmp_path / "data/val/class0/a.gif").touch()
    said = f"1 file left out, {tmp_path / 'data/val/class0/a.gif'}: no suffix of .jpg"
    assert open_test_set(tmp_path / "data", "", OURS, RemoteUse()).notice.startswith(said)
    notice = open_test_set(tmp_path / "data", "", OURS[1:], RemoteUse()).notice
    assert notice.startswith(f"1 class that the run does not have, with 1 image, left out: {OURS[0]}; {said}")


def test_what_is_no_test_set_is_one_line(tmp_path: Path, image_folder: Path) -> None:
    with pytest.raises(DataError, match=r"is not a test set: .*; correct the path"):
        open_test_set(tmp_path, "", OURS, RemoteUse())
    with pytest.raises(DataError, match="knows none of its 4 classes; the first ones are class0, class1, class2"):
        open_test_set(image_folder, "", ("owl", "cat"), RemoteUse())
    shutil.copytree(image_folder / "val" / "class0", tmp_path / "class0")
    (tmp_path / "owl").mkdir()
    with pytest.raises(DataError, match="the run has no class of its images"):
        open_test_set(tmp_path, "", ("owl", "cat"), RemoteUse())
    with pytest.raises(DataError, match="has no split 'test'; the splits there: train, val"):
        open_test_set(image_folder, "test", OURS, RemoteUse())


def test_the_keys_of_betons_are_those_of_the_shards_and_need_one_reading(image_folder, tmp_path, monkeypatch) -> None:
    need_ffcv()
    make_betons(image_folder, tmp_path / "betons", "--split", "val")
    make_shards(image_folder, tmp_path / "shards", "--split", "val", "--workers", "1")
    betons, shards = (open_test_set(tmp_path / name, "", OURS, RemoteUse()) for name in ("betons", "shards"))
    read, real = [], shard_format.read_column
    monkeypatch.setattr(shard_format, "read_column", lambda *arguments: read.append(1) or real(*arguments))
    keys = betons.keys()
    assert len(read) == 1
    assert keys == shards.keys() == [betons.locate(sample_id)[0] for sample_id in range(len(betons))]


@pytest.mark.parametrize(
    ("theirs", "ours", "matched"),
    [
        # Names match without case and with underscores, equal ones before similar ones.
        (["Tree_Frog", "cat", "zebu"], ["cat", "tree frog", "dog"], [1, 0, None]),
        (["A", "a", "b"], ["A", "a", "b"], [0, 1, 2]),
        (["crane", "crane"], ["crane", "crane"], [0, 1]),
        (["a", "A"], ["A", "a", "b"], [1, 0]),
        (["A", "a", "b"], ["a", "b"], [None, 0, 1]),
        (["x_1", "b"], ["x 1", "X 1", "b"], [None, 2]),
        # WordNet's ids and the names of ImageNet stand for each other; a crane is a bird and a machine.
        (["n01440764", "n01443537"], ["goldfish", "tench"], [1, 0]),
        (["goldfish, Carassius auratus", "wagon"], ["n01440764", "n01443537"], [1, None]),
        (["tench, Tinca tinca"], ["n01440764"], [0]),
        (["crane"], imagenet_wnids(), [None]),
        # Numbers are labels only if all names are numbers and ours are not.
        (["0", "3", "2"], ["a", "b", "c"], [0, None, 2]),
        (["0", "ten"], ["a", "b", "c"], [None, None]),
        (["10", "2", "3"], ["2", "10"], [1, 0, None]),
    ],
)
def test_classes_are_matched_by_name_id_or_number(theirs, ours, matched) -> None:
    assert match_classes(theirs, ours) == matched
    assert len(imagenet_wnids()) == 1000
    assert imagenet_wnids() == sorted(imagenet_wnids())  # as ImageNet's labels are


def predicted(*labels: int) -> Predictions:
    count = len(labels)
    top = np.array(labels, dtype=np.int64)[:, None]
    ones = np.ones((count, 1), np.float32)
    return Predictions(np.arange(count), np.zeros(count, np.int64), top, ones, ones[:, 0], 0, ())


@pytest.fixture
def labels_of(tmp_path: Path) -> Callable[..., OtherLabels]:
    """Return a function that writes a file of labels and reads it with the names of classes."""

    def make(content: object, classes: Sequence[str]) -> OtherLabels:
        (tmp_path / "labels.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return OtherLabels(tmp_path / "labels.json", classes)

    return make


def test_real_counts_any_of_its_labels_and_skips_images_without_one(labels_of) -> None:
    labels = labels_of([[5], [0, 7], [], [1]], imagenet_wnids())
    keys = [f"n01440764/ILSVRC2012_val_{number:08}.JPEG" for number in (1, 2, 3, 4, 5)]
    assert [labels.of(key) for key in keys] == [{5}, {0, 7}, set(), {1}, None]
    top1, images, left_out = with_other_labels(predicted(5, 7, 3, 0, 1), keys, labels)
    assert (top1, images) == (pytest.approx(200 / 3), 3)
    assert left_out == "1 image without a label and 1 image that the file does not have"

    of_another_order = labels_of([[1, 900]], ("goldfish", imagenet_wnids()[0]))
    assert of_another_order.of("ILSVRC2012_val_00000001") == {0}  # 1 is the goldfish; 900 is no class of the run


def test_an_object_names_classes_or_numbers(labels_of) -> None:
    labels = labels_of({"a": "cat", "b": ["dog", "cat"], "x/c": 1, "d": []}, ("cat", "dog"))
    assert [labels.of(key) for key in ("a", "dog/b.png", "x/c", "d", "e")] == [{0}, {0, 1}, {1}, set(), None]


def test_labels_that_the_run_does_not_have_are_told(labels_of) -> None:
    labels = labels_of({"a": ["cat", "dgo"], "b": "dgo", "c": 7}, ("cat", "dog"))
    *_, left_out = with_other_labels(predicted(0, 1), ["a", "b"], labels)
    assert left_out == "1 image without a label and 3 labels that the run does not have, such as 'dgo'"
    with pytest.raises(DataError, match="none of the 1 image, such as 'b'; it has 3 labels that the run does not have"):
        with_other_labels(predicted(0), ["b"], labels)


def test_a_wrong_file_is_one_line(labels_of, tmp_path: Path) -> None:
    for content, words in (("[", "it is not JSON"), ("{}", "JSON list or object"), ("[3]", "'3' should be a list")):
        with pytest.raises(DataError, match=words):
            labels_of(content, ("cat",))
    with pytest.raises(DataError, match="No such file"):
        OtherLabels(tmp_path / "none.json", ("cat",))
    with pytest.raises(DataError, match="has labels for none of the 1 image, such as 'z'"):
        with_other_labels(predicted(0), ["z"], labels_of({"a": "cat"}, ("cat",)))
