"""The official files of the small data sets as sources: pixels and labels come out as they went in."""

import functools
import gzip
import hashlib
import io
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN

from karat_scale.data.prepare.sources import SourceOptions, open_splits
from karat_scale.data.shards.shard_format import read_dataset_record
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.foundation.errors import DataError
from tests.data.prepare import official
from tests.data.prepare.images import jpeg, tar_bytes, write
from tests.data.prepare.making import beton_samples, make_betons, make_shards

ANY = SourceOptions(any_hash=True)
WRITERS = {
    "cifar10": functools.partial(official.write_cifar, fine=False),
    "cifar10 unpacked": functools.partial(official.write_cifar, fine=False, packed=False, by_python2=False),
    "cifar100": functools.partial(official.write_cifar, fine=True),
    "svhn": functools.partial(official.write_svhn, splits=("train", "test", "extra")),
    "stl10": official.write_stl10,
    "stl10 unpacked": functools.partial(official.write_stl10, packed=False),
}
CLASSES = {"cifar100": 100}


@pytest.mark.parametrize("name", list(WRITERS))
def test_raw_pixels_become_lossless_images_with_their_labels(tmp_path, name):
    made = WRITERS[name](tmp_path)
    found = open_splits(tmp_path, None, None, ANY)
    assert list(found) == ["train", "extra", "val"] if name == "svhn" else ["train", "val"]
    for split, source in found.items():
        images, labels = made["test" if split == "val" else split]
        assert len(source.classes) == CLASSES.get(name, 10)
        assert source.facts["encoding"] == "png"
        assert source.facts["not_as_published"]
        np.testing.assert_array_equal(source.labels, labels)
        for index, pixels in enumerate(images):
            image = Image.open(io.BytesIO(source.read(index)))
            assert image.format == "PNG"
            np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize(
    ("name", "data_set", "arguments"),
    [
        ("cifar10", CIFAR10, ({"train": True}, {"train": False})),
        ("cifar100", CIFAR100, ({"train": True}, {"train": False})),
        ("svhn", SVHN, ({"split": "train"}, {"split": "test"})),
        ("stl10", STL10, ({"split": "train"}, {"split": "test"})),
    ],
)
def test_torchvision_reads_the_same(tmp_path, monkeypatch, name, data_set, arguments):
    functools.partial(WRITERS[name], **({} if name == "svhn" else {"packed": False}))(tmp_path)
    monkeypatch.setattr(data_set, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    found = open_splits(tmp_path, None, None, ANY)
    for split, selected in zip(("train", "val"), arguments, strict=True):
        theirs = data_set(tmp_path, **selected)
        assert len(theirs) == len(found[split])
        for index, (image, label) in enumerate(theirs):
            assert label == found[split].labels[index]
            ours = Image.open(io.BytesIO(found[split].read(index)))
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(image))


def test_flowers_train_on_training_and_validation_images(tmp_path):
    images = official.write_flowers(tmp_path)
    found = open_splits(tmp_path, None, None, ANY)
    numbers = {split: [int(source.name(i)[10:15]) for i in range(len(source))] for split, source in found.items()}
    assert numbers == {"train": [1, 6, 7, 12, 2, 8], "val": [3, 4, 5, 9, 10, 11]}
    for split, source in found.items():
        assert source.labels.tolist() == [number - 1 for number in numbers[split]]
        assert [source.read(i) for i in range(len(source))] == [images[number] for number in numbers[split]]
    assert len(set(found["val"].classes)) == 102


