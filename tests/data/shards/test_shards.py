import io
import os
import shutil
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset as wds

from karat_scale.data.shards.shard_format import (
    DatasetRecord,
    SkippedRecord,
    SplitRecord,
    read_dataset_record,
    write_dataset_record,
)
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.data.shards.tars import EncodedSample, write_shard
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import LARGEST_TEXT


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def test_every_sample_reads_back(make_shards, make_sample):
    split = ShardSplit(make_shards(), "train", 3, "hash")
    assert len(split) == 40
    for number in np.random.default_rng(0).permutation(40).tolist():
        sample = make_sample(number)
        assert split.read(number) == sample.data
        assert split.labels[number] == sample.label
        assert split.locate(number) == (sample.key, f"train-{number // 8:06d}.tar")


def test_shards_are_read_where_they_lie(make_shards):
    """wids copies them to a cache of its own first."""
    directory = make_shards()
    split = ShardSplit(directory, "train", 3)
    before = {file.path for file in psutil.Process().open_files()}  # not their positions: another writes to the log
    for number in range(len(split)):
        split.read(number)
    opened = {Path(file.path) for file in psutil.Process().open_files() if file.path not in before}
    assert opened == set(directory.glob("train-*.tar"))
    split.close()


def test_stock_webdataset_reads_the_shards_in_our_order(make_shards, make_sample):
    directory = make_shards()
    urls = [str(path) for path in sorted(directory.glob("train-*.tar"))]
    rows = list(wds.WebDataset(urls, shardshuffle=False).to_tuple("__key__", "jpg", "cls"))
    expected = [make_sample(number) for number in range(40)]
    assert rows == [(sample.key, sample.data, str(sample.label).encode()) for sample in expected]
    decoded = next(iter(wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")))
    assert decoded[0].size == (20, 18)
    assert decoded[1] == 0


def test_the_same_samples_give_the_same_bytes(tmp_path, make_sample, monkeypatch):
    records = []
    for name in "ab":
        (tmp_path / name).mkdir()
        records.append(write_shard(tmp_path / name, "train-000000", [make_sample(i) for i in range(5)]))
        monkeypatch.setattr(time, "time", lambda: 4e9)
    assert records[0] == records[1]
    assert (tmp_path / "a/train-000000.index.npz").read_bytes() == (tmp_path / "b/train-000000.index.npz").read_bytes()


def test_an_interrupted_shard_leaves_nothing(tmp_path, make_sample):
    def samples():
        yield make_sample(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, "train-000000", samples())
    assert list(tmp_path.iterdir()) == []


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_more_shards_than_open_files(make_shards, make_sample, monkeypatch):
    monkeypatch.setattr("karat_scale.data.shards.shard_files.MAX_OPEN_SHARDS", 2)
    split = ShardSplit(make_shards(), "train", 3)
    before = open_files()
    for number in [*range(40), *reversed(range(40))]:
        assert split.read(number) == make_sample(number).data
    assert open_files() <= before + 2
    split.close()
    assert open_files() == before


def refusal(directory: Path, split: str = "train", num_classes: int = 3, verify: str = "size") -> str:
    with pytest.raises(DataError) as caught:
        ShardSplit(directory, split, num_classes, verify)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_is_no_data_set_is_one_line(tmp_path):
    assert "nowhere is not a directory" in refusal(tmp_path / "nowhere")
    assert "is empty; make it with data_prep/make_webdataset.py" in refusal(tmp_path)
    (tmp_path / "file").touch()
    assert "has no dataset.json" in refusal(tmp_path)
    for text in ("", "{", '{"classes": 3}', '{"classes": [], "version": 9}'):
        (tmp_path / "dataset.json").write_text(text)
        assert "dataset.json is damaged or of another version" in refusal(tmp_path)


def leading_out(directory: Path) -> None:
    record = (directory / "dataset.json").read_text()
    (directory / "dataset.json").write_text(record.replace('"train-000000.tar"', '"../train-000000.tar"'))


def grown(directory: Path) -> None:
    with (directory / "train-000002.tar").open("ab") as file:
        file.write(b"more")


DAMAGE = {
    "train-000002.tar is missing": lambda directory: (directory / "train-000002.tar").unlink(),
    "train-000002.index.npz is missing": lambda directory: (directory / "train-000002.index.npz").unlink(),
    "train-000002.tar is cut short: 1000 bytes": lambda directory: os.truncate(directory / "train-000002.tar", 1000),
    "000002.index.npz is cut short: 9 bytes": lambda directory: os.truncate(directory / "train-000002.index.npz", 9),
    "train-000002.tar has changed since it was written": grown,
    "index.npz has changed since it was written": lambda directory: flip_byte(
        directory / "train-000002.index.npz", 200
    ),
    "splits.train.shards.0.name": leading_out,
}


@pytest.mark.parametrize("said", DAMAGE)
def test_a_file_that_is_not_as_it_was_is_one_line(make_shards, said):
    directory = make_shards()
    DAMAGE[said](directory)
    assert said in refusal(directory)


def test_absent_split(make_shards):
    assert "no samples of split 'test'; the splits there: train, val; set data.val_split=val" in refusal(
        make_shards(), split="test"
    )


def test_shard_changed_in_place_is_found_by_hash_or_when_read(make_shards):
    directory = make_shards()
    flip_byte(directory / "train-000002.tar", 1800)
    assert "train-000002.tar has changed since it was written: its SHA-256" in refusal(directory, verify="hash")
    split = ShardSplit(directory, "train", 3)
    assert split.read(15)
    with pytest.raises(DataError, match=r"train-000002.tar has changed since its index .* sample 0016"):
        split.read(16)


def test_a_shard_that_is_cut_or_gone_after_opening_is_named(make_shards):
    directory = make_shards()
    split = ShardSplit(directory, "train", 3)
    os.truncate(directory / "train-000001.tar", 700)
    with pytest.raises(DataError, match=r"train-000001.tar is cut short: sample 0008"):
        split.read(8)
    shutil.rmtree(directory)
    with pytest.raises(DataError, match=r"train-000000.tar cannot be read: No such file"):
        split.read(0)


def test_label_out_of_range(make_shards, make_sample):
    directory = make_shards(train=[make_sample(0), make_sample(1, label=7)])
    assert "sample 0001 has label 7, but dataset.json lists 3 classes" in refusal(directory)
    directory_2 = directory.parent / "other"
    directory_2.mkdir()
    shard = write_shard(directory_2, "train-000000", [make_sample(0, label=-1)])
    record = DatasetRecord(classes=["a", "b"])
    record.splits["train"] = SplitRecord(samples=1, bytes=shard.bytes, shards=[shard])
    write_dataset_record(directory_2, record)
    assert "label -1" in refusal(directory_2)


def test_more_classes_than_the_model(make_shards):
    directory = make_shards()
    assert "has 3 classes, but model.num_classes = 2; set model.num_classes=3" in refusal(directory, num_classes=2)
    assert len(ShardSplit(directory, "train", 10)) == 40


def test_headers_are_those_of_webdatasets_own_writer(tmp_path):
    names = ["a", "n01/x" * 19, "é/b", "n01/" + "y" * 120]
    samples = [EncodedSample(name, "jpg", bytes(997 * i), i) for i, name in enumerate(names)]
    write_shard(tmp_path, "train-000000", samples)
    expected = io.BytesIO()
    with wds.TarWriter(expected, encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write({"__key__": sample.key, "cls": str(sample.label).encode()})
            tar.write({"__key__": sample.key, sample.extension: sample.data})
    assert (tmp_path / "train-000000.tar").read_bytes() == expected.getvalue()


def test_a_record_that_lists_very_many_files_can_be_read(make_shards):
    directory = make_shards()
    record = read_dataset_record(directory)
    record.splits["train"].skipped = [SkippedRecord(path=f"{n}.txt", reason="x" * 2**20) for n in range(70)]
    write_dataset_record(directory, record)
    assert (directory / "dataset.json").stat().st_size > LARGEST_TEXT
    assert read_dataset_record(directory) == record
    assert record.splits["train"].bytes == sum(path.stat().st_size for path in directory.glob("train-*.tar"))
    assert len(ShardSplit(directory, "train", 3)) == 40
