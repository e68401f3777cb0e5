"""Functions of slurm/launch.sh by themselves, beside commands of SLURM that say what they were asked."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT


def stub(directory: Path, name: str, script: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


@pytest.mark.parametrize(
    ("element", "job"),
    [({}, "812"), ({"SLURM_ARRAY_JOB_ID": "812", "SLURM_ARRAY_TASK_ID": "3"}, "812_3")],
    ids=["job", "element"],
)
def test_a_job_and_an_element_of_an_array_requeue_themselves(element: dict[str, str], job: str, tmp_path: Path) -> None:
    # To the array's own id squeue answers with every element.
    stub(tmp_path, "squeue", f"case $* in *--jobs={job}\\ *) echo RUNNING ;; *) echo RUNNING; echo PENDING ;; esac")
    stub(tmp_path, "scontrol", f'echo "$@" >>{tmp_path}/asked; exit 1')
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "812", **element}
    done = subprocess.run(
        ["bash", "-c", 'source slurm/launch.sh; requeue "told to stop"'],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 75, done.stderr
    assert done.stdout.endswith(f"job {job}: told to stop; requeued\n")
    assert (tmp_path / "asked").read_text() == f"requeue {job}\n"
