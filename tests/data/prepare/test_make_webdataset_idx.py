"""IDX files such as MNIST's as a source of shards."""

import io

import numpy as np
import pytest
from PIL import Image

from karat_scale.data.shards.shard_format import read_dataset_record
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.foundation.errors import DataError
from tests.data.prepare.making import make_shards


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_become_grey_jpegs(tmp_path, write_idx, packed):
    src = tmp_path / "src"
    src.mkdir()
    images = write_idx(src, "train", 30, packed=packed)
    write_idx(src, "t10k", 10, packed=packed)
    make_shards(src, tmp_path / "out")
    record = read_dataset_record(tmp_path / "out")
    assert record.classes == [str(i) for i in range(10)]
    assert {name: split.samples for name, split in record.splits.items()} == {"train": 30, "val": 10}
    shards = ShardSplit(tmp_path / "out", "train", 10, "hash")
    for number in range(30):
        index = int(shards.locate(number)[0])
        assert shards.labels[number] == index % 10
        with Image.open(io.BytesIO(shards.read(number))) as image:
            assert (image.format, image.mode) == ("JPEG", "L")
            difference = np.asarray(image).astype(int) - images[index]
        assert np.abs(difference).mean() < 6


def test_idx_class_names(tmp_path, write_idx):
    write_idx(tmp_path, "train", 9, classes=3)
    (tmp_path / "classes.txt").write_text("one\ntwo\nthree\n")
    make_shards(tmp_path, tmp_path / "out")
    assert read_dataset_record(tmp_path / "out").classes == ["one", "two", "three"]
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match=r"sample 2 has label 2, but there are 2 classes"):
        make_shards(tmp_path, tmp_path / "other")


def test_damaged_idx_files(tmp_path, write_idx):
    write_idx(tmp_path, "train", 9)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    images.write_bytes(whole[:-50])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz cannot be read.*; fetch it again"):
        make_shards(tmp_path, tmp_path / "out")
    images.unlink()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
    with pytest.raises(DataError, match="train-images-idx3-ubyte has 4 bytes, but its header says 16"):
        make_shards(tmp_path, tmp_path / "out")
    images.write_bytes(whole)
    (tmp_path / "train-images-idx3-ubyte").unlink()
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="no labels file beside it"):
        make_shards(tmp_path, tmp_path / "out")
