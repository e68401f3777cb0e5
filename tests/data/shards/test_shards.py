import gc
import io
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset as wds

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.plan import epoch_order
from karat_scale.data.shards.beton import BetonSplit
from karat_scale.data.shards.shard_files import Blocks
from karat_scale.data.shards.shard_format import (
    SkippedRecord,
    check_data_path,
    read_dataset_record,
    staged_copy,
    unused_classes,
    write_dataset_record,
)
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.data.shards.tars import EncodedSample, write_shard
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import LARGEST_TEXT
from karat_scale.recipe import AugmentConfig, DataConfig
from karat_scale.training.run_directory import RunDirectory
from tests.conftest import karat_here, karat_says
from tests.data.backends.helpers import flip
from tests.data.betons import make_betons


def test_every_sample_reads_back_from_where_it_lies(make_shards, make_sample):
    """Samples are read from the tars where they are; wids first copies the tars to its own cache."""
    directory = make_shards()
    split = ShardSplit(directory, "train", 3, "hash")
    assert len(split) == 40
    before = {file.path for file in psutil.Process().open_files()}  # paths alone, since another writes to the log
    for number in np.random.default_rng(0).permutation(40).tolist():
        sample = make_sample(number)
        assert split.read(number) == sample.data
        assert split.labels[number] == sample.label
        assert split.locate(number) == (sample.key, f"train-{number // 8:06d}.tar")
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
    gc.collect()  # other tests' files
    before = open_files()
    for number in [*range(40), *reversed(range(40))]:
        assert split.read(number) == make_sample(number).data
    assert open_files() <= before + 2
    split.close()
    assert open_files() <= before


def refusal(directory: Path, split: str = "train", num_classes: int = 3, verify: str = "size") -> str:
    with pytest.raises(DataError) as caught:
        ShardSplit(directory, split, num_classes, verify)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_is_no_data_set_is_one_line(tmp_path):
    assert "nowhere is not a directory" in refusal(tmp_path / "nowhere")
    assert "is empty; make it with karat prepare webdataset" in refusal(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / ".train.making").mkdir()  # while it is made
    assert "has no dataset.json; make it with karat prepare webdataset or correct the path" in refusal(tmp_path)
    for text in ("", "{", '{"classes": 3}', '{"classes": [], "version": 9}'):
        (tmp_path / "dataset.json").write_text(text)
        assert "dataset.json is damaged or of another version" in refusal(tmp_path)
    for text, mistake in (
        ("{", "(Invalid JSON: EOF"),
        ('{"classes": 3}', "(classes: should be a list, such as [a, b])"),
        ('{"classes": [1]}', "(classes[0]: should be a text"),
    ):
        (tmp_path / "dataset.json").write_text(text)
        assert mistake in refusal(tmp_path)


def test_a_path_of_an_unknown_user_is_one_line() -> None:
    with pytest.raises(DataError, match=r"^data.path = ~nobody-here/x: the user after ~ is not known here; "):
        check_data_path(DataConfig(path="~nobody-here/x"))


# What is said, which file is damaged, and how.
DAMAGE = {
    "train-000002.tar is missing": ("train-000002.tar", Path.unlink),
    "train-000002.index.npz is missing": ("train-000002.index.npz", Path.unlink),
    "train-000002.tar is cut short: 1000 bytes": ("train-000002.tar", lambda path: os.truncate(path, 1000)),
    "000002.index.npz is cut short: 9 bytes": ("train-000002.index.npz", lambda path: os.truncate(path, 9)),
    "train-000002.tar has changed since it was written": (
        "train-000002.tar",
        lambda path: os.truncate(path, path.stat().st_size + 4),
    ),
    "index.npz has changed since it was written": ("train-000002.index.npz", lambda path: flip(path, 200)),
    "splits.train.shards[0].name": (
        "dataset.json",
        lambda path: path.write_text(path.read_text().replace('"train-000000.tar"', '"../train-000000.tar"')),
    ),
}


def test_a_file_that_is_not_as_it_was_is_one_line(make_shards):
    directory = make_shards()
    for said, (name, damage) in DAMAGE.items():
        whole = (directory / name).read_bytes()
        damage(directory / name)
        assert said in refusal(directory)
        (directory / name).write_bytes(whole)


def test_shard_changed_in_place_is_found_by_hash_or_when_read(make_shards):
    directory = make_shards()
    flip(directory / "train-000002.tar", 1800)
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


def test_a_split_that_is_not_there_and_more_classes_than_the_model_or_the_record_has(make_shards, make_sample):
    directory = make_shards(val=[make_sample(0), make_sample(1, label=7)])
    assert "sample 0001 has label 7, but dataset.json lists 3 classes" in refusal(directory, split="val")
    said = refusal(directory, split="test")
    assert "no samples of split 'test'; the splits there: train, val; set data.val_split=val" in said
    assert "has 3 classes, but model.num_classes = 2; use other data, or train with model.num_classes=3" in refusal(
        directory, num_classes=2
    )
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


