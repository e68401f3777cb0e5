"""Tests of how ranks meet, which GPU each takes, and which collective a rank had entered when it stalled."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from karat_scale.engine import distributed
from karat_scale.engine.distributed import (
    _first_slurm_host,
    _newest_record,
    default_port,
    gpu_index,
    have_a_gpu_each,
    refuse_shared,
    start,
    tell_deepspeed,
)
from karat_scale.engine.peers import explaining
from karat_scale.foundation.errors import PeerError, UserError
from karat_scale.foundation.machine import launch_environment
from tests.conftest import ROOT, free_port, karat_environment, output_of, rank_environments, run_to_end
from tests.warm import run_code


def test_a_rank_that_fails_on_a_gpu_leaves_nccl_as_it_is(monkeypatch) -> None:
    """Leaving NCCL's group would wait for the other ranks, which wait for this one until its process ends."""
    left: list[str] = []
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append("left"))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for backend, is_orderly, is_left in (("nccl", False, False), ("nccl", True, True), ("gloo", False, True)):
        monkeypatch.setattr(dist, "get_backend", lambda backend=backend: backend)
        left.clear()
        distributed.stop(is_orderly)
        assert bool(left) == is_left


def test_the_launchers_local_rank_comes_back() -> None:
    code = """
        import os
        from karat_scale.engine.distributed import joined
        with joined("cpu"):
            os.environ["LOCAL_RANK"] = "7"  # as it is with the number of a GPU
        print(os.environ["LOCAL_RANK"])
    """
    environment = {**karat_environment(), "LOCAL_RANK": "0"}
    assert output_of(sys.executable, "-c", textwrap.dedent(code), env=environment).strip() == "0"


@pytest.mark.parametrize(
    ("error", "is_a_loss"),
    [
        (dist.DistBackendError("NCCL error in: x.cpp:94, remote process exited or there was a network error"), True),
        (dist.DistBackendError("NCCL error in: x.cpp:94\nLast error:\nNo space left on device /dev/shm"), False),
        (dist.DistBackendError("retrieving ncclUniqueId from [0], but store->get('0') got error: it was closed"), True),
        (dist.DistNetworkError("Connection reset by peer"), True),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:5"), True),
        (RuntimeError("PytorchStreamReader failed reading zip archive /data/peer_review/gloo/a.pt"), False),
        (OSError("Connection reset by peer"), False),
    ],
)
def test_only_a_lost_connection_between_ranks_is_the_end_of_another(error: Exception, is_a_loss: bool) -> None:
    with pytest.raises(PeerError if is_a_loss else type(error)) as raised, explaining():
        raise error
    assert isinstance(raised.value, PeerError) == is_a_loss


def two_ranks(script: str, *arguments: object, **environment: str) -> list[str]:
    """Run a script as two ranks on this machine; return the lines that they print, those of rank 0 first."""
    given = {**karat_environment(), "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", **environment}
    ranks = [{**given, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    done = run_code(script, *arguments, environments=ranks, directory=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_ranks_are_read_from_the_launcher() -> None:
    for environ, expected in (
        ({}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1)),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, (3, 4, 1)),
        # The batch script and an salloc shell know the job's tasks, yet are one process.
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 1, 0)),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 1, 0)),
        # A job's script may export the size for other trainers.
        ({"WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, (3, 4, 1)),
        ({"WORLD_SIZE": "1"}, (0, 1, 0)),
    ):
        assert launch_environment(environ) == expected


def test_what_a_launcher_got_wrong_is_named() -> None:
    for environ, said in (
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK = '': should be a whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK = '-1': should be a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = 2: should be less than WORLD_SIZE = 2"),
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE = 2, but RANK is not set; use karat launch --ranks 2 COMMAND, torchrun or srun",
        ),
        ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS = 'x': should be a whole number"),
    ):
        with pytest.raises(UserError, match=f"^{said}"):
            launch_environment(environ)
    with pytest.raises(UserError, match=r"^SLURM_JOB_ID = '7a': should be a whole number"):
        default_port({"SLURM_JOB_ID": "7a"})


def test_one_process_agrees_with_itself(world) -> None:
    assert world.is_main
    assert world.any(True)
    assert not world.any(False)
    assert world.max(7) == 7
    assert world.broadcast("text") == "text"
    assert world.gather(3) == [3]


