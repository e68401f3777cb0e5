"""Shards on the nodes' own disks: copied once, found again, and done without where there is no room."""

from pathlib import Path

from tests.conftest import SMALL, summary
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job, submit

RECIPE = "attention: {kind: karat}\nschedule: {warmup_epochs: 0}\ndata: {path: set by the script}\n"


def train(cluster: Cluster, shards: Path, directory: Path, run: Path, stage: Path) -> Job:
    directory.mkdir()
    recipe = directory / "small.yaml"
    recipe.write_text(RECIPE)
    job = submit(
        cluster, "imagenet_fourier_karat.sh", *SMALL, "train.epochs=1", cwd=directory, RECIPE=recipe, SHARDS=shards,
        RUN=run, STAGE=stage,
    )  # fmt: skip
    assert job.wait() == "COMPLETED 0", job.log
    return job


def test_shards_are_staged_once_and_read_from_there(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    stage = tmp_path / "disk"
    first = train(cluster, shards, tmp_path / "1", tmp_path / "run1", stage)
    assert "12 were copied" in first.log, first.log
    (copy,) = (path for path in stage.glob("karat-*/*") if path.is_dir())
    assert f"path: {copy}" in (tmp_path / "run1" / "recipe.yaml").read_text()

    second = train(cluster, shards, tmp_path / "2", tmp_path / "run2", stage)
    assert "0 were copied" in second.log, second.log
    assert summary(tmp_path / "run1")["data_digest"] == summary(tmp_path / "run2")["data_digest"]


def test_without_a_disk_the_shared_shards_are_read(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "full").write_text("a file, so no directory can be made below it")
    job = train(cluster, shards, tmp_path / "1", tmp_path / "run", tmp_path / "full")
    assert f"those read {shards}" in job.log
    assert f"path: {shards}" in (tmp_path / "run" / "recipe.yaml").read_text()
