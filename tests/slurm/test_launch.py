"""Tests of the functions of slurm/launch.sh without SLURM, with stubs of its commands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from karat_scale.data.shards.shard_format import read_dataset_record
from tests.conftest import ROOT, output_of, run_to_end
from tests.slurm.jobs import SCRIPTS


def stub(directory: Path, name: str, script: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


@pytest.mark.parametrize("arguments", ["", " init_from=runs/base.sh/x data.workers=2"], ids=["23.02", "22.05"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_copy_of_a_script_finds_its_clone(script, arguments, tmp_path) -> None:
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
    done = run_to_end("bash", spool / "slurm_script", cwd=tmp_path, env=environment)
    # This is an error of launch.sh, so the copy has found it.
    assert (done.returncode, done.stderr) == (2, "error: VENV = /nowhere: no bin/activate there\n")


def run(script: str, *arguments: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    """Run a script as in a job, but without SLURM. If it accepts its arguments, it ends at the missing environment."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RUN", "SHARDS", "STAGE", "KARAT_HOME")}
    environment = {**kept, "SLURM_JOB_ID": "812", "VENV": "/nowhere", **settings}
    return run_to_end("bash", ROOT / "slurm" / script, *arguments, env=environment)


TRAINING = ("imagenet_fourier_karat.sh", "imagenet_vit_baseline.sh", "finetune.sh", "sweep_grid.sh")


@pytest.mark.parametrize("script", TRAINING)
@pytest.mark.parametrize(
    ("argument", "settings", "line"),
    [
        ("run.dir=runs/mine", {}, "error: run.dir=runs/mine: set RUN=DIR instead, "),
        ("data.path=/b", {"SHARDS": "/a"}, "error: data.path=/b beside SHARDS or STAGE: set SHARDS=DIR instead, "),
        ("data.path=/b", {"STAGE": "/disk"}, "error: data.path=/b beside SHARDS or STAGE: set SHARDS=DIR instead, "),
        ("data.path=/b", {}, "error: VENV = /nowhere: no bin/activate there"),
    ],
    ids=["run", "shards", "stage", "data alone"],
)
def test_what_the_script_reads_is_not_taken_as_an_override(script, argument, settings, line) -> None:
    done = run(script, "optim.lr=1e-3", argument, **settings)
    assert done.returncode == 2
    (shown,) = done.stderr.splitlines()
    assert shown.startswith(line)


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--val-fraction=0.1", "error: --val-fraction=0.1: each element of the array makes one split"),
        ("--split", "error: --split: set IMAGES, SHARDS and SPLITS instead of --src, --out and --split"),
        ("--shard-samples=20", "error: VENV = /nowhere: no bin/activate there"),
    ],
)
def test_the_preparation_refuses_options_that_it_sets(option, line) -> None:
    done = run("prepare_imagenet.sh", option)
    assert done.returncode == 2
    (shown,) = done.stderr.splitlines()
    assert shown.startswith(line)


@pytest.mark.parametrize("setting", ["SPARES", "IDLE_RESTARTS"])
def test_what_is_no_number_is_one_line(setting: str) -> None:
    done = run("evaluate.sh", **{setting: "-1"})
    assert (done.returncode, done.stderr) == (2, f"error: {setting} = -1: should be a whole number\n")


def test_modules_may_read_variables_that_are_unset(tmp_path: Path) -> None:
    (tmp_path / "modules").write_text('module() { echo "$2 $NOWHERE_SET"; }\n')
    done = run("evaluate.sh", MODULES="cuda/12.6", BASH_ENV=str(tmp_path / "modules"))
    assert done.stdout == "cuda/12.6 \n"
    assert done.stderr == "error: VENV = /nowhere: no bin/activate there\n"


@pytest.mark.parametrize("source", ["base", "base/"])
def test_a_fine_tuned_run_is_beside_its_source(source, tmp_path) -> None:
    (tmp_path / "base" / "checkpoints").mkdir(parents=True)
    # A stub of a container notes what would run in it. It fails at the check of the recipe, which ends the script.
    stub(tmp_path, "note", f'echo "$@" >>{tmp_path}/noted; case $* in *--version) ;; *) exit 2 ;; esac')
    run("finetune.sh", VENV="", CONTAINER=str(tmp_path / "note"), FROM=f"{tmp_path}/{source}")
    noted = (tmp_path / "noted").read_text()
    assert f" run.dir={tmp_path}/base-finetune " in noted
    assert " checkpoint.url= convert={} " in f"{noted.strip()} "  # not the source's own, which are in its recipe
    run("finetune.sh", VENV="", CONTAINER=str(tmp_path / "note"), FROM=f"{tmp_path}/{source}", RECIPE="own.yaml")
    assert "checkpoint.url" not in (tmp_path / "noted").read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("element", "job"),
    [({}, "812"), ({"SLURM_ARRAY_JOB_ID": "812", "SLURM_ARRAY_TASK_ID": "3"}, "812_3")],
    ids=["job", "element"],
)
def test_a_job_and_an_element_of_an_array_requeue_themselves(element: dict[str, str], job: str, tmp_path: Path) -> None:
    # For the array's own id squeue lists every element, and for a heterogeneous job each part. Its first call fails.
    stub(
        tmp_path,
        "squeue",
        f"mkdir {tmp_path}/asked_once && exit 1\n"
        f"case $* in *--jobs={job}\\ *) echo RUNNING; echo RUNNING ;; *) echo RUNNING; echo PENDING ;; esac",
    )
    stub(tmp_path, "sleep", ":")
    stub(tmp_path, "scontrol", f'echo "$@" >>{tmp_path}/asked; exit 1')
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "812", **element}
    done = run_to_end("bash", "-c", 'source slurm/launch.sh; requeue "told to stop"', env=environment)
    assert done.returncode == 75, done.stderr
    assert done.stdout.endswith(f"job {job}: told to stop; requeued\n")
    assert (tmp_path / "asked").read_text() == f"requeue {job}\n"


