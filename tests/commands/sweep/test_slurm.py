"""What `karat sweep --slurm` writes for the jobs."""

import re
from pathlib import Path

import pytest

from tests.conftest import SMALL, karat_here


def submit(out: Path, *grid: str) -> Path:
    """Write the script for a grid without submitting it; returns the folder that the script names."""
    data = ("data.backend=synthetic", "data.path=", "attention.kind=karat", "schedule.warmup_epochs=0")
    assert karat_here("sweep", "cifar10_vit_tiny", *SMALL, *data, *grid, "--slurm", "--out", str(out)) == 0
    found = re.search(r"^POINTS=(.*)$", (out / "sweep.sh").read_text(), flags=re.MULTILINE)
    assert found is not None
    return Path(found[1])


def test_jobs_of_an_earlier_grid_keep_their_points(tmp_path: Path) -> None:
    first = submit(tmp_path, "attention.grid=1,2", "run.seed=0,1")
    points = {path.name: path.read_text() for path in first.iterdir()}
    assert sorted(points) == ["0", "1", "2", "3"]
    assert points["2"].splitlines() == [f"run.dir={tmp_path / 'grid-2_seed-0'}", "attention.grid=2", "run.seed=0"]

    more = submit(tmp_path, "attention.grid=1,2", "run.seed=0..2")
    assert (more / "2").read_text().splitlines()[1:] == ["attention.grid=1", "run.seed=2"]
    assert {path.name: path.read_text() for path in first.iterdir()} == points
    assert submit(tmp_path, "attention.grid=1,2", "run.seed=0,1") == first


def test_print_says_that_the_script_alone_is_not_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    data = (*SMALL, "data.backend=synthetic", "data.path=", "schedule.warmup_epochs=0")
    command = ("sweep", "cifar10_vit_tiny", *data, "run.seed=0,1", "--slurm", "--out", str(out))
    assert karat_here(*command, "--print") == 0
    assert f"answer n, and run: sbatch {out / 'sweep.sh'}" in capsys.readouterr().err
    assert not out.exists()
    assert karat_here(*command) == 0  # there is no terminal, which counts as n
    assert f"sbatch {out / 'sweep.sh'}" in capsys.readouterr().out
    assert (out / "logs").is_dir()


def test_data_that_vary_are_those_of_the_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("sweep", "cifar10_vit_tiny", *SMALL, "schedule.warmup_epochs=0", "data.path=/a,/b")
    assert karat_here(*command, "--slurm", "--out", str(tmp_path)) == 0
    script = (tmp_path / "sweep.sh").read_text()
    assert "SHARDS=''" in script.splitlines()
    (points,) = (tmp_path / "points").iterdir()
    assert "data.path=/b" in (points / "1").read_text().splitlines()
    assert karat_here(*command, "--slurm", "--stage=/disk", "--out", str(tmp_path)) == 2
    assert "--stage /disk copies one data set, but data.path varies" in capsys.readouterr().err