BLOCKS = Blocks(samples=4, window=3)


@pytest.fixture
def asked(monkeypatch):
    """Return the list of this process's requests to read ahead, which are also passed on."""
    requests, real = [], os.posix_fadvise

    def ask(file, begin, length, advice):
        requests.append((Path(f"/proc/self/fd/{file}").readlink(), begin, length))
        real(file, begin, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", ask)
    return requests


@pytest.mark.parametrize("kind", ["shards", "betons"])
def test_each_epoch_asks_for_each_block_once(make_shards, asked, kind):
    directory = make_shards()  # 40 samples, 8 in each shard: 10 blocks
    open_split, directory = (ShardSplit, directory) if kind == "shards" else (BetonSplit, make_betons(directory))
    split = open_split(directory, "train", 3, readahead=BLOCKS)
    asked.clear()
    for epoch in range(3):
        order = epoch_order(0, epoch, 40, "block", BLOCKS.samples, BLOCKS.window)
        for sample_id in order.tolist():
            split.read(sample_id)
        # Blocks that end one epoch and begin the next are not asked for again.
        assert len(asked) == len(set(asked)) >= 10 - 2 * BLOCKS.window
        if epoch == 0:
            assert len(asked) == 10
        asked.clear()
    split.close()


def test_a_block_that_files_cut_is_asked_for_once(make_shards, asked):
    blocks = Blocks(samples=3, window=6)  # 13 blocks and a part; shards cut three of them
    directory = make_shards()
    split = ShardSplit(directory, "train", 3, readahead=blocks)
    asked.clear()
    for sample_id in epoch_order(0, 0, 40, "block", *blocks).tolist():
        split.read(sample_id)
    assert len(asked) == len(set(asked)) == 14 + 3
    split.close()
    asked.clear()
    split = ShardSplit(directory, "train", 3)  # another order asks for nothing
    for sample_id in range(40):
        split.read(sample_id)
    assert asked == []
    split.close()


@pytest.mark.parametrize("backend", ["folder", "webdataset", "ffcv", "dali"])
def test_a_path_that_does_not_answer_is_an_error_in_time(tmp_path, data_config, backend):
    path = tmp_path / "dead"
    os.mkfifo(path)  # opening it waits, as a dead server's directory does
    with pytest.raises(DataError, match=rf"^data.path = {path} did not answer for data.timeout = 0.2 s; check its"):
        open_backend(ImageSpec(data_config(path, backend=backend, timeout=0.2), AugmentConfig(), 16, 3, 0))
    os.close(os.open(path, os.O_WRONLY))
    for thread in threading.enumerate():
        if thread.name == "karat-ask":
            thread.join(60)
            assert not thread.is_alive()


def test_a_path_that_is_missing_is_told_at_once_and_so_are_classes_that_are_never_seen(tmp_path, data_config):
    with pytest.raises(DataError, match=r"nowhere is not a directory"):
        open_backend(ImageSpec(data_config(tmp_path / "nowhere", timeout=300), AugmentConfig(), 16, 3, 0))
    assert unused_classes(4, 4) == ""
    assert "the data has 4 classes, but model.num_classes = 5" in unused_classes(4, 5)
    assert unused_classes(1, 5).startswith("the data has one class, so each answer is right; put the images")


def test_only_a_whole_copy_of_just_these_shards_is_taken(tmp_path: Path) -> None:
    told = {"KARAT_SHARDS": "/shared", "KARAT_STAGED": str(tmp_path)}
    assert staged_copy("/shared", told) is None
    (tmp_path / "dataset.json").touch()
    assert staged_copy("/shared", told) == str(tmp_path)
    assert staged_copy("/other", told) is None
    assert staged_copy("/shared", {**told, "KARAT_STAGED": ""}) is None
    assert staged_copy("", {}) is None


def test_a_run_reads_the_copy_and_any_node_evaluates_it(recipe_file, shards, tmp_path, monkeypatch):
    shared, copy, run = tmp_path / "shared", tmp_path / "copy", tmp_path / "run"
    for directory in (shared, copy):
        shutil.copytree(shards, directory)
    away = shared.rename(tmp_path / "away")
    monkeypatch.setenv("KARAT_SHARDS", str(shared))
    monkeypatch.setenv("KARAT_STAGED", str(copy))
    said = karat_says("train", str(recipe_file), f"data.path={shared}", "train.epochs=1")
    assert f"the images are read from {copy}, this node's copy" in said
    assert RunDirectory(run).recipe().data.path == str(shared)

    monkeypatch.delenv("KARAT_STAGED")
    shutil.rmtree(copy)
    away.rename(shared)
    assert karat_here("eval", str(run)) == 0
