"""The official files of the small data sets as sources: pixels and labels come out as they went in."""

import functools
import gzip
import hashlib
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN, Flowers102

from karat_scale.data.prepare.sources import SourceOptions, open_splits
from karat_scale.data.prepare.sources.small import FOLDER, KNOWN_TO_TORCHVISION
from karat_scale.foundation.errors import DataError
from tests.data.prepare import official
from tests.data.prepare.images import jpeg, write
from tests.data.prepare.making import make_shards, shard_samples
from tests.data.tars import tar_bytes

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


def test_two_data_sets_in_one_directory_are_refused(tmp_path):
    for fine in (False, True):
        official.write_cifar(tmp_path, fine=fine)
    with pytest.raises(DataError, match="has the official files of several data sets; give each a directory"):
        open_splits(tmp_path, None, None, ANY)


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
        r"fetch it again: karat prepare fetch cifar10 --out \S+, or accept it with --any-",
    ):
        make_shards(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    record = make_shards(tmp_path / "src", tmp_path / "out", "--any-hash")
    assert "warning" in capsys.readouterr().err
    assert record.classes == [f"class {n}" for n in range(10)]
    made = record.splits["train"].made
    assert made["encoding"] == "png"
    assert sorted(made["not_as_published"]) == sorted(["batches.meta", *official.CIFAR10_FILES])
    make_shards(tmp_path / "src", tmp_path / "out", "--any-hash")
    assert "are complete and correct" in capsys.readouterr().out
    make_shards(tmp_path / "src", tmp_path / "jpeg", "--any-hash", "--encoding", "jpeg")
    assert {Image.open(io.BytesIO(data)).format for _, _, data in shard_samples(tmp_path / "jpeg")} == {"JPEG"}


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


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def holding(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


FOREIGN = [pickle.dumps(it, 2) for it in (Attack(), print, {b"data": np.array([Attack()], dtype=object)})]
BATCH, IDX = "cifar-10-batches-py/data_batch_3", "train-images-idx3-ubyte.gz"
WRONG = [
    *(
        ("cifar10 unpacked", BATCH, holding(data), r"not a file of CIFAR's Python version \(it needs \w+")
        for data in FOREIGN
    ),
    ("cifar10 unpacked", BATCH, holding(b""), "data_batch_3 is not a file"),
    ("cifar10 unpacked", BATCH, holding(b"\x80\x02]q\x00."), "data_batch_3 is not a file"),
    ("cifar10 unpacked", BATCH, holding(pickle.dumps({b"data": 3})), "data_batch_3 does not have the images"),
    ("cifar10 unpacked", BATCH, Path.unlink, "cifar-10-batches-py has no data_batch_3; fetch it again"),
    ("cifar10", "cifar-10-python.tar.gz", halve, r"fetch it again: karat prepare fetch cifar10"),
    ("cifar10", "cifar-10-python.tar.gz", holding(b"<html>not found</html>"), "cifar-10-python.tar.gz is damaged"),
    ("stl10", "stl10_binary.tar.gz", halve, r"fetch it again: karat prepare fetch stl10"),
    (
        "stl10",
        "stl10_binary.tar.gz",
        holding(tar_bytes({}, "w:gz")),
        "has no stl10_binary/class_names.txt; fetch it again",
    ),
    ("stl10 unpacked", "stl10_binary/train_y.bin", holding(b"\x01" * 9), "fetch both again"),
    ("stl10 unpacked", "stl10_binary/train_y.bin", holding(b"\x0b" * 10), "sample 0 has label 10, but there are 10"),
    ("stl10 unpacked", "stl10_binary/train_X.bin", holding(b"12345"), "not a whole number of images"),
    ("svhn", "train_32x32.mat", holding(b""), "train_32x32.mat is not a complete MATLAB file"),
    (
        "svhn",
        "train_32x32.mat",
        holding(b"junk" * 100),
        "train_32x32.mat (is not a complete|has no array of integers 'X')",
    ),
    ("svhn", "train_32x32.mat", halve, "train_32x32.mat is not a complete MATLAB file"),
    ("flowers", "setid.mat", Path.unlink, r"has no setid.mat; fetch it again: karat prepare fetch flowers102"),
    ("flowers", "102flowers.tgz", halve, "102flowers.tgz is damaged or cut short"),
    (
        "flowers",
        "102flowers.tgz",
        holding(tar_bytes({"jpg/image_00001.jpg": b"x"}, "w:gz")),
        "setid.mat names jpg/image_00006",
    ),
    ("idx", IDX, halve, r"train-images-idx3-ubyte.gz cannot be read.*; fetch it again"),
    ("idx", IDX, holding(gzip.compress(b"\0\0\x08\x03")), "has 4 bytes, but its header says 16"),
    ("idx", "train-labels-idx1-ubyte.gz", Path.unlink, "no labels file beside it"),
    ("idx", "classes.txt", holding(b"\xe9t\xe9\n"), "classes.txt cannot be read: 'utf-8' codec"),
    ("idx", "classes.txt", holding(b"one\ntwo\n"), r"sample 2 has label 2, but there are 2 classes"),
]


@pytest.mark.parametrize(("name", "file", "damage", "said"), WRONG)
def test_a_file_that_is_not_right_is_one_line(tmp_path, write_idx, name, file, damage, said):
    writers = {**WRITERS, "flowers": official.write_flowers, "idx": lambda src: write_idx(src, "train", 9)}
    writers[name](tmp_path)
    damage(tmp_path / file)
    with pytest.raises(DataError, match=said) as caught:
        open_splits(tmp_path, "train", None, SourceOptions(any_hash=name != "idx"))
    assert "\n" not in str(caught.value)
    assert not Path(sys.argv[0] or "x").with_name("must-not-exist").exists()


def test_plain_names_that_cifar_has_too_are_no_cifar(tmp_path):
    write(tmp_path / "train/cat/1.jpg", jpeg(1))
    write(tmp_path / "test/cat/2.jpg", jpeg(2))
    write(tmp_path / "meta", b"about these cats")
    assert list(open_splits(tmp_path, None, None)) == ["train", "val"]


def test_the_names_that_lead_to_torchvision_are_its_own():
    names = {file for _, file, _ in SVHN.split_list.values()} | {file for file, _ in Flowers102._file_dict.values()}
    names |= {name for data_set in (CIFAR10, CIFAR100, STL10) for name in (data_set.filename, data_set.base_folder)}
    names |= {CIFAR10.meta["filename"], CIFAR100.meta["filename"], STL10.train_list[0][0]}
    assert {*names, FOLDER} == set(KNOWN_TO_TORCHVISION)


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_become_grey_jpegs(tmp_path, write_idx, packed):
    src = tmp_path / "src"
    src.mkdir()
    images = write_idx(src, "train", 30, packed=packed)
    write_idx(src, "t10k", 10, packed=packed)
    record = make_shards(src, tmp_path / "out")
    assert record.classes == [str(i) for i in range(10)]
    assert {name: split.samples for name, split in record.splits.items()} == {"train": 30, "val": 10}
    found = shard_samples(tmp_path / "out")
    assert {int(key): label for key, label, _ in found} == {index: index % 10 for index in range(30)}
    for key, _, data in found:
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.mode) == ("JPEG", "L")
        assert np.abs(np.asarray(image).astype(int) - images[int(key)]).mean() < 6


def test_idx_class_names(tmp_path, write_idx):
    write_idx(tmp_path, "train", 9, classes=3)
    (tmp_path / "classes.txt").write_text("one\ntwo\nthree\n")
    assert make_shards(tmp_path, tmp_path / "out").classes == ["one", "two", "three"]