def in_a_job(commands: Path, run: Path, script: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    """Run a script that sources launch.sh in a job of one node. A stub of srun runs its command here."""
    stub(commands, "squeue", "echo RUNNING")
    stub(commands, "srun", 'while [ $# != 0 ] && [ "$1" != bash ]; do shift; done\nexec "$@"')
    environment = {
        **os.environ, "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}", "RUN": str(run),
        "SLURM_JOB_ID": "812", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "STALL_SECONDS": "0",
        "KARAT_HOME": str(ROOT), "PYTHONPATH": str(ROOT), **settings,
    }  # fmt: skip
    script = f"source slurm/launch.sh; PYTHON=(python); {script}"
    return run_to_end("bash", "-c", script, env=environment)


@pytest.mark.parametrize("call", [1, 4], ids=["the first", "another"])
def test_a_signal_before_a_step_begins_requeues_the_job(call: int, tmp_path: Path) -> None:
    # The signal comes while a start asks for its nodes. The ranks of the first start fail, those of the next succeed.
    stub(
        tmp_path,
        "scontrol",
        f"[ $1 = show ] || exit\necho n1; cd {tmp_path}; echo $* >>asked\n"
        f"[ $(wc -l <asked) != {call} ] || kill -USR2 $(cat job)",
    )
    stub(
        tmp_path,
        "agent",
        "logs=${KARAT_RANK_WRAPPER##*\t}; case $logs in *.1) code=0 ;; *) code=1 ;; esac\n"
        'touch "$logs/rank-00000.log"; echo "$code n1 1.0 0" >"$logs/rank-00000.exit"',
    )
    done = in_a_job(tmp_path, tmp_path / "run", f"echo $$ >{tmp_path}/job; KARAT=(agent); launch train recipe")
    assert done.returncode == 75, done.stderr
    assert done.stdout.endswith("told to stop before the start; requeued\n")
    assert len([*(tmp_path / "run" / "logs").glob("*/*.exit")]) == call // 4


def test_another_start_of_the_ranks_has_another_port(tmp_path: Path) -> None:
    stub(tmp_path, "scontrol", "echo n1")
    stub(
        tmp_path,
        "agent",
        f'logs=${{KARAT_RANK_WRAPPER##*\t}}; cd {tmp_path}; touch "$logs/rank-00000.log"\n'
        "echo $MASTER_PORT $SLURM_CPUS_PER_TASK >>ports\n"
        '[ $(wc -l <ports) = 2 ]; echo "$? n1 1.0 0" >"$logs/rank-00000.exit"',
    )
    done = in_a_job(tmp_path, tmp_path / "run", "KARAT=(agent); launch train recipe", SLURM_CPUS_PER_TASK="2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ports").read_text() == "20812\n21812\n"  # unset, or srun would warn of the agent's cores


def test_a_signal_while_the_nodes_wait_for_each_other_requeues_the_job(tmp_path: Path) -> None:
    stub(tmp_path, "scontrol", "[ $1 = show ] && echo n1")
    stub(tmp_path, "sleep", f'touch {tmp_path}/waits; exec /bin/sleep "$@"')
    until_it_waits = f"until [ -e {tmp_path}/waits ]; do /bin/sleep 0.02; done"
    stub(tmp_path, "agent", f"{until_it_waits}; kill -USR2 $(cat {tmp_path}/job); /bin/sleep 0.5; exit 75")
    done = in_a_job(tmp_path, tmp_path / "run", f"echo $$ >{tmp_path}/job; KARAT=(agent); launch train recipe")
    assert done.returncode == 75, done.stderr
    assert done.stdout.endswith("told to stop; requeued\n")


def test_a_signal_between_two_commands_requeues_the_job(tmp_path: Path) -> None:
    stub(tmp_path, "scontrol", "exit 1")
    done = in_a_job(tmp_path, tmp_path / "run", "run_alone true; kill -USR2 $$; run_alone true")
    assert done.returncode == 75, done.stderr
    assert done.stdout.endswith("told to stop; requeued\n")


@pytest.mark.slow
def test_ranks_find_a_run_with_a_name_that_is_not_ascii(tmp_path: Path) -> None:
    stub(tmp_path, "scontrol", "echo n1")
    run = tmp_path / "Müller's $run"
    done = in_a_job(tmp_path, run, "KARAT=(python -m karat_scale); launch train imagenet_vit_tiny --print", LC_ALL="C")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "name: imagenet_vit_tiny" in (run / "logs" / "812-0" / "rank-00000.log").read_text()


def with_three_nodes(script: str, second: str, third: str, directory: Path) -> str:
    """Run a script that sources launch.sh in a job of three nodes; return what it prints.

    `second` and `third` are what srun does on these nodes.
    """
    stub(directory, "scontrol", r"printf 'n1\nn2\nn3\n'")
    stub(directory, "srun", f"case $* in *=n2\\ *) {second} ;; *=n3\\ *) {third} ;; esac")
    environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-3]"}
    script = f"source slurm/launch.sh; PYTHON=(python) LOGS={directory} NODES=$'n1\\nn2'; {script}"
    # Its standard error is not captured, since a silent node's command keeps it open.
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, stdout=-1, text=True, check=False)
    return done.stdout