def test_the_first_host_is_that_of_the_step(tmp_path, monkeypatch) -> None:
    scontrol = tmp_path / "scontrol"  # as SLURM's, it prints one host per line
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
    # With srun and without the launch wrapper, the port follows from the job's number. This job's port is free.
    job = next(str(port - 20000) for port in random.sample(range(20000, 30000), 100) if is_free(port))
    assert int(default_port({"SLURM_JOB_ID": job})) == int(job) + 20000
    script = "from karat_scale.engine import distributed as d; print(d.start('cpu').gather('here')); d.stop()"
    assert two_ranks(script, SLURM_JOB_ID=job) == ["['here', 'here']"] * 2


OWN_GROUP = """
import torch
from deepspeed.utils import groups
from karat_scale.engine.deepspeed_internals import share_world_group
from karat_scale.engine.distributed import joined
with joined("cpu", 7) as world:
    share_world_group(world.size, world.patience)
    for group in (torch.distributed.group.WORLD, groups._WORLD_GROUP):
        print(group._get_backend(world.device).options._timeout)
"""


@pytest.mark.multiprocess
def test_deepspeed_waits_as_long_as_the_recipe_says() -> None:
    """DeepSpeed reduces gradients in a group of its own, which gets the recipe's timeout, too."""
    assert two_ranks(OWN_GROUP, MASTER_PORT=str(free_port())) == ["0:07:00"] * 4


