"""`karat launch`: real ranks, real failures and real signals."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from karat_scale.commands import launch
from karat_scale.commands.cli import build_parser
from karat_scale.commands.launch import default_ranks, say_to_launcher
from karat_scale.commands.parsers.training import trained_directory
from karat_scale.engine.heartbeat import read_signs
from karat_scale.foundation.errors import EXIT_LOST_PEER, UserError
from tests.conftest import SMALL, events, free_port, karat_command, karat_environment, run_to_end, summary, wait_until
from tests.data.backends.helpers import running
from tests.training.runs import assert_same_run

LAUNCH = (sys.executable, "-m", "karat_scale", "launch", "--ranks")
QUICK = ("schedule.warmup_epochs=0", "data.workers=0", "train.epochs=2", "checkpoint.every_minutes=null")


@pytest.fixture
def recipe(shards: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(f"data: {{path: {shards}}}\n")
    return path


@pytest.mark.parametrize(
    ("visible", "ranks"), [("0,1", 2), ("3", 1), ("GPU-8a, GPU-9b", 2), ("0,-1,2", 1), ("", 1), ("-1", 1)]
)
def test_one_rank_for_each_gpu_that_cuda_shows(visible: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert default_ranks() == ranks


def test_rocms_lists_count_as_cudas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "4,5,6")
    assert default_ranks() == 3
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0,2")  # of those three
    assert default_ranks() == 2


@pytest.mark.parametrize(("nvidia", "amd", "ranks"), [(2, 0, 2), (0, 2, 2), (2, 1, 2), (0, 0, 1)])
def test_without_a_list_one_rank_for_each_gpu_of_the_machine(nvidia, amd, ranks, tmp_path, monkeypatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{number}" for number in range(nvidia))):
        (tmp_path / name).touch()
    for number, gpu_id in enumerate([0, 0, *range(51110, 51110 + amd)]):  # two processors first
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "gpu_id").write_text(f"{gpu_id}\n")
    (tmp_path / "9" / "gpu_id").mkdir(parents=True)  # cannot be read, as the GPU of another job
    monkeypatch.setattr(launch, "_NVIDIA", tmp_path)
    monkeypatch.setattr(launch, "_AMD", tmp_path)
    assert default_ranks() == ranks


def start(recipe: Path, *overrides: str, ranks: int = 2, **environment: str) -> "subprocess.Popen[str]":
    command = [
        *LAUNCH,
        str(ranks),
        "train",
        str(recipe),
        *SMALL,
        *QUICK,
        f"run.dir={recipe.parent / 'run'}",
        *overrides,
    ]
    return subprocess.Popen(command, env={**karat_environment(), **environment}, stderr=subprocess.PIPE, text=True)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    _, error = process.communicate(timeout=300)
    return process.returncode, error


def ranks_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_an_error_of_all_ranks_is_said_once(recipe: Path) -> None:
    code, error = ended(start(recipe, "data.path=/nowhere"))
    assert code == 2
    assert error.strip().splitlines() == [
        "error: data.path = /nowhere is not a directory; set it to a directory made by karat prepare webdataset"
    ]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_torchrun_ends_with_the_error_and_no_rank_says_it_before(recipe: Path) -> None:
    arguments = ["train", str(recipe), *SMALL, *QUICK, "data.path=/nowhere", f"run.dir={recipe.parent / 'run'}"]
    done = run_to_end(*karat_command(arguments, processes=2))
    before, _, after = done.stderr.partition("Traceback")
    assert "/nowhere" not in before
    assert "error: data.path = /nowhere is not a directory" in after.strip().splitlines()[-2]


def test_torch_reads_the_error_that_is_left_to_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert say_to_launcher('no such "place"')
    assert ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(file)).message == 'error: no such "place"'


def test_a_rank_that_lost_another_has_not_failed_first(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    file.write_text(json.dumps({"message": "error: another rank has ended", "timestamp": 1}))
    lost = ProcessFailure(local_rank=0, pid=1, exitcode=EXIT_LOST_PEER, error_file=str(file))
    killed = ProcessFailure(local_rank=1, pid=2, exitcode=-signal.SIGKILL, error_file=str(tmp_path / "none"))
    assert launch._first_failure({0: lost, 1: killed}) == (137, "rank 1 was ended by SIGKILL")
    assert launch._first_failure({0: lost}) == (1, "rank 0: another rank has ended")


def test_a_step_of_srun_has_one_agent_on_each_node() -> None:
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}
    with pytest.raises(UserError, match="8 of these on 2 nodes; start one on each: --ntasks-per-node=1"):
        launch._node_of_step(step)
    with pytest.raises(UserError, match="SLURM_STEP_NUM_NODES = 'two': should be a whole number; unset it, or correct"):
        launch._node_of_step(step | {"SLURM_STEP_NUM_NODES": "two"})


@pytest.mark.parametrize(
    ("arguments", "trained"),
    [
        (["train", "cifar10_vit_tiny", "run.dir=a"], "a"),
        (["convert", "timm:vit_tiny_patch16_224", "cifar10_vit_tiny", "attention.kind=karat", "run.dir=a"], "a"),
        (["convert", "timm:vit_tiny_patch16_224", "cifar10_vit_tiny", "--survey"], None),
        (["train", "cifar10_vit_tiny", "--print"], None),
        (["train", "imagenet_vit_tiny", "run.dir=~/a"], str(Path("~/a").expanduser())),
        (["detect", "some/run", "--eval"], None),
        (["eval", "some/run"], None),
    ],
)
def test_only_a_command_that_trains_is_started_again(arguments: list[str], trained: str | None) -> None:
    found = trained_directory(build_parser().parse_args(arguments))
    assert (found and str(found)) == trained


def test_a_wrong_limit_of_stalls_is_one_line(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It sets variables for ranks, which no other test may see.
    monkeypatch.setattr(os, "environ", {**os.environ, "KARAT_STALL_SECONDS": "15m"})
    with pytest.raises(UserError, match="KARAT_STALL_SECONDS: '15m' should be seconds"):
        launch.launch(["train", str(recipe)], 1, True, recipe.parent)


def node_of_two(number: int, port: int) -> dict[str, str]:
    """Return the variables of one of two nodes in a step of srun, and those that say where the nodes meet."""
    node = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3"}
    return {**node, "SLURM_PROCID": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_nodes_of_srun_are_one_start_and_begin_again_together(recipe: Path, tmp_path: Path) -> None:
    own = ("train.epochs=60", "checkpoint.every_steps=4", "train.eval_every_epochs=60")
    with socket.socket() as neighbour:  # of the job with the next number, which has the next port
        port = free_port()
        neighbour.bind(("127.0.0.1", port + 1))
        neighbour.listen()
        nodes = [
            start(recipe, *own, ranks=1, KARAT_STALL_SECONDS="90", **node_of_two(number, port)) for number in range(2)
        ]
        wait_until(lambda: read(tmp_path / "run", "checkpoint") > 0, 120)
        assert [sign.start for sign in read_signs(tmp_path / "run")] == ["7-0-3"] * 2
        ranks_of(nodes[1])[0].kill()
        for code, error in map(ended, nodes):
            assert code == 0, error
            assert "training begins again" in error
    assert [sign.start for sign in read_signs(tmp_path / "run")] == ["7-0-3.1"] * 2


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [0, 1])
def test_a_signal_ends_a_launcher_that_waits_for_another_node(recipe: Path, number: int) -> None:
    process = start(recipe, **node_of_two(number, free_port()))
    assert process.stderr is not None
    assert process.stderr.readline().startswith(f"[node {number}] has waited")
    process.send_signal(signal.SIGTERM)
    code, error = ended(process)
    assert (code, error) == (75, "")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_train_and_a_signal_saves(recipe: Path) -> None:
    run = recipe.parent / "run"
    code, error = ended(start(recipe, "train.max_steps=2"))
    assert code == 0, error
    assert summary(run)["world_size"] == 2
    process = start(recipe, "train.epochs=100000", "resume.allow=[train.epochs]")
    wait_until(lambda: len(events(run, "train")) > 4, 120)
    process.send_signal(signal.SIGTERM)
    code, error = ended(process)
    assert code == 75, error
    assert summary(run)["reason"] == "stopped by SIGTERM"


def wait_for_steps(run: Path, more_than: int) -> None:
    wait_until(lambda: (run / "metrics.jsonl").is_file() and len(events(run, "train")) > more_than, 120)


def all_ended(ranks: list[psutil.Process]) -> bool:
    return not any(running(rank.pid) for rank in ranks)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_ranks_do_not_outlive_the_launcher(recipe: Path) -> None:
    process = start(recipe, "train.epochs=100000")
    wait_for_steps(recipe.parent / "run", 1)
    ranks = ranks_of(process)
    process.kill()
    assert ended(process)[0] == -signal.SIGKILL
    wait_until(lambda: all_ended(ranks), 60)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_is_named_last_and_ends_the_others(recipe: Path, victim: int) -> None:
    process = start(recipe, "train.epochs=100000", IDLE_RESTARTS="0")
    wait_for_steps(recipe.parent / "run", 1)
    ranks = ranks_of(process)
    ranks[victim].send_signal(signal.SIGSEGV)
    code, error = ended(process)
    assert code == 128 + signal.SIGSEGV
    assert error.splitlines()[-1] == f"error: rank {victim} was ended by SIGSEGV"
    assert all_ended(ranks)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_and_then_a_stopped_rank_change_nothing_but_the_time(recipe: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    own = ("train.epochs=60", "checkpoint.every_steps=8", "train.eval_every_epochs=60")
    code, error = ended(start(recipe, *own, f"run.dir={whole}"))
    assert code == 0, error
    recipe.write_text(f"{recipe.read_text()}resume: {{mode: never}}\n")  # applies to the first start only
    process = start(recipe, *own, KARAT_STALL_SECONDS="60,step=20", IDLE_RESTARTS="2")
    for number, hurt in enumerate((signal.SIGKILL, signal.SIGSTOP)):
        wait_until(lambda number=number: read(run, "resume") == number and read(run, "checkpoint") > number, 200)
        ranks_of(process)[1].send_signal(hurt)
    code, error = ended(process)
    assert code == 0, error
    assert len(events(run, "resume")) == 2, error
    assert "rank 1 was ended by SIGKILL; training begins again from the newest checkpoint" in error
    assert re.search(r"rank 1 on .* has made no progress for .*; training begins again", error), error
    assert_same_run(run, whole)


def read(run: Path, kind: str) -> int:
    return len(events(run, kind)) if (run / "metrics.jsonl").is_file() else 0


@pytest.mark.slow
@pytest.mark.multiprocess
def test_an_exception_of_one_rank_is_tried_again_only_so_often(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "own_basis.py").write_text(
        "import os\n"
        "from karat_scale.attention.bases.polynomials import Chebyshev\n\n\n"
        "class Broken(Chebyshev):\n"
        "    def value(self, x):\n"
        "        if x.dim() > 1 and os.environ.get('RANK') == '1':\n"
        "            raise ZeroDivisionError('a mistake in a basis')\n"
        "        return super().value(x)\n"
    )
    path = f"{tmp_path}:{karat_environment()['PYTHONPATH']}"
    own = ("attention.kind=karat", "attention.basis=own_basis:Broken")
    code, error = ended(start(recipe, *own, PYTHONPATH=path, IDLE_RESTARTS="1"))
    assert code == 1
    assert error.splitlines()[-1] == "error: rank 1: ZeroDivisionError: a mistake in a basis"
    assert error.count("training begins again") == 1
