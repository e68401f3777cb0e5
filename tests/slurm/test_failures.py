"""A job that cannot go on ends, and its last line says why and where."""

import os
import re
import shutil
import threading
from pathlib import Path

import psutil
import pytest

from karat_scale.engine.heartbeat import read_signs
from tests.conftest import wait_until
from tests.slurm.cluster import Cluster
from tests.slurm.training import Train, assert_ends_like, process_of, run_of, wait_for


def test_restarts_that_save_nothing_new_end_the_job(train: Train, cluster: Cluster) -> None:
    # When SLURM requeues a job, running ranks have KillWait to save. This model takes longer to build.
    job = train("model.embed_dim=768", "model.depth=24", IDLE_RESTARTS="1")
    for start in (1, 2):
        wait_until(lambda start=start: f"start {start}:" in job.log, 90, f"start {start}")
        cluster.command("scontrol", "requeue", job.id)
    assert job.wait() == "FAILED 1", job.log
    assert "2 starts without a new checkpoint (the newest is none)" in job.log.splitlines()[-1]
    assert job.starts == 3


@pytest.mark.parametrize("victim", ["rank", "agent"])
def test_a_killed_rank_or_agent_starts_again_in_the_job(train: Train, on_two_nodes: Path, victim: str) -> None:
    job = train("resume.mode=never", options=("--nodes=2",))  # this applies only to the first start
    wait_for(job, "checkpoint", 2)
    rank = process_of(job, rank=1)
    if victim == "agent":
        next(parent for parent in rank.parents() if "launch" in parent.cmdline()).kill()
    else:
        rank.kill()
    assert_ends_like(job, on_two_nodes)
    assert job.starts == 1
    assert "; the ranks start again" in job.log


def test_the_first_rank_to_fail_has_the_last_word(train) -> None:
    own = ("train.epochs=200", "train.eval_every_epochs=200", "checkpoint.every_steps=null")
    job = train(*own, options=("--nodes=2",), IDLE_RESTARTS="0")
    wait_for(job, "train", 2)
    process_of(job, rank=1).kill()
    assert job.wait() == "FAILED 1", job.log
    assert "rank 1 on 127.0.0.2 was killed by signal 9 (KILL)" in job.log.splitlines()[-1]


def test_an_exception_has_the_last_word(train, tmp_path) -> None:
    (tmp_path / "own_basis.py").write_text(
        "from karat_scale.attention.bases.polynomials import Chebyshev\n\n\n"
        "class Broken(Chebyshev):\n"
        "    def value(self, x):\n"
        "        if x.dim() > 1:  # in training, not when the recipe is checked\n"
        "            raise ZeroDivisionError('a mistake in a basis')\n"
        "        return super().value(x)\n"
    )
    job = train("attention.basis=own_basis:Broken", PYTHONPATH=path_with(tmp_path), IDLE_RESTARTS="0")
    assert job.wait() == "FAILED 1", job.log
    last = "rank 0 on 127.0.0.1 failed first, exit code 1: ZeroDivisionError: a mistake in a basis"
    assert job.log.splitlines()[-1] == last
    assert job.starts == 1


def test_a_first_checkpoint_that_cannot_be_saved_ends_the_job(train) -> None:
    job = train("train.epochs=40", "train.eval_every_epochs=40", "checkpoint.every_steps=null")
    wait_for(job, "train", 2)
    checkpoints = run_of(job) / "checkpoints"
    shutil.rmtree(checkpoints)
    checkpoints.write_text("a file, so nothing can be saved")
    assert job.wait() == "FAILED 2", job.log
    last = job.log.splitlines()[-1]
    assert last.startswith("rank 0 on 127.0.0.1 failed first, exit code 2: error: run.dir = "), last
    assert "no checkpoint could be saved" in last
    assert job.starts == 1


def test_a_rank_that_hangs_is_named_and_ends_the_job(train) -> None:
    own = ("train.epochs=200", "train.eval_every_epochs=200", "checkpoint.every_steps=null")
    job = train(*own, options=("--nodes=2",), STALL_SECONDS="20,start=600", IDLE_RESTARTS="0")
    # A rank that starts has 600 s, so both must train first.
    wait_until(lambda: [sign.step > 0 for sign in read_signs(run_of(job))] == [True] * 2, 120, "signs of steps")
    process_of(job, rank=1).suspend()
    assert job.wait() == "FAILED 1", job.log
    last = job.log.splitlines()[-1]
    assert last.startswith("error: rank 1 on 127.0.0.2 (process "), job.log
    assert "stopped or gone, no stacks" in last
    # The rank that waited shows where it waited.
    assert "Timeout (0:00:20)!" in job.log
    assert 'training/trainer.py", line' in job.log


def test_a_rank_that_hangs_in_a_read_is_named_with_its_stacks(train, tmp_path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # a reader waits for a writer, as for a file system that does not answer
    (tmp_path / "stuck_basis.py").write_text(
        "import os\n"
        "from karat_scale.attention.bases.polynomials import Chebyshev\n\n\n"
        "class Stuck(Chebyshev):\n"
        "    def value(self, x):\n"
        "        if x.dim() > 1 and os.environ.get('RANK') == '1':  # in training, not when the recipe is checked\n"
        f"            open({str(pipe)!r}).read()\n"
        "        return super().value(x)\n"
    )
    settings = {"STALL_SECONDS": "15,start=600", "PYTHONPATH": path_with(tmp_path), "IDLE_RESTARTS": "0"}
    job = train("attention.basis=stuck_basis:Stuck", options=("--nodes=2",), **settings)
    assert job.wait() == "FAILED 1", job.log
    last = job.log.splitlines()[-1]
    assert re.match(r"error: rank 1 on 127.0.0.2 .* has made no progress for", last), job.log
    assert "(its stacks are in its log); 1 of 2 ranks wait for it" in last
    (log,) = run_of(job).glob("logs/*/rank-00001.log")
    assert 'stuck_basis.py", line' in log.read_text()


def test_a_rank_that_is_slow_is_named_while_the_job_continues(train) -> None:
    wide = ("model.embed_dim=256", "model.depth=6", "checkpoint.every_steps=null", "train.epochs=40")
    job = train(*wide, "train.eval_every_epochs=40", options=("--nodes=2",))
    wait_for(job, "train", 2)
    ended = threading.Event()
    hindrance = threading.Thread(target=hold_up, args=(process_of(job, rank=1), ended))
    hindrance.start()
    try:
        wait_until(lambda: "slow: " in job.log or job.ended, 60, "the slow rank is named")
    finally:
        ended.set()
        hindrance.join()
    job.cluster.command("scancel", job.id)
    assert re.search(r"slow: rank 1 on 127.0.0.2 takes .* times the others", job.log), job.log
    assert "slow: rank 0" not in job.log


def hold_up(process: psutil.Process, ended: threading.Event) -> None:
    """Let a process run for a fifth of the time."""
    while not ended.wait(0.03):
        process.suspend()
        ended.wait(0.12)
        process.resume()


def path_with(folder: Path) -> str:
    """Return the import path with a folder of modules before all others."""
    return f"{folder}:{os.environ.get('PYTHONPATH', '')}"