KILLED = """
import os, signal, sys
import torch.distributed as dist
from datetime import timedelta
from karat_scale.engine import deepspeed_internals, distributed
from karat_scale.foundation.errors import PeerError
distributed.CONNECTING, deepspeed_internals.CONNECTING = timedelta(seconds=2), timedelta(minutes=7)
if os.environ["RANK"] == "1":
    setattr(dist, sys.argv[1], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
try:
    with distributed.joined("cpu", 7) as world:
        deepspeed_internals.share_world_group(world.size, world.patience)
except PeerError:
    print("lost", flush=True)
os._exit(0)
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("maker", ["init_process_group", "new_group"])
def test_a_rank_that_is_killed_while_a_group_is_made_is_not_awaited_as_long_as_a_slow_one(maker) -> None:
    """While the second group is made, the first one's connections tell of it at once."""
    given = {**karat_environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", KILLED, maker]  # alone: a launcher would end both
    ranks = [
        subprocess.Popen(command, env={**given, "RANK": rank, "LOCAL_RANK": rank}, cwd=ROOT, stdout=subprocess.PIPE)
        for rank in "01"
    ]
    left, killed = (rank.communicate(timeout=300)[0] for rank in ranks)  # less than the 7 minutes for a slow one
    assert (left, killed) == (b"lost\n", b"")
    assert [rank.returncode for rank in ranks] == [0, -signal.SIGKILL]


WAITS = """
import os, time
from datetime import timedelta
from karat_scale.engine.peers import Place, meet
rank = int(os.environ["RANK"])
store = meet(Place("127.0.0.1", int(os.environ["MASTER_PORT"]), rank, 2, timedelta(minutes=5), "0"))
if rank == 0:
    time.sleep(12)  # longer than one call to the store may take while the ranks meet
    store.set("late", "here")
print(store.get("late").decode())
if rank == 0:
    store.get("read")  # rank 0 keeps the store, so it must not end before the other has read it
else:
    store.set("read", "yes")
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_group_waits_for_a_slow_rank_as_long_as_the_recipe_says() -> None:
    assert two_ranks(WAITS, MASTER_PORT=str(free_port())) == ["here"] * 2


def test_a_port_that_is_none_is_refused(monkeypatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)  # another test's group may still be there
    for port in ("x", "0", "70000", "-1"):
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(UserError, match=f"MASTER_PORT = {port}: should be a number"):
            start("cpu")


def test_a_rank_takes_its_own_gpu_and_more_ranks_than_gpus_are_refused() -> None:
    assert [gpu_index(*case) for case in ((0, 1), (3, 4), (3, 1))] == [0, 3, 0]  # alone, all shown, its own shown
    with pytest.raises(UserError, match="local rank 2 has no GPU: this node shows 2; start one task per GPU"):
        gpu_index(2, 2)
    refuse_shared(["node1 A100 GPU-1", "node1 A100 GPU-2", "node2 A100 GPU-3"])
    with pytest.raises(UserError, match="ranks 1 and 2 have one GPU, node1 A100 GPU-2; start one task per GPU"):
        refuse_shared(["node1 A100 GPU-1", "node1 A100 GPU-2", "node1 A100 GPU-2"])


def test_every_rank_hears_that_two_have_one_gpu() -> None:
    port = free_port()

    def rank_hears(rank: int) -> None:
        store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
        try:
            if rank == 2:
                time.sleep(0.5)  # rank 0, which keeps the store, must not leave before the others have read it
            have_a_gpu_each(dist.PrefixStore("cards", store), rank, 3, f"A100 GPU-{rank % 2}")
        finally:
            del store

    with ThreadPoolExecutor(3) as ranks:
        told = [ranks.submit(rank_hears, rank) for rank in range(3)]
    for one in told:
        with pytest.raises(UserError, match="ranks 0 and 2 have one GPU, A100 GPU-0"):
            one.result()


ON_THE_CPU = """
import sys
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
from karat_scale.engine import distributed
from karat_scale.training import run  # all that `karat train` imports
from karat_scale.training.tasks.classification import task  # and this
assert "deepspeed" not in sys.modules
distributed.start("cpu")
from deepspeed.accelerator import get_accelerator
print(get_accelerator().device_name())
distributed.stop()
"""


@pytest.mark.slow
def test_run_device_cpu_holds_for_deepspeed_too_where_there_is_a_gpu() -> None:
    given = {key: value for key, value in karat_environment().items() if key != "DS_ACCELERATOR"}
    assert output_of(sys.executable, "-c", ON_THE_CPU, env=given) == "cpu\n"


def test_another_device_than_deepspeed_was_imported_for_is_one_line(world) -> None:
    import deepspeed  # noqa: F401

    try:
        with pytest.raises(UserError, match=r"run\.device = cuda, but DeepSpeed was imported for cpu in this process;"):
            tell_deepspeed("cuda")
    finally:
        tell_deepspeed("cpu")


@pytest.mark.parametrize("size", [1, 2])
def test_nccl_is_told_its_gpu_if_it_has_peers(monkeypatch, size) -> None:
    """A single rank leaves NCCL unbound: bound to a GPU, it would split its communicator for each DeepSpeed group."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: told.append({"backend": backend, **how}))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(distributed, "meet", lambda place: dist.HashStore())  # of ranks that do not exist here
    monkeypatch.setattr(dist, "new_group", lambda **how: None)
    monkeypatch.setattr(distributed, "card", str)
    monkeypatch.setattr(distributed, "have_a_gpu_each", lambda *ranks: None)
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        distributed._join(0, size, device, timedelta(minutes=1), lambda: None)
    bound = torch.device("cuda", 1) if size > 1 else None
    assert [(how["backend"], how.get("device_id")) for how in told] == [("nccl", bound), ("gloo", None)]


@pytest.mark.parametrize(("nccl", "gloo", "newer"), [(5, 3, "nccl"), (3, 5, "fr"), (None, 3, "fr"), (3, None, "nccl")])
def test_of_two_records_the_newer_is_written(nccl, gloo, newer) -> None:
    """The newer record is written. A torch for CUDA has both records, and one for CPUs lacks NCCL's."""

    def record(last: int | None) -> bytes:
        times = [] if last is None else [0, last]
        return json.dumps({"entries": [{"time_created_ns": time} for time in times]}).encode()

    torch_c = SimpleNamespace(
        _dump_nccl_trace_json=lambda: record(nccl),
        _dump_fr_trace_json=lambda: record(gloo),
        _dump_nccl_trace=lambda: b"nccl",
        _dump_fr_trace=lambda: b"fr",
    )
    assert _newest_record(torch_c)[1] == newer.encode()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_rank_that_is_missing_from_a_collective_is_named(tmp_path) -> None:
    program = textwrap.dedent(
        f"""
        import os, time
        from pathlib import Path
        import torch
        from karat_scale.engine.heartbeat import Heartbeat
        from karat_scale.engine import distributed
        from karat_scale.engine.distributed import write_flight_record

        world = distributed.start("cpu")
        heartbeat = Heartbeat(Path({str(tmp_path)!r}), world.rank, "", write_flight_record).start()
        world.sum(torch.ones(2))
        heartbeat.beat("forward", 1)
        written = Path({str(tmp_path)!r}) / "diagnostics" / f"flight-{{1 - world.rank}}"
        if world.rank == 0:
            world.sum(torch.ones(3))  # rank 1 comes late: after both have written
        else:
            while not written.is_file() or not written.with_name("flight-1").is_file():
                time.sleep(0.05)
            world.sum(torch.ones(3))
        heartbeat.stop()
        distributed.stop()
        """
    )
    environments = [{**each, "KARAT_STALL_SECONDS": "900,step=0.5"} for each in rank_environments(2)]
    done = run_code(program, environments=environments, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    last = [
        int(re.search(rf"rank {number}: its last collective is number (\d+), gloo:all_reduce", done.stderr)[1])
        for number in range(2)
    ]
    assert last[0] == last[1] + 1  # rank 1 has not entered the one that rank 0 waits in
    assert all((tmp_path / "diagnostics" / f"flight-{rank}").stat().st_size for rank in range(2))


@pytest.mark.multiprocess
def test_all_ranks_evaluate_with_the_statistics_of_the_first(tmp_path) -> None:
    program = textwrap.dedent(
        """
        from types import SimpleNamespace
        from torch import nn
        from karat_scale.engine import distributed
        from karat_scale.engine.engine import Engine

        world = distributed.start("cpu")
        norm = nn.BatchNorm2d(2)
        norm.running_mean += world.rank
        Engine.share_statistics(SimpleNamespace(statistics=[*norm.buffers()]))
        print(world.gather(norm.running_mean.tolist()))
        distributed.stop()
        """
    )
    done = run_code(program, environments=rank_environments(2), directory=tmp_path)
    assert done.stdout.count("[[0.0, 0.0], [0.0, 0.0]]") == 2, done.stdout + done.stderr


# Root has no limit on threads. This user has one, and may read all files that the tests read.
AS_ANOTHER = (
    *("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"),
    *("--inh-caps=+dac_override,+dac_read_search", "--ambient-caps=+dac_override,+dac_read_search"),
)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2, 12])
def test_too_few_threads_are_one_line_and_no_hang(limit, tmp_path) -> None:
    if os.getuid() != 0 or subprocess.run([*AS_ANOTHER, "true"], capture_output=True).returncode:
        pytest.skip("changing the user needs root and setpriv")
    tmp_path.chmod(0o777)
    train = (
        *(sys.executable, "-m", "karat_scale", "train", "fashion_mnist_demo", "data.backend=synthetic"),
        *("data.synthetic_samples=64", "train.global_batch=32", "train.max_steps=2", f"run.dir={tmp_path / 'run'}"),
    )
    command = (*AS_ANOTHER, "bash", "-c", f'ulimit -u {limit}; exec "$@"', "bash", *train)
    done = run_to_end(*command, env={**karat_environment(), "HOME": str(tmp_path)}, cwd=tmp_path, timeout=120)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "OpenBLAS" not in line]
    assert line.startswith("error: no more processes or threads; raise `ulimit -u`")


