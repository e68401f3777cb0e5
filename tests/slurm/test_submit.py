"""Tests of `karat submit` and `karat status` with a real SLURM."""

import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from tests.commands.status.terminal import on_a_terminal
from tests.conftest import SMALL, events, karat_command, karat_environment, run_to_end, summary
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job


def environment_of(cluster: Cluster) -> dict[str, str]:
    environment = {**karat_environment(), **cluster.environment}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return environment


def karat(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_to_end(*karat_command(arguments), env=environment_of(cluster), timeout=60)


def test_a_submitted_recipe_trains_and_its_status_names_the_job(cluster, recipe, shards, tmp_path) -> None:
    run = tmp_path / "the run"
    overrides = (*SMALL, f"data.path={shards}", f"run.dir={run}")
    options = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
    with on_a_terminal("submit", str(recipe), *overrides, *options, environment=environment_of(cluster)) as terminal:
        terminal.wait_for("submit this? [y/N]")
        terminal.type("y\n")
        terminal.wait_for("see it with: karat status")
    submitted = re.search(r"job (\d+) is submitted", terminal.shown)
    assert submitted is not None, terminal.shown
    job = Job(cluster, submitted[1], run / f"small-{submitted[1]}.out")
    assert job.wait() == "COMPLETED 0", job.log
    assert summary(run)["world_size"] == 2

    (start,) = events(run, "start")
    for key, name in {"submitted": "SubmitTime", "started": "StartTime"}.items():
        assert start[key] == datetime.fromisoformat(job.field(name)).timestamp()
    assert summary(run)["wall_time"]["queue"] == start["started"] - start["submitted"]

    shown = karat(cluster, "status", str(run)).stdout
    assert "16 of 16" in shown
    assert "finished (exit 0)" in shown
    assert job.id in shown


def test_what_sbatch_refuses_is_one_line(cluster, recipe, shards, tmp_path) -> None:
    overrides = (*SMALL, f"data.path={shards}", f"run.dir={tmp_path / 'run'}")
    done = karat(cluster, "submit", str(recipe), *overrides, "--partition=nowhere", "--yes")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "invalid partition specified: nowhere" in line
