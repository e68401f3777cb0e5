"""Tests of `karat train` on bad data: each kind of damage is reported in one line, or counted."""

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import events, karat_here, karat_refuses, karat_says, make_image_folder, summary

Train = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> Path:
    """Return a copy of the shards, which a test may damage."""
    return Path(shutil.copytree(shards, tmp_path / "damaged"))


@pytest.fixture(scope="module")
def shards_with_a_bad_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return shards in which one training image and one validation image are cut off in the middle."""
    root = make_image_folder(tmp_path_factory.mktemp("bad"), {"train": 16, "val": 7})
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(noise).save(encoded, "JPEG", quality=95)
    for split in ("train", "val"):
        (root / split / "class1" / "003.jpg").write_bytes(encoded.getvalue()[:2000])
    # make_webdataset.py leaves such images out; `karat index` takes tars as they are.
    out = tmp_path_factory.mktemp("bad_shards")
    for split in ("train", "val"):
        with tarfile.open(out / f"{split}-000000.tar", "w") as tar:
            tar.add(root / split, arcname="")
    assert karat_here("index", str(out)) == 0
    return out


def cut(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 512)


def change_images(directory: Path) -> None:
    for shard in directory.glob("train-*.tar"):
        data = bytearray(shard.read_bytes())
        data[1100:1400] = bytes(300)  # the first image's bytes, behind the label's block and two headers
        data[1800:2000] = bytes(200)
        shard.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "workers", "said"),
    [
        (lambda directory: [file.unlink() for file in directory.iterdir()], 1, ("damaged", "karat prepare webdataset")),
        (lambda directory: (directory / "train-000001.tar").unlink(), 1, ("train-000001.tar",)),
        (lambda directory: cut(directory / "train-000001.tar"), 1, ("train-000001.tar",)),
        (change_images, 0, ("train-0000", "changed")),
        (change_images, 1, ("train-0000", "changed")),
    ],
    ids=["empty", "missing", "truncated", "changed", "changed, by a worker"],
)
def test_damaged_shards_are_one_line(recipe_file, damaged, damage, workers, said) -> None:
    damage(damaged)
    line = karat_refuses("train", str(recipe_file), f"data.path={damaged}", f"data.workers={workers}")
    assert all(part in line for part in said)


def test_an_undecodable_image_is_refused_or_as_the_advice_says_skipped_reported_and_counted(
    recipe_file, shards_with_a_bad_image, tmp_path
) -> None:
    command = ("train", str(recipe_file), f"data.path={shards_with_a_bad_image}")
    line = karat_refuses(*command)
    assert "train-000000.tar" in line
    assert "data.on_bad_sample=skip" in line
    said = karat_says(*command, "data.on_bad_sample=skip", "attention.rank=3", "train.epochs=1")
    assert "differs from that of the earlier start, which left no checkpoint: attention.rank (4 -> 3)" in said
    warnings = [line for line in said.splitlines() if "warning" in line]
    assert any("train-000000.tar" in line for line in warnings)
    assert any("val-000000.tar" in line for line in warnings)
    assert summary(tmp_path / "run")["bad_samples"] == 1
    (evaluation,) = events(tmp_path / "run", "eval")
    assert (evaluation["images"], evaluation["bad"]) == (27, 1)


def test_files_that_are_left_out_and_classes_without_images_are_said(recipe_file, image_folder, tmp_path) -> None:
    images = Path(shutil.copytree(image_folder, tmp_path / "images"))
    for image in (images / "train/class2").iterdir():
        image.unlink()
    for name in ("train/class1/a.avif", "train/class0/b.gif", "train/.x"):
        (images / name).touch()
    folder = ("data.backend=folder", f"data.path={images}", "train.max_steps=1")
    said = karat_says("train", str(recipe_file), *folder)
    first = images / "train/class0/b.gif"
    assert said.count(f"notice: 2 files left out, {first} and others: no suffix of .jpg, .jpeg, ") == 1
    assert said.count("notice: 1 of 4 classes without training images: class2") == 1
    shutil.rmtree(images / "val/class1")
    said = karat_says("train", str(recipe_file), *folder, f"run.dir={tmp_path / 'untested'}")
    assert "notice: 1 of 4 classes without validation images: class1; top-1 is over the others" in said
    said = karat_says("train", str(recipe_file), *folder, f"run.dir={tmp_path / 'same'}", "data.val_split=train")
    assert "notice: data.val_split is also data.train_split, so top-1 is of training images" in said


@pytest.mark.slow
def test_names_that_are_not_utf8_train_and_are_told_when_an_image_is_bad(train_recipe, image_folder, tmp_path) -> None:
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    name = os.fsdecode(b"class\xff1")
    for split in ("train", "val"):
        (images / split / "class1").rename(images / split / name)
    folder = ("data.backend=folder", f"data.path={images}", "train.max_steps=2")
    done = train_recipe(*folder)
    assert done.returncode == 0, done.stdout + done.stderr
    bad = images / "train" / name / os.fsdecode(b"b\xfead\x1b[2J.jpg")
    shutil.copy(images / "train" / "class0" / "000.jpg", bad)
    os.truncate(bad, 300)
    for on_bad, code in (("skip", 0), ("stop", 2)):
        run = (f"run.dir={tmp_path / on_bad}", f"data.on_bad_sample={on_bad}", "train.max_steps=null", "train.epochs=1")
        done = train_recipe(*folder, *run)
        assert done.returncode == code, done.stdout + done.stderr
        said = done.stdout + done.stderr
        assert r"b\udcfead\x1b[2J.jpg" in said
        assert "\x1b" not in said
        assert "Traceback" not in said
