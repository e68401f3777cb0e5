"""Tests that a user's commands lead from a data set's official files to a trained model, on a few images."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SMALL, events, karat_done, run_script
from tests.data.prepare import official

LAYOUTS = {
    "cifar100": functools.partial(official.write_cifar, fine=True),
    "svhn": official.write_svhn,
    "stl10": official.write_stl10,
    "flowers102": functools.partial(official.write_flowers, count=36),
}
# With batches of 8 images.
STEPS = {"cifar100": 1, "svhn": 1, "stl10": 1, "flowers102": 2}
CLASSES = {"cifar100": 100, "flowers102": 102}


def shards_of(name: str, tmp_path: Path, write: Callable[[Path], object]) -> Path:
    write(tmp_path / f"{name}_raw")
    out = tmp_path / name
    run_script("data_prep/make_webdataset.py", "--src", str(tmp_path / f"{name}_raw"), "--out", str(out), "--any-hash")
    return out


def train(recipe: str, shards: Path, run: Path, *overrides: str) -> None:
    classes = CLASSES.get(recipe.split("_")[0], 10)
    short = (f"model.num_classes={classes}", "train.epochs=1", "train.precision=fp32", "schedule.warmup_epochs=0")
    paths = (f"data.path={shards}", f"run.dir={run}", "deepspeed.config=zero0")
    karat_done("train", recipe, *SMALL, *short, *paths, *overrides)


@pytest.fixture(scope="module")
def trained_on_cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar10")
    shards = shards_of("cifar10", folder, functools.partial(official.write_cifar, fine=False))
    train("cifar10_vit_tiny_g3b", shards, folder / "run")
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_official_files_train_by_their_recipe(name: str, tmp_path: Path, trained_on_cifar10: Path) -> None:
    shards = shards_of(name, tmp_path, LAYOUTS[name])
    begin = [] if name == "cifar100" else [f"init_from={trained_on_cifar10}"]
    train(f"{name}_vit_tiny_g3b", shards, tmp_path / "run", *begin)
    assert [event["step"] for event in events(tmp_path / "run", "train")][-1] == STEPS[name]
    (found,) = events(tmp_path / "run", "eval")
    assert 0 <= found["top1"] <= found["top5"] <= 100
