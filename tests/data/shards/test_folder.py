"""Tests of an ImageFolder as a source: labels, ids, and one line for each mistake."""

import numpy as np
import pytest
from torchvision.datasets.folder import IMG_EXTENSIONS

from karat_scale.data.plan import epoch_order
from karat_scale.data.shards.shards import IMAGE_SUFFIXES, FolderSplit
from karat_scale.foundation.errors import DataError


@pytest.fixture
def folder(tmp_path):
    def make(*files):
        for name in files:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())
        return tmp_path

    return make


def test_every_image_is_there_once_with_its_class(folder):
    root = folder(
        "train/bee/2.PNG", "train/bee/deep/1.jpg", "train/ant/9.jpeg", "train/ant/.x.jpg", "train/ant/notes.txt"
    )
    split = FolderSplit(root, "train", 2)
    assert IMAGE_SUFFIXES == IMG_EXTENSIONS
    assert split.classes == ("ant", "bee")
    listed = ["ant/9.jpeg", "bee/2.PNG", "bee/deep/1.jpg"]
    order = epoch_order(0, 0, 3)
    assert [split.locate(i) for i in range(3)] == [(listed[k], str(root / "train")) for k in order]
    assert [split.read(i).decode() for i in range(3)] == [f"train/{listed[k]}" for k in order]
    assert split.labels.tolist() == [[0, 1, 1][k] for k in order]
    assert split.labels.dtype == np.int32
    assert split.notice.startswith(f"1 file left out, {root / 'train/ant/notes.txt'}: no suffix of .jpg, ")
    assert FolderSplit(folder("train/z.jpg", "train/y.png", "train/.x.jpg"), "train", 2).notice.endswith(
        f"; 2 files left out, {root / 'train/y.png'} and others: in no class folder"
    )


def test_a_place_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere is not a directory; set it to a directory of"):
        FolderSplit(tmp_path / "nowhere", "train", 2)


def test_labels_follow_the_training_split_and_a_file_that_is_gone_is_named(folder):
    root = folder("train/ant/1.jpg", "train/bee/1.jpg", "train/cat/1.jpg", "val/bee/1.jpg", "val/cat/1.jpg")
    train = FolderSplit(root, "train", 3)
    val = FolderSplit(root, "val", 3, train.classes)
    assert sorted(val.labels.tolist()) == [1, 2]
    path, _ = val.locate(0)
    (root / "val" / path).unlink()
    with pytest.raises(DataError, match=rf"val/{path} cannot be read: No such file"):
        val.read(0)


def test_a_class_in_two_spellings_is_refused(folder):
    root = folder("train/caf\u00e9/1.jpg", "train/cafe\u0301/1.jpg")
    with pytest.raises(DataError, match=r"is spelled .* and .*; rename one like the other"):
        FolderSplit(root, "train", 2)


def test_the_folder_of_a_split_is_not_the_data_set(folder):
    root = folder("train/ant/1.jpg", "val/ant/1.jpg")
    with pytest.raises(DataError, match=rf"train/train does not exist; set data.path={root}, which has it"):
        FolderSplit(root / "train", "train", 2)


@pytest.mark.parametrize(
    ("split", "files", "message"),
    [
        ("train", [], "train does not exist; the folders there: none; correct the path"),
        ("train", ["training/ant/x.jpg"], "the folders there: training; set data.train_split to one"),
        (
            "train",
            [f"{name}/x.jpg" for name in "gfedcba"],
            "the folders there: a, b, c, d, e and 2 more; for a folder of classes, run karat prepare webdataset --src ",
        ),
        ("val", ["dataset.json"], "it has a dataset.json, so use data.backend=webdataset"),
        ("train", ["train/x.jpg"], "train has no class folders; put the images of each class into a folder"),
        ("train", ["train/ant/x.txt"], "train/ant/x.txt: no suffix of .jpg, "),
        ("train", [f"train/{name}/x.jpg" for name in "abc"], "has 3 classes, but model.num_classes = 2"),
        ("val", ["train/ant/1.jpg", "test/ant/1.jpg"], "val does not exist; the folders there: "),
        ("val", ["train/ant/1.jpg", "test/ant/1.jpg"], "; set data.val_split=test"),
        ("val", ["train/ant/1.jpg"], "there: train; make one by karat prepare webdataset --val-fraction 0.1"),
        ("val", ["train/ant/1.jpg", "new/ant/1.jpg"], "; set data.val_split to one of them, or make one by karat "),
        ("mine", ["train/ant/1.jpg", "val/ant/1.jpg"], "; set data.train_split or data.val_split to one of them"),
        ("trian", ["train/ant/1.jpg", "val/ant/1.jpg"], "; did you mean data.train_split=train?"),
        ("vall", ["train/ant/1.jpg", "val/ant/1.jpg"], "; did you mean data.val_split=val?"),
        ("val", ["val/ant/1.jpg", "val/wasp/1.jpg"], "val/wasp is a class that the training split does not have"),
    ],
)
def test_what_is_not_right_is_one_line(folder, split, files, message):
    with pytest.raises(DataError) as caught:
        FolderSplit(folder(*files), split, 2, ("ant", "bee") if "val/ant/1.jpg" in files else None)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