@pytest.mark.parametrize(
    ("needed", "second", "third", "found"),
    [
        (2, "sleep 60", ":", "n2: n1 ,n3 ,"),
        (3, "sleep 1", ":", ": n1 ,n2 ,n3 ,"),
        (2, "sleep 1", "echo GPU 1; echo GPU 2", ": n1 ,n2 ,n3 GPU 1; GPU 2,"),
        (1, "sleep 60", "exit 1", "n2,n3: n1 ,"),
    ],
    ids=["enough others", "needed", "needed for an unsound one", "no answer"],
)
def test_a_silent_node_is_waited_for_only_if_it_is_needed(
    needed: int, second: str, third: str, found: str, tmp_path: Path
) -> None:
    script = f"look {needed} 1; ANSWERS=$(sort <<<\"${{ANSWERS%$'\\n'}}\"); echo $LOST: ${{ANSWERS//$'\\n'/,}},"
    assert with_three_nodes(script, second, third, tmp_path) == f"{found}\n"


@pytest.mark.parametrize("silent", ["n2", "n3"])
def test_a_step_is_left_when_only_a_lost_node_holds_it_up(silent: str, tmp_path: Path) -> None:
    # One of two ranks has failed, and n3 is a spare: without n2, there is no rank to wait for.
    (tmp_path / "rank-00000.exit").write_text("76 n1 1.0 0\n")
    script = (
        f'sleep() {{ touch {tmp_path}/waits; command sleep "$@"; }}; '  # it waits for the nodes that answer
        f"(until [[ -e {tmp_path}/waits ]]; do command sleep 0.05; done; echo the step ended) & STEP=$!; leave_step 2 1"
    )
    shown = with_three_nodes(script, *("sleep 60" if node == silent else ":" for node in ("n2", "n3")), tmp_path)
    assert shown == ("" if silent == "n2" else "the step ended\n")


@pytest.mark.parametrize(("code", "said"), [(137, "killed by signal 9 (KILL)"), (255, "exit code 255: it broke")])
def test_only_codes_of_signals_are_told_as_signals(code: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "rank-00000.log").write_text("it broke\n")
    assert said in with_three_nodes(f"describe_failure '{code} n1 1.0 0'; echo $FAILURE", ":", ":", tmp_path)


def test_a_split_is_joined_without_locks_and_the_users_workers_count(image_folder: Path, tmp_path: Path) -> None:
    # As on a shared file system without locks.
    stub(tmp_path, "flock", "echo 'flock: .lock: Function not implemented' >&2; exit 65")
    # A stub of a container notes what runs in it.
    stub(tmp_path, "note", f'echo "$@" >>{tmp_path}/noted; exec "$@"')
    kept = {key: value for key, value in os.environ.items() if key not in ("SPLITS", "KARAT_HOME")}
    shards = tmp_path / "shards"
    environment = {
        **kept, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{kept['PATH']}", "CONTAINER": "note",
        "SLURM_JOB_ID": "813", "SLURM_ARRAY_JOB_ID": "812", "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_CPUS_PER_TASK": "16", "IMAGES": str(image_folder), "SHARDS": str(shards),
    }  # fmt: skip
    output_of("bash", "slurm/prepare_imagenet.sh", "--workers", "1", env=environment)
    assert list(read_dataset_record(shards).splits) == ["val"]
    assert not list(shards.glob(".*"))
    (made,) = [line for line in (tmp_path / "noted").read_text().splitlines() if "make_webdataset" in line]
    # argparse takes the last of several.
    assert re.findall(r"--workers (\d+)", made)[-1] == "1"