def test_the_published_hash_is_asked_for_and_a_waiver_recorded(tmp_path, capsys):
    official.write_cifar(tmp_path / "src", fine=False)
    with pytest.raises(
        DataError,
        match=r"cifar-10-python.tar.gz: batches.meta has the MD5 \w+, and the published .*"
        r"fetch it again: python data_prep/fetch.py cifar10 --out \S+, or accept it with --any-",
    ):
        make_shards(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    make_shards(tmp_path / "src", tmp_path / "out", "--any-hash")
    assert "warning" in capsys.readouterr().err
    record = read_dataset_record(tmp_path / "out")
    assert record.classes == [f"class {n}" for n in range(10)]
    made = record.splits["train"].made
    assert made["encoding"] == "png"
    assert sorted(made["not_as_published"]) == sorted(["batches.meta", *official.CIFAR10_FILES])
    make_shards(tmp_path / "src", tmp_path / "out", "--any-hash", "--workers", "1")
    assert "are complete and correct" in capsys.readouterr().out
    make_shards(tmp_path / "src", tmp_path / "jpeg", "--any-hash", "--encoding", "jpeg")
    shards = ShardSplit(tmp_path / "jpeg", "train", 10, "hash")
    assert Image.open(io.BytesIO(shards.read(0))).format == "JPEG"


def test_betons_hold_the_pixels(tmp_path):
    pytest.importorskip("ffcv")
    images, labels = official.write_svhn(tmp_path / "src")["train"]
    make_betons(tmp_path / "src", tmp_path / "out", "--any-hash", "--split", "train")
    found = beton_samples(tmp_path / "out", "train", 10)
    assert {int(key): label for key, label, _ in found} == dict(enumerate(labels.tolist()))
    for key, _, data in found:
        assert np.abs(np.asarray(Image.open(io.BytesIO(data))).astype(int) - images[int(key)]).max() == 0


def test_files_with_the_published_hash_need_no_waiver(tmp_path, monkeypatch):
    official.write_cifar(tmp_path, fine=True, packed=False)
    hashes = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", hashes["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", hashes["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": hashes["meta"]})
    assert open_splits(tmp_path, "val", None)["val"].facts == {"not_as_published": [], "encoding": "png"}


class Attack:
    def __reduce__(self):
        return (Path.touch, (Path(sys.argv[0] or "x").with_name("must-not-exist"),))


def test_a_foreign_pickle_runs_no_code(tmp_path):
    official.write_cifar(tmp_path, fine=False, packed=False)
    victim = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    for attack in (Attack(), print, {b"data": np.array([Attack()], dtype=object)}):
        victim.write_bytes(pickle.dumps(attack, 2))
        with pytest.raises(DataError, match=r"data_batch_3 is not a file of CIFAR's Python version \(it needs \w+"):
            open_splits(tmp_path, "train", None, ANY)
    for damage in (b"", b"\x80\x02]q\x00.", pickle.dumps({b"data": 3})):
        victim.write_bytes(damage)
        with pytest.raises(DataError, match=r"data_batch_3 (is not a file|does not have the images)"):
            open_splits(tmp_path, "train", None, ANY)


@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_a_cut_archive_is_one_line(tmp_path, name):
    WRITERS[name](tmp_path)
    (archive,) = tmp_path.iterdir()
    whole = archive.read_bytes()
    for cut in (whole[: len(whole) // 2], b"", b"<html>not found</html>"):
        archive.write_bytes(cut)
        with pytest.raises(DataError, match=rf"{archive.name} .*; fetch it again: python data_prep/fetch.py {name}"):
            open_splits(tmp_path, None, None, ANY)


def test_a_missing_file_is_named(tmp_path):
    official.write_cifar(tmp_path / "a", fine=False, packed=False)
    (tmp_path / "a/cifar-10-batches-py/data_batch_4").unlink()
    with pytest.raises(DataError, match=r"cifar-10-batches-py has no data_batch_4; fetch it again"):
        open_splits(tmp_path / "a", None, None, ANY)
    official.write_files(tmp_path / "b", "stl10_binary.tar.gz", "stl10_binary", {"train_X.bin": b""})
    with pytest.raises(DataError, match=r"stl10_binary.tar.gz has no stl10_binary/class_names.txt; fetch it again"):
        open_splits(tmp_path / "b", None, None, ANY)

    official.write_flowers(tmp_path / "c")
    (tmp_path / "c/setid.mat").unlink()
    with pytest.raises(DataError, match=r"c has no setid.mat; fetch it again: python data_prep/fetch.py flowers102"):
        open_splits(tmp_path / "c", None, None, ANY)


def test_plain_names_that_cifar_has_too_are_no_cifar(tmp_path):
    write(tmp_path / "train/cat/1.jpg", jpeg(1))
    write(tmp_path / "test/cat/2.jpg", jpeg(2))
    write(tmp_path / "meta", b"about these cats")
    assert list(open_splits(tmp_path, None, None)) == ["train", "val"]


@pytest.mark.parametrize("damage", [b"", b"junk" * 100, "half"])
def test_a_damaged_mat_file_is_one_line(tmp_path, damage):
    official.write_svhn(tmp_path)
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage == "half" else damage)
    with pytest.raises(DataError, match=r"test_32x32.mat (is not a complete MATLAB file|has no array of integers 'X')"):
        open_splits(tmp_path, "val", None, ANY)


def test_labels_and_images_that_do_not_fit(tmp_path):
    official.write_stl10(tmp_path, packed=False)
    labels = tmp_path / "stl10_binary/train_y.bin"
    for wrong, part in ((b"\x01" * 9, "fetch both again"), (b"\x0b" * 10, "sample 0 has label 10, but there are 10")):
        labels.write_bytes(wrong)
        with pytest.raises(DataError, match=part):
            open_splits(tmp_path, "train", None, ANY)
    (tmp_path / "stl10_binary/train_X.bin").write_bytes(b"12345")
    with pytest.raises(DataError, match="not a whole number of images"):
        open_splits(tmp_path, "train", None, ANY)
    official.write_flowers(tmp_path / "flowers", 12)
    one = gzip.compress(tar_bytes({"jpg/image_00001.jpg": b"x"}))
    (tmp_path / "flowers/102flowers.tgz").write_bytes(one)
    with pytest.raises(DataError, match=r"setid.mat names jpg/image_00006.jpg, which has no image or label"):
        open_splits(tmp_path / "flowers", "train", None, ANY)
