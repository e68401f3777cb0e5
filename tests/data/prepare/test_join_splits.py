"""join_splits.py: runs for one data set take turns, on any file system, and a killed one keeps nobody out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from karat_scale.data.prepare import finished
from karat_scale.data.shards.shard_format import read_dataset_record
from tests.conftest import ROOT, karat_environment, run_script
from tests.data.prepare.images import write_folders


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path]:
    """A split each, as the elements of an array make them."""
    write_folders(tmp_path / "src")
    for split in ("train", "val"):
        source = ("--src", str(tmp_path / "src"), "--out", str(tmp_path / split), "--split", split)
        run_script("data_prep/make_webdataset.py", *source)
    return tmp_path / "train", tmp_path / "val"


def test_one_waits_for_the_other_and_none_is_lost(parts: tuple[Path, Path], tmp_path: Path) -> None:
    (train, val), out = parts, tmp_path / "out"
    out.mkdir()
    (out / finished.TURN).symlink_to(val)  # a run that was killed left it
    command = [sys.executable, str(ROOT / "data_prep/join_splits.py"), "--src", str(train), "--out", str(out)]
    waiting = subprocess.Popen(command, env=karat_environment(), stdout=subprocess.PIPE, text=True)
    assert waiting.stdout is not None
    assert f"waiting until {val} is joined" in waiting.stdout.readline()
    assert not (out / "dataset.json").exists()
    assert finished.join(val, out) == ["val"]  # the next run for the same source takes over
    assert waiting.wait(60) == 0
    waiting.stdout.close()
    assert sorted(read_dataset_record(out).splits) == ["train", "val"]
    assert not os.path.lexists(out / finished.TURN)
    assert not train.exists()
    assert not val.exists()