OF_ONE_ELEMENT = """
import json, os, sys, torch
from torch import nn
from karat_scale.commands.measure.step import synthetic_recipe
from karat_scale.engine import distributed
from karat_scale.engine.engine import Engine
config, path = sys.argv[1:]
if config == "zero3":
    zero = {"stage": 3, "reduce_bucket_size": 1, "stage3_param_persistence_threshold": 0}
    config = f"{path}/zero3.{os.environ['RANK']}.json"
    with open(config, "w") as file:
        json.dump({"zero_optimization": {**zero, "contiguous_gradients": False}}, file)
world = distributed.start("cpu")
recipe = synthetic_recipe("unused", "x", run={"device": "cpu"}, train={"global_batch": 8}, deepspeed={"config": config})
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 1))
groups = [{"params": list(model.parameters()), "weight_decay": 0.0, "lr_scale": 1.0}]
engine, losses = Engine(model, recipe, world, 2, groups=groups), []
for _ in range(2):
    for _ in range(2):
        loss = engine.forward(torch.randn(2, 12)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
print(losses)
"""


@pytest.mark.multiprocess
def test_a_rank_may_have_no_part_of_what_a_bucket_of_stage_3_holds(tmp_path) -> None:
    whole, parts = (two_ranks(OF_ONE_ELEMENT, config, tmp_path) for config in ("zero0", "zero3"))
    assert [json.loads(line) for line in parts] == [pytest.approx(json.loads(line)) for line in whole]
