"""Tests of validation images held out from a source with one split, and of classes without an image."""

import numpy as np
import pytest

from karat_scale.data.prepare import make_webdataset
from karat_scale.data.prepare.making import held_out
from karat_scale.foundation.errors import DataError
from tests.data.prepare.images import contents, jpeg, write
from tests.data.prepare.making import make_shards, run, shard_samples
from tests.data.tars import tar_of

SIZES = {"ant": 20, "bee": 10, "cat": 5, "dog": 1}


@pytest.fixture
def source(tmp_path):
    """Write class folders of these sizes, without splits; return the folder and its files by key."""
    files = {}
    for name, size in SIZES.items():
        for number in range(size):
            files[f"{name}/{number}"] = jpeg(len(files), 12, 10)
            write(tmp_path / "src" / name / f"{number}.jpg", files[f"{name}/{number}"])
    return tmp_path / "src", files


def keys(out, split):
    return {key: data for key, _, data in shard_samples(out, split)}


@pytest.mark.parametrize("packed", [False, True])
def test_train_and_val_divide_the_images_by_class(source, tmp_path, packed):
    src, files = source
    record = make_shards(tar_of(src) if packed else src, tmp_path / "out", "--val-fraction", "0.2")
    assert record.splits["val"].per_class == [4, 2, 1, 0]
    assert record.splits["train"].per_class == [16, 8, 4, 1]
    train, val = keys(tmp_path / "out", "train"), keys(tmp_path / "out", "val")
    assert not train.keys() & val.keys()
    assert train | val == files
    assert [record.splits[name].made["val_fraction"] for name in ("train", "val")] == [0.2, 0.2]


def test_the_seed_draws_them_and_a_source_with_a_validation_split_is_refused(source, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert make_shards(source[0], tmp_path / name, "--val-count", "7", "--seed", seed).splits["val"].samples == 7
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert keys(tmp_path / "a", "val").keys() != keys(tmp_path / "c", "val").keys()
    for split in ("train", "test"):
        for number in range(3):
            write(tmp_path / "split" / split / "ant" / f"{number}.jpg", jpeg(number))
    with pytest.raises(DataError, match=r"split already has a validation split; remove --val-fraction$"):
        make_shards(tmp_path / "split", tmp_path / "out", "--val-fraction", "0.5")
    assert make_shards(tmp_path / "split/train", tmp_path / "out", "--val-count", "1").splits["val"].samples == 1


def test_a_source_without_a_validation_split_is_told_so(source, tmp_path, capsys):
    note = f"{source[0]}: it has no val split; to make one of a tenth of its images, add --val-fraction 0.1\n"
    for options, is_told in (
        ([], True),
        (["--dry-run"], True),
        (["--split", "train"], False),
        (["--val-count", "3"], False),
    ):
        run(make_webdataset, source[0], tmp_path / "-".join(["out", *options]), *options)
        assert (note in capsys.readouterr().out) == is_told


def test_any_count_is_shared_in_proportion():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(5), [100, 50, 25, 13, 7])).astype(np.int32)
    for count in (1, 10, 39, 100, 190):
        held = held_out(labels, None, count, seed=3)
        shares = np.bincount(labels[held], minlength=5)
        assert held.sum() == count
        assert (shares < np.bincount(labels)).all()
        assert np.abs(shares - count * np.bincount(labels) / len(labels)).max() < 1 or count == 190


def test_classes_of_one_image_have_none_for_validation():
    with pytest.raises(DataError, match=r"^--val-count 2: each class has one image alone, which is for training"):
        held_out(np.arange(5, dtype=np.int32), None, 2, seed=0)


def test_classes_without_an_image_are_named(source, tmp_path, capsys):
    src, _ = source
    (src / "eel").mkdir()
    write(src / "fox/notes.txt", b"no image")
    record = make_shards(src, tmp_path / "out", "--val-count", "3")
    said = capsys.readouterr().out
    assert "train: 2 of 6 classes have no image: eel, fox\n" in said
    assert record.splits["train"].empty_classes == ["eel", "fox"]
    assert set(record.splits["val"].empty_classes) >= {"dog", "eel", "fox"}
    # An empty folder of a tar is the same class.
    of_tar = make_shards(tar_of(src), tmp_path / "tar")
    assert (of_tar.splits["train"].empty_classes, of_tar.classes) == (["eel", "fox"], record.classes)
    for number in range(5):
        (src / f"class{number}").mkdir()
    make_shards(src, tmp_path / "many")
    named = "class0, class1, class2, class3, class4 and 2 others"
    assert f"train: 7 of 11 classes have no image: {named}\n" in capsys.readouterr().out
