"""Betons and images in them that are damaged, missing or do not answer."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.plan import BatchSlice, TrainPlan
from karat_scale.data.shards.beton import read_record
from karat_scale.data.shards.hashing import hash_files
from karat_scale.data.shards.shard_format import SkippedRecord
from karat_scale.foundation.errors import DataError
from tests.data.backends.helpers import CROP_AND_FLIP, SIZE, broken


def test_a_bad_sample_stops_with_its_name(betons, make_sample):
    """FFCV shows it as black pixels."""
    samples = [make_sample(i) for i in range(10)]
    samples[4] = broken(4)
    _, config = betons(train=samples)
    backend = open_backend(ImageSpec(config(workers=1), CROP_AND_FLIP, SIZE, 3, 0))
    with pytest.raises(DataError, match=r"^sample broken-4 in train.beton cannot be decoded: .*truncated"):
        list(backend.train_batches(TrainPlan(0, 10, 10, 5, 0, 1).slices(0, 1)))


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_skipping_takes_the_next_sample_that_decodes(betons, make_sample, mode):
    samples = [make_sample(i) for i in range(10)]
    samples[4], samples[9] = broken(4), broken(9)
    _, config = betons(train=samples, val=samples[:6], options=("--write-mode", mode))
    backend = open_backend(ImageSpec(config(on_bad_sample="skip"), CROP_AND_FLIP, SIZE, 3, 0))
    (batch,) = backend.train_batches([BatchSlice(0, 0, np.arange(10))])
    assert batch.sample_ids.tolist() == [0, 1, 2, 3, 5, 5, 6, 7, 8, 0]
    assert torch.equal(batch.images[4], batch.images[5])
    assert [(bad.sample_id, bad.key, bad.shard) for bad in batch.bad] == [
        (4, "broken-4", "train.beton"),
        (9, "broken-9", "train.beton"),
    ]
    (batch,) = backend.eval_batches([BatchSlice(0, 0, np.arange(6))])
    assert batch.valid.tolist() == [True, True, True, True, False, True]


def change_a_byte(path: Path, split_file: str) -> None:
    """Change a byte in the middle of sample 3."""
    with np.load(path / f"{split_file}.index.npz") as index:
        at = int(index["offset"][3] + index["size"][3] // 2)
    data = bytearray((path / split_file).read_bytes())
    data[at] ^= 1
    (path / split_file).write_bytes(data)


def test_a_record_that_lists_very_many_files_can_be_read(betons):
    directory, _ = betons()
    record = read_record(directory / "train.beton")
    record.skipped = [SkippedRecord(path=f"{n}.txt", reason="x" * 2**20) for n in range(70)]
    (directory / "train.beton.json").write_text(record.model_dump_json(indent=1))
    assert read_record(directory / "train.beton") == record


def test_the_hashes_of_betons_can_be_shared(betons):
    directory, config = betons()
    list(hash_files(config(verify="hash"), 0, 1))
    change_a_byte(directory, "val.beton")
    list(hash_files(config(verify="hash"), 0, 2))
    with pytest.raises(DataError, match=r"val.beton has changed since it was written: its SHA-256 differs; copy"):
        list(hash_files(config(verify="hash"), 1, 2))


def test_a_changed_beton_is_found_by_its_hash_and_when_read(betons):
    directory, config = betons()
    change_a_byte(directory, "train.beton")
    with pytest.raises(DataError, match=r"train.beton has changed since it was written: its SHA-256 differs; copy"):
        open_backend(ImageSpec(config(verify="hash"), CROP_AND_FLIP, SIZE, 3, 0))
    backend = open_backend(ImageSpec(config(on_bad_sample="skip"), CROP_AND_FLIP, SIZE, 3, 0))
    with pytest.raises(DataError, match=r"train.beton has changed since it was written: sample \d+ differs"):
        list(backend.train_batches([BatchSlice(0, 0, np.arange(8))]))


def test_betons_that_are_not_right_are_refused_when_opened(betons):
    directory, config = betons()

    def refuses(match: str, classes: int = 3) -> None:
        with pytest.raises(DataError, match=match) as caught:
            open_backend(ImageSpec(config(), CROP_AND_FLIP, SIZE, classes, 0))
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


def test_a_file_system_that_stalls_is_an_error_in_time(betons):
    directory, config = betons()
    backend = open_backend(ImageSpec(config(workers=1, timeout=1), CROP_AND_FLIP, SIZE, 3, 0))
    path = directory / "train.beton"
    path.unlink()
    os.mkfifo(path)  # opening it waits, as a dead server's file does
    batches = backend.train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 2))
    with pytest.raises(DataError) as caught:
        next(batches)
    assert "no batch came for data.timeout = 1 s: worker 0 at sample" in str(caught.value)
    assert str(path) in str(caught.value)
