"""Shards are copied once to the nodes' own disks and found again; without room, the shared ones are read."""

import shutil
from pathlib import Path

from karat_scale.training.run_directory import RunDirectory
from tests.conftest import SMALL, disk_of, summary
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job, submit
from tests.slurm.training import SCRIPT, assert_ends_like, signal_held, wait_for


def train_staged(cluster: Cluster, recipe: Path, shards: Path, run: Path, stage: Path) -> Job:
    settings = {"RECIPE": recipe, "SHARDS": shards, "RUN": run, "STAGE": stage}
    job = submit(cluster, SCRIPT, *SMALL, "train.epochs=1", cwd=run.with_name(f"{run.name}-job"), **settings)
    assert job.wait() == "COMPLETED 0", job.log
    return job


def test_shards_are_staged_once_and_read_from_there(cluster, recipe, shards, tmp_path) -> None:
    stage, shared = tmp_path / "disk", tmp_path / "shared"
    shutil.copytree(shards, shared)
    first = train_staged(cluster, recipe, shared, tmp_path / "run1", stage)
    assert "12 were copied" in first.log, first.log
    (copy,) = (path for path in stage.glob("karat-*/*") if path.is_dir())
    assert f"the images are read from {copy}" in first.log
    assert RunDirectory(tmp_path / "run1").recipe().data.path == str(shared)

    for tar in shared.glob("*.tar"):
        tar.unlink()  # so that only the copy can be read
    second = train_staged(cluster, recipe, shared, tmp_path / "run2", stage)
    assert "0 were copied" in second.log, second.log
    assert summary(tmp_path / "run1")["data_digest"] == summary(tmp_path / "run2")["data_digest"]


def test_a_requeued_job_finds_its_copy(train, uninterrupted, tmp_path) -> None:
    job = train(STAGE=tmp_path / "disk")
    wait_for(job, "train", 3)
    signal_held(job)
    assert_ends_like(job, uninterrupted)
    assert job.log.index("12 were copied") < job.log.index("; requeued") < job.log.index("0 were copied")


def test_where_space_is_short_the_shared_shards_are_read(cluster, recipe, shards, tmp_path) -> None:
    with disk_of("16m", tmp_path / "disk") as disk:  # less than what staging leaves free
        job = train_staged(cluster, recipe, shards, tmp_path / "run", disk)
    assert "0.02 GB free" in job.log
    assert f"those read {shards}" in job.log
    assert "the images are read from" not in job.log
    assert RunDirectory(tmp_path / "run").recipe().data.path == str(shards)


def test_without_a_disk_the_shared_shards_are_read(cluster, recipe, shards, tmp_path) -> None:
    (tmp_path / "full").write_text("a file, so no directory can be made below it")
    job = train_staged(cluster, recipe, shards, tmp_path / "run", tmp_path / "full")
    assert f"those read {shards}" in job.log
    assert "the images are read from" not in job.log
    assert RunDirectory(tmp_path / "run").recipe().data.path == str(shards)
