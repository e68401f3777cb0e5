"""Tests of Parquet files, in which the Hugging Face hub ships image sets."""

import json

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")

import pyarrow as arrow
from pyarrow.parquet import write_table

from karat_scale.data.prepare.making import held_out, shuffled
from karat_scale.data.prepare.sources import SourceOptions, open_splits
from karat_scale.foundation.errors import DataError
from tests.data.betons import need_ffcv
from tests.data.prepare.images import contents, jpeg
from tests.data.prepare.making import beton_samples, make_betons, make_shards, shard_samples

NAMES = ["tench", "crane", "zebra", "crane"]
IMAGE = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])


def hub(**features):
    features = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}} | features
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def write(path, images, labels, metadata=None, group=4, names=("image", "label"), **more):
    """Write a Parquet file; `images` has the bytes and the path of each row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = arrow.array([{"bytes": data, "path": name} for data, name in images], type=IMAGE)
    table = arrow.table({names[0]: rows, names[1]: labels, **more})
    write_table(table.replace_schema_metadata(hub() if metadata is None else metadata), path, row_group_size=group)


def photos(start, count, paths=True):
    return [(jpeg(number), f"photo_{number}.JPEG" if paths else None) for number in range(start, start + count)]


@pytest.fixture
def images(tmp_path):
    """Return a folder, and the bytes and label of each image by key.

    The folder has two training files with groups of four rows, and one validation file.
    """
    src, known = tmp_path / "src", {}
    for name, start, count in (
        ("train-00000-of-00002", 0, 10),
        ("train-00001-of-00002", 10, 11),
        ("validation-00000-of-00001-0a1b2c", 50, 6),
    ):
        labels = [number % 4 for number in range(start, start + count)]
        write(src / f"data/{name}.parquet", photos(start, count), arrow.array(labels, arrow.int64()))
        known |= {f"photo_{start + i}": (jpeg(start + i), label) for i, label in enumerate(labels)}
    return src, known


def samples(out, split="train"):
    return {key: (data, label) for key, label, data in shard_samples(out, split)}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_bytes_labels_keys_and_class_names_are_those_of_the_files(images, tmp_path, workers):
    src, known = images
    record = make_shards(src, tmp_path / "out", "--shard-samples", "6", "--workers", workers)
    assert record.classes == ["tench", "crane (1)", "zebra", "crane (3)"]
    assert {name: split.samples for name, split in record.splits.items()} == {"train": 21, "val": 6}
    assert samples(tmp_path / "out", "train") | samples(tmp_path / "out", "val") == known
    made = record.splits["train"].made
    assert (made["image_column"], made["label_column"], made["not_as_published"]) == ("image", "label", [])


def test_a_split_that_is_left_out_adds_no_class(tmp_path, capsys):
    for split, names in (("train", ["b", "c"]), ("validation", ["c", "b"]), ("test", ["a", "a"])):
        write(tmp_path / f"src/{split}.parquet", photos(0, 2), arrow.array(names), metadata={})
    assert make_shards(tmp_path / "src", tmp_path / "out").classes == ["b", "c"]
    assert "the split test is left out; --split test converts it" in capsys.readouterr().out


def test_the_same_files_give_the_same_shards_and_another_seed_another_order(images, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        make_shards(images[0], tmp_path / name, "--seed", seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert list(samples(tmp_path / "a", "train")) != list(samples(tmp_path / "c", "train"))


def test_each_group_of_rows_is_read_once(images, monkeypatch):
    from karat_scale.data.prepare.sources import parquet

    monkeypatch.setattr(parquet, "WINDOW_BYTES", 3 * 1000 * 4)  # the groups of an image set do not fit in memory
    source = open_splits(images[0], "train", None, SourceOptions())["train"]
    assert 1 < source.window < 6
    read, real = [], parquet.ParquetSource._read_group
    monkeypatch.setattr(parquet.ParquetSource, "_read_group", lambda self, n: read.append(n) or real(self, n))
    order = shuffled(source, 3, None)
    assert sorted(order) == list(range(21))
    for index in order.tolist():
        source.read(index)
    assert sorted(read) == list(range(6))
    assert read != sorted(read)


def test_validation_images_are_held_out_of_parquet_too(images, tmp_path):
    for path in (images[0] / "data").glob("validation*"):
        path.unlink()
    make_shards(images[0], tmp_path / "out", "--val-count", "8")
    train, val = samples(tmp_path / "out", "train"), samples(tmp_path / "out", "val")
    assert (len(train), len(val), len(train | val)) == (13, 8, 21)
    assert held_out(np.array([label for _, label in val.values()]), None, 4, 0).sum() == 4


def test_a_folder_for_each_split_without_metadata_and_paths(tmp_path):
    write(tmp_path / "src/train/0000.parquet", photos(0, 5, paths=False), ["dog", "ant", "dog", "cat", "ant"], {})
    write(tmp_path / "src/test/0000.parquet", photos(9, 2, paths=False), ["cat", "ant"], {})
    record = make_shards(tmp_path / "src", tmp_path / "out")
    assert record.classes == ["ant", "cat", "dog"]
    assert samples(tmp_path / "out", "val") == {"0000/000000": (jpeg(9), 1), "0000/000001": (jpeg(10), 0)}


def test_one_file_of_plain_bytes_and_numbers(tmp_path):
    table = arrow.table({"img": [jpeg(1), jpeg(2)], "fine": [2, 0], "coarse": [0, 0]})
    write_table(table, tmp_path / "pets.parquet")
    with pytest.raises(DataError, match=r"which column holds the labels\? Use --label-column with one of img, fine, c"):
        make_shards(tmp_path / "pets.parquet", tmp_path / "out")
    with pytest.raises(
        DataError, match=r"--label-column img: .* has no such column of labels; it has img, fine, coarse"
    ):
        make_shards(tmp_path / "pets.parquet", tmp_path / "out", "--label-column", "img")
    record = make_shards(tmp_path / "pets.parquet", tmp_path / "out", "--label-column", "fine")
    assert (record.classes, record.splits["train"].empty_classes) == (["0", "1", "2"], ["1"])
    assert set(samples(tmp_path / "out")) == {"pets/000000", "pets/000001"}


def test_categories_of_bytes_are_no_images(tmp_path):
    camera = arrow.array([b"a7", b"x1"]).dictionary_encode()
    write_table(arrow.table({"img": [jpeg(1), jpeg(2)], "camera": camera, "fine": [1, 0]}), tmp_path / "pets.parquet")
    make_shards(tmp_path / "pets.parquet", tmp_path / "out")
    assert samples(tmp_path / "out") == {"pets/000000": (jpeg(1), 1), "pets/000001": (jpeg(2), 0)}


def test_a_missing_file_is_named_unless_it_is_accepted(images, tmp_path):
    (images[0] / "data/train-00000-of-00002.parquet").unlink()
    with pytest.raises(
        DataError, match=r"src has no train-00000-of-00002.parquet, and lacks 1 files in all; fetch them"
    ):
        make_shards(images[0], tmp_path / "out")
    record = make_shards(images[0], tmp_path / "out", "--any-hash").splits["train"]
    assert (record.samples, record.made["not_as_published"]) == (11, ["train-00000-of-00002.parquet"])


def test_rows_without_an_image_are_skipped_and_listed(tmp_path):
    write(tmp_path / "src/train.parquet", [(None, "gone.jpg"), (jpeg(1), "a.jpg"), (b"text", "b.jpg")], [0, 1, 2])
    record = make_shards(tmp_path / "src", tmp_path / "out").splits["train"]
    assert [(item.path, item.reason) for item in record.skipped] == [
        ("b.jpg", "not an image in a supported format"),
        ("gone.jpg", "the row has no bytes of an image"),
    ]


def test_files_that_are_wrong_are_one_line(images, tmp_path):
    path = images[0] / "data/train-00001-of-00002.parquet"
    whole = path.read_bytes()
    for data in (b"", b"text" * 50, whole[:-20]):
        path.write_bytes(data)
        with pytest.raises(
            DataError, match=r"train-00001-of-00002.parquet is not a complete Parquet file .*; fetch it"
        ):
            make_shards(images[0], tmp_path / "out")
    damaged = bytearray(whole)
    damaged[4:400] = b"\xff" * 396
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="not a complete Parquet file"):
        make_shards(images[0], tmp_path / "out")


def test_labels_that_are_no_classes(tmp_path):
    write_table(arrow.table({"image": [jpeg(0)], "id": [10**12]}), tmp_path / "ids.parquet")
    with pytest.raises(DataError, match="column id has the number 1000000000000, so it holds no classes; name the"):
        make_shards(tmp_path / "ids.parquet", tmp_path / "out")
    for labels, message in (
        ([-1, 0], r"sample 0 has label -1, but there are 4 classes"),
        ([0, 4], r"sample 1 has label 4, but there are 4 classes"),
        ([0, None], r"train.parquet: row 1 has no label; label it, or remove the row"),
    ):
        write(tmp_path / "src/train.parquet", photos(0, 2), arrow.array(labels, arrow.int64()))
        with pytest.raises(DataError, match=message):
            make_shards(tmp_path / "src", tmp_path / "out")


def test_files_of_two_data_sets_are_not_mixed(images, tmp_path):
    path = images[0] / "data/train-00001-of-00002.parquet"
    write(path, photos(0, 2), [0, 1], hub(label={"names": ["a", "b"]}))
    with pytest.raises(DataError, match="different columns or classes; give one data set as --src"):
        make_shards(images[0], tmp_path / "out")
    for images_or_labels in ({"image": [jpeg(0)], "label": [0]}, {"image": [{"bytes": jpeg(0)}], "label": ["a"]}):
        table = arrow.table(images_or_labels).replace_schema_metadata(hub())
        write_table(table, path)
        with pytest.raises(DataError, match="different columns or classes; give one data set as --src"):
            make_shards(images[0], tmp_path / "out")
    path.rename(path.with_name("train-00001-of-00003.parquet"))
    with pytest.raises(DataError, match="are of one split but of two data sets; keep one"):
        make_shards(images[0], tmp_path / "out")


@pytest.mark.parametrize("options", [(), ("--val-count", "1")])
def test_one_large_image_among_small_ones_fits_into_a_beton(tmp_path, options):
    need_ffcv()
    large = jpeg(9) + bytes(9 << 20)  # larger than FFCV's page, and the mean of its group of rows is smaller
    rows, labels = [*photos(0, 4), (large, "large.JPEG")], arrow.array([0, 1, 0, 1, 2], arrow.int64())
    write(tmp_path / "src/data/train-00000-of-00001.parquet", rows, labels, group=5)
    make_betons(tmp_path / "src", tmp_path / "out", *options)
    assert ("large", 2, large) in beton_samples(tmp_path / "out")


def test_a_split_that_is_left_out_needs_no_labels_and_no_other_files(tmp_path):
    """A test set, for example, may be published without labels."""
    src = tmp_path / "src"
    for split in ("train", "val"):
        write(src / f"{split}.parquet", photos(0, 2), [0, 1])
    write(src / "test-00001-of-00002.parquet", photos(2, 2), arrow.array([None, None], arrow.int64()))
    assert list(make_shards(src, tmp_path / "out").splits) == ["train", "val"]
    for options, said in (
        ((), "has no test-00000-of-00002.parquet"),
        (("--any-hash",), r": row 0 has no label; label"),
    ):
        with pytest.raises(DataError, match=said):
            make_shards(src, tmp_path / "test", "--split", "test", *options)


def test_the_split_may_be_a_word_of_a_name(tmp_path):
    """The hub used to name files so. Before the fix, their test images were trained on."""
    src = tmp_path / "src"
    for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
        write(src / f"my-pets-{name}.parquet", photos(4 * number, 3), [0, 1, 2])
    record = make_shards(src, tmp_path / "out")
    assert {name: split.samples for name, split in record.splits.items()} == {"train": 6, "val": 3}
    (src / "my-pets-train-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"src has no my-pets-train-00000-of-00002\.parquet"):
        make_shards(src, tmp_path / "other")
    write(tmp_path / "one" / "my-pets-00000-of-00001.parquet", photos(0, 2), [0, 1])
    assert list(make_shards(tmp_path / "one", tmp_path / "train").splits) == ["train"]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (arrow.array(["dog", "ant", "dog"]).dictionary_encode(), ["ant", "dog"]),
        (arrow.array([True, False, True]), ["0", "1"]),
    ],
    ids=["pandas' categories", "true and false"],
)
def test_labels_as_pandas_writes_them(tmp_path, labels, classes):
    write(tmp_path / "src/train.parquet", photos(0, 3), labels, metadata={})
    record = make_shards(tmp_path / "src", tmp_path / "out")
    assert (record.classes, record.splits["train"].per_class) == (classes, [1, 2])
    write(tmp_path / "src/train.parquet", photos(0, 2), arrow.array([0.0, 1.0]), metadata={})
    with pytest.raises(DataError, match="it has image, label, of which none may hold labels"):
        make_shards(tmp_path / "src", tmp_path / "other", "--label-column", "label")
