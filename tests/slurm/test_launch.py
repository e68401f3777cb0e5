"""Functions of slurm/launch.sh by themselves, beside commands of SLURM that say what they were asked."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm.jobs import SCRIPTS


def stub(directory: Path, name: str, script: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


@pytest.mark.parametrize("arguments", ["", " init_from=runs/base.sh/x data.workers=2"], ids=["23.02", "22.05"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_copy_of_a_script_finds_its_clone(script: str, arguments: str, tmp_path: Path) -> None:
    clone, spool, commands = (tmp_path / name for name in ("a clone", "spool", "bin"))
    for directory in (clone, spool, commands):
        directory.mkdir()
    shutil.copytree(ROOT / "slurm", clone / "slurm")
    # As scontrol prints it; from 23.02 on without the arguments.
    stub(
        commands, "scontrol", f"echo 'JobId=812 JobName=x\n   Command={clone}/slurm/{script}{arguments}\n   WorkDir=/'"
    )
    shutil.copy(ROOT / "slurm" / script, spool / "slurm_script")
    kept = {key: value for key, value in os.environ.items() if key != "KARAT_HOME"}
    environment = {**kept, "PATH": f"{commands}:{kept['PATH']}", "SLURM_JOB_ID": "812", "VENV": "/nowhere"}
    done = subprocess.run(
        ["bash", spool / "slurm_script"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    # It is launch.sh that says so.
    assert (done.returncode, done.stderr) == (2, "error: VENV = /nowhere: no bin/activate there\n")


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
