import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from karat_scale.engine.distributed import World, _first_slurm_host, default_port, launch_environment, start
from karat_scale.foundation.errors import UserError
from tests.conftest import free_port, karat_environment


def started(script: str, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """A process that runs a script, as one rank."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env={**karat_environment(), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1)),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, (3, 4, 1)),
        # The batch script and an salloc shell know the job's tasks, yet are one process.
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 1, 0)),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 1, 0)),
    ],
)
def test_ranks_are_read_from_the_launcher(environ: dict[str, str], expected: tuple[int, int, int]) -> None:
    assert launch_environment(environ) == expected


def test_one_process_agrees_with_itself(world: World) -> None:
    assert world.is_main
    assert world.any(True)
    assert not world.any(False)
    assert world.max(7) == 7
    assert world.broadcast("text") == "text"
    assert world.gather(3) == [3]


def test_the_first_host_is_that_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"  # SLURM's, which prints a host a line
    scontrol.write_text('#!/bin/sh\necho "$3" | tr , "\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node1,node2")
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    assert _first_slurm_host() == "node1"
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node2")  # srun --nodelist=node2
    assert _first_slurm_host() == "node2"


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.multiprocess
def test_an_address_without_a_port_is_enough_to_meet() -> None:
    # As srun without the launch wrapper, the port is that of the job: of one whose port is free.
    job = next(str(port - 20000) for port in random.sample(range(20000, 30000), 100) if is_free(port))
    assert int(default_port({"SLURM_JOB_ID": job})) == int(job) + 20000
    given = {"MASTER_ADDR": "127.0.0.1", "SLURM_JOB_ID": job, "WORLD_SIZE": "2"}
    script = "from karat_scale.engine import distributed as d; print(d.start('cpu').gather('here')); d.stop()"
    ranks = [started(script, **given, RANK=str(rank)) for rank in range(2)]
    for rank in ranks:
        shown, complaint = rank.communicate(timeout=120)
        assert shown == "['here', 'here']\n", complaint


OWN_GROUP = """
import torch
from deepspeed.utils import groups
from karat_scale.engine.deepspeed_internals import share_world_group
from karat_scale.engine.distributed import joined
with joined("cpu", 7) as world:
    share_world_group(world.size, world.patience)
    print(groups._WORLD_GROUP._get_backend(world.device).options._timeout)
"""


@pytest.mark.multiprocess
def test_deepspeed_waits_as_long_as_the_recipe_says() -> None:
    """Gradients are reduced in a group of DeepSpeed's own."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [started(OWN_GROUP, **meeting, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    for rank in ranks:
        shown, complaint = rank.communicate(timeout=120)
        assert shown.splitlines()[-1] == "0:07:00", complaint


WAITS = """
import sys, time
from datetime import timedelta
from karat_scale.engine.peers import Place, meet
rank = int(sys.argv[2])
store = meet(Place("127.0.0.1", int(sys.argv[1]), rank, 2, timedelta(minutes=5), 0))
if rank == 0:
    time.sleep(12)  # longer than one call to the store may take while the ranks meet
    store.set("late", "here")
print(store.get("late").decode())
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_group_waits_for_a_slow_rank_as_long_as_the_recipe_says() -> None:
    port = str(free_port())
    ranks = [started(WAITS, port, str(rank)) for rank in range(2)]
    for rank in ranks:
        shown, complaint = rank.communicate(timeout=120)
        assert shown == "here\n", complaint


@pytest.mark.parametrize("port", ["x", "0", "70000", "-1"])
def test_a_port_that_is_none_is_refused(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)  # another test's group may still be there
    with pytest.raises(UserError, match=f"MASTER_PORT = {port}: should be a number"):
        start("cpu")
