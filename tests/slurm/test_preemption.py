"""A job that is told to stop at any moment saves, resumes, and ends with the weights of an undisturbed one."""

import shutil
import sys
from pathlib import Path

import psutil
import pytest

from karat_scale.engine.heartbeat import read_signs
from tests.conftest import events, summary, wait_until
from tests.slurm.training import Train, assert_ends_like, process_of, run_of, signal_held, train_alone, wait_for
from tests.training.runs import assert_same_run

LIMIT_OUTLASTED = 90  # seconds
LONG = ("train.epochs=12", "train.eval_every_epochs=12")
SLURM_COMMANDS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")


@pytest.mark.parametrize(
    ("kind", "step"),
    [("train", 1), ("train", 5), ("train", 8), ("checkpoint", 3)],
    ids=["first step", "training", "evaluation", "saving"],
)
def test_preempted_by_signal_it_saves_comes_back_and_ends_alike(train, uninterrupted, kind, step) -> None:
    job = train()
    wait_for(job, kind, step)
    signal_held(job)
    assert_ends_like(job, uninterrupted)
    assert job.starts == 2
    assert "requeued" in job.log


def test_told_before_its_first_step_it_takes_one_and_saves(train, uninterrupted) -> None:
    job = train()
    wait_until(lambda: bool(read_signs(run_of(job))), 60, "a rank is starting")
    signal_held(job)
    assert_ends_like(job, uninterrupted)
    assert events(run_of(job), "resume")[0]["step"] == 1


@pytest.mark.night
def test_told_while_it_compiles_it_loses_no_compiler(train, uninterrupted, tmp_path) -> None:
    job = train(KARAT_CACHE_DIR=tmp_path / "cache")
    wait_until(lambda: compiles(job.id), 60, "a rank compiles")
    job.signal_batch()
    assert_ends_like(job, uninterrupted)
    assert "is not available" not in job.log
    assert job.starts == 2


def compiles(job_id: str) -> bool:
    """Return whether a C++ compiler is at work in the job."""
    for process in psutil.process_iter(["name", "environ"]):
        environment = process.info["environ"] or {}
        if process.info["name"] == "cc1plus" and environment.get("SLURM_JOB_ID") == job_id:
            return True
    return False


def test_a_job_of_higher_priority_preempts_it(train, recipe, shards, cluster, tmp_path) -> None:
    whole = train_alone(recipe, shards, tmp_path / "whole", *LONG)
    job = train(*LONG)
    wait_for(job, "train", 2)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    cluster.command("sbatch", *urgent)
    assert_ends_like(job, whole)
    assert events(run_of(job), "end")[0]["exit"] == 75, job.log


@pytest.mark.night
@pytest.mark.timeout(1200)
def test_a_time_limit_saves_and_the_job_comes_back(
    train: Train, recipe: Path, shards: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    # A minute is the shortest limit, and SLURM checks it each half minute, so the epochs must last longer here.
    epochs = round(LIMIT_OUTLASTED * summary(uninterrupted)["images_per_second"] / 64)
    long = (f"train.epochs={epochs}", "train.eval_every_epochs=50", "checkpoint.every_steps=64")
    whole = train_alone(recipe, shards, tmp_path / "whole", *long)
    job = train(*long, options=("--time=1", "--signal=B:USR2@55"))
    assert_ends_like(job, whole, seconds=700)
    assert job.starts >= 2


def test_a_signal_before_the_ranks_run_brings_the_job_back(train, uninterrupted) -> None:
    job = train()
    # The batch script writes this just before it starts the ranks, which then load for seconds.
    wait_until(lambda: (run_of(job) / "restarts").is_file(), 60, "the batch script has begun")
    job.signal_batch()
    assert job.wait() == "COMPLETED 0", job.log
    assert job.starts == 2
    assert_same_run(run_of(job), uninterrupted)


def test_ranks_that_see_no_scontrol_are_requeued_by_the_batch_step(
    train: Train, uninterrupted: Path, tmp_path: Path
) -> None:
    # As in a container without SLURM, the ranks find all programs but SLURM's.
    (tmp_path / "bin").mkdir()
    for program in Path("/usr/bin").iterdir():
        if program.name not in SLURM_COMMANDS:
            (tmp_path / "bin" / program.name).symlink_to(program)
    path = f"{Path(sys.executable).parent}:{tmp_path / 'bin'}"
    assert shutil.which("scontrol", path=path) is None
    job = train(CONTAINER=f"env PATH={path}")
    wait_for(job, "train", 3)
    signal_held(job)
    assert_ends_like(job, uninterrupted)
    assert job.starts == 2


def test_a_cancelled_job_does_not_come_back(train, cluster) -> None:
    job = train()
    wait_for(job, "train", 2)
    process_of(job, rank=0).suspend()  # SLURM wakes it, too
    cluster.command("scancel", job.id)
    assert job.wait().startswith("CANCELLED")
    cluster.wait_idle()
    assert job.field("JobState") == "CANCELLED"
