"""The ffcv backend reads betons as the others read shards, without FFCV's readers."""

import shutil
import tarfile

import numpy as np
import pytest

from karat_scale.data.plan import BatchSlice, EvalPlan, TrainPlan
from karat_scale.data.shards.shards import hash_files
from karat_scale.foundation.errors import DataError
from tests.data.backends.helpers import CROP_AND_FLIP, contents, flip
from tests.data.betons import make_betons, need_ffcv


def test_samples_draws_and_pixels_are_those_of_the_shards(betons, opened):
    directory = betons()
    seen = []
    for backend in (
        opened(directory.parent / "shards", decoder="pillow"),
        opened(directory, backend="ffcv", decoder="pillow"),
        opened(directory, backend="ffcv"),
    ):
        plan = TrainPlan(5, backend.num_train, 12, 6, 0, 1)
        batches = list(backend.train_batches(plan.slices(1, 7)))
        batches += backend.eval_batches(EvalPlan(backend.num_val, 4, 0, 1).slices())
        seen.append((backend.classes, contents(batches)))
    reference, same_decoder, own_decoder = seen
    assert same_decoder == reference
    assert own_decoder[0] == reference[0]
    for ours, theirs in zip(own_decoder[1], reference[1], strict=True):
        assert (*ours[:2], *ours[3:]) == (*theirs[:2], *theirs[3:])  # all but the pixels


def test_pixels_of_photos_are_within_the_stated_tolerance_of_pillow(sample_data, tmp_path, opened):
    """The mean difference is below 1.5 levels of 255, as docs/data.md states, and below 3 in each image."""
    need_ffcv()
    with tarfile.open(sample_data / "imagenet_sample_1000.tar") as tar:
        for _ in range(40):
            member = tar.next()
            path = tmp_path / "photos" / "train" / member.name
            path.parent.mkdir(parents=True)
            path.write_bytes(tar.extractfile(member).read())
    directory = make_betons(tmp_path / "photos")
    seen = []
    for decoder in ("auto", "pillow"):
        backend = opened(directory, CROP_AND_FLIP, 0, 224, 40, backend="ffcv", val_split="train", decoder=decoder)
        (train,) = backend.train_batches(TrainPlan(0, 40, 40, 40, 0, 1).slices(0, 1))
        (val,) = backend.eval_batches(EvalPlan(40, 40, 0, 1).slices())
        seen.append((train.images.int(), val.images.int()))
    for ours, theirs in zip(*seen, strict=True):
        found = (ours - theirs).abs().float().mean((1, 2, 3))
        assert 0 < found.mean() < 1.5
        assert found.max() < 3


def test_nothing_is_compiled_and_no_reader_of_ffcv_is_started(betons, opened, monkeypatch):
    """FFCV's pipelines compile for 8 to 24 s before the first batch, and some hang while they do."""
    from ffcv.loader import Loader
    from numba.core.event import install_recorder

    monkeypatch.setattr(Loader, "__init__", None)  # which hangs
    directory = betons()
    with install_recorder("numba:compile") as compiled:
        for decoder in ("auto", "pillow"):
            backend = opened(directory, backend="ffcv", decoder=decoder)
            assert len(list(backend.train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 2)))) == 2
    assert not compiled.buffer


def test_a_changed_beton_is_found_by_its_hash_in_any_part_and_when_read(betons, opened, data_config):
    directory = betons()
    config = data_config(directory, backend="ffcv", verify="hash")
    list(hash_files(config, 0, 1))
    with np.load(directory / "val.beton.index.npz") as index:
        flip(directory / "val.beton", int(index["offset"][3] + index["size"][3] // 2))  # in sample 3
    list(hash_files(config, 0, 2))
    said = "beton has changed since it was written: its SHA-256 differs; copy"
    for opening in (lambda: list(hash_files(config, 1, 2)), lambda: opened(directory, backend="ffcv", verify="hash")):
        with pytest.raises(DataError, match=rf"val.{said}"):
            opening()
    backend = opened(directory, backend="ffcv", on_bad_sample="skip")
    with pytest.raises(DataError, match=r"val.beton has changed since its index was written: sample \d+ differs"):
        list(backend.eval_batches([BatchSlice(0, 0, np.arange(8))]))


def test_betons_that_are_not_right_are_refused_when_opened(betons, opened):
    directory = betons()

    def refuses(match: str, classes: int = 3) -> None:
        with pytest.raises(DataError, match=match) as caught:
            opened(directory, backend="ffcv", classes=classes)
        assert "\n" not in str(caught.value)

    refuses(
        r"train.beton has 3 classes, but model.num_classes = 2; use other data, or train with ",
        classes=2,
    )
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
    refuses(r"train.beton.json cannot be read: No such file .*; make the beton with karat prepare ffcv")
