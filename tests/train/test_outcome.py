"""What a run says of its end, and leaves in summary.json."""

import shutil
from pathlib import Path

from tests.conftest import summary


def _fill(disk: Path, but: int) -> None:
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - but))


def test_a_disk_too_full_for_the_last_checkpoint_is_one_line(train_recipe, small_disk: Path) -> None:
    run = small_disk / "run"
    _fill(small_disk, but=200_000)
    done = train_recipe("train.max_steps=1", f"run.dir={run}")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: run.dir = {run}: the last checkpoint could not be saved: it needs 0.")
    assert line.endswith("MB free; mend that and run the same command, which begins anew")
    assert summary(run)["exit"] == 2


def test_a_disk_that_takes_not_even_the_figures_is_one_line(train_recipe, small_disk: Path) -> None:
    (small_disk / "run").mkdir()
    _fill(small_disk, but=0)
    done = train_recipe(f"run.dir={small_disk / 'run'}")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "No space left on device" in line
