"""Betons and images in them that are damaged or missing."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from karat_scale.data.plan import BatchSlice
from karat_scale.data.shards.shard_format import SkippedRecord, read_record
from karat_scale.data.shards.shards import hash_files
from karat_scale.foundation.errors import DataError
from tests.data.backends.helpers import CROP_AND_FLIP, broken


def test_skipping_takes_the_next_sample_that_decodes_among_raw_pixels(betons, opened, make_sample):
    samples = [make_sample(i) for i in range(6)]
    samples[4] = broken(4)
    directory = betons(train=samples, options=("--write-mode", "raw"))
    backend = opened(directory, CROP_AND_FLIP, backend="ffcv", on_bad_sample="skip")
    (batch,) = backend.train_batches([BatchSlice(0, 0, np.arange(6))])
    assert batch.sample_ids.tolist() == [0, 1, 2, 3, 5, 5]
    assert [(bad.key, bad.shard) for bad in batch.bad] == [("broken-4", "train.beton")]


def change_a_byte(path: Path, split_file: str) -> None:
    """Change a byte in the middle of sample 3."""
    with np.load(path / f"{split_file}.index.npz") as index:
        at = int(index["offset"][3] + index["size"][3] // 2)
    data = bytearray((path / split_file).read_bytes())
    data[at] ^= 1
    (path / split_file).write_bytes(data)


def test_a_record_that_lists_very_many_files_can_be_read(betons):
    directory = betons()
    record = read_record(directory / "train.beton")
    record.skipped = [SkippedRecord(path=f"{n}.txt", reason="x" * 2**20) for n in range(70)]
    (directory / "train.beton.json").write_text(record.model_dump_json(indent=1))
    assert read_record(directory / "train.beton") == record


def test_the_hashes_of_betons_can_be_shared(betons, data_config):
    directory = betons()
    config = data_config(directory, backend="ffcv", verify="hash")
    list(hash_files(config, 0, 1))
    change_a_byte(directory, "val.beton")
    list(hash_files(config, 0, 2))
    with pytest.raises(DataError, match=r"val.beton has changed since it was written: its SHA-256 differs; copy"):
        list(hash_files(config, 1, 2))


def test_a_changed_beton_is_found_by_its_hash_and_when_read(betons, opened):
    directory = betons()
    change_a_byte(directory, "train.beton")
    with pytest.raises(DataError, match=r"train.beton has changed since it was written: its SHA-256 differs; copy"):
        opened(directory, backend="ffcv", verify="hash")
    backend = opened(directory, backend="ffcv", on_bad_sample="skip")
    with pytest.raises(DataError, match=r"train.beton has changed since its index was written: sample \d+ differs"):
        list(backend.train_batches([BatchSlice(0, 0, np.arange(8))]))


def test_betons_that_are_not_right_are_refused_when_opened(betons, opened):
    directory = betons()

    def refuses(match: str, classes: int = 3) -> None:
        with pytest.raises(DataError, match=match) as caught:
            opened(directory, backend="ffcv", classes=classes)
        assert "\n" not in str(caught.value)

    refuses(r"train.beton has 3 classes, but model.num_classes = 2; set model.num_classes=3", classes=2)
    whole = (directory / "train.beton").read_bytes()
    (directory / "train.beton").write_bytes(whole[:-9])
    refuses("train.beton is cut short")
    (directory / "train.beton").unlink()
    refuses("train.beton is missing; copy it again or make it again")
    (directory / "train.beton").write_bytes(whole)
    index = directory / "train.beton.index.npz"
    index.write_bytes(index.read_bytes()[:-1] + b"x")
    refuses("index.npz has changed since it was written")
    (directory / "train.beton.json").write_text("{")
    refuses("train.beton.json is damaged or of another version")
    shutil.rmtree(directory)
    refuses(r"train.beton.json cannot be read: No such file .*; make the beton with data_prep/make_ffcv.py")
