"""`karat launch`: real ranks, real failures and real signals."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from karat_scale.commands import launch
from karat_scale.commands.launch import default_ranks, say_to_launcher
from tests.conftest import SMALL, events, karat_command, karat_environment, summary
from tests.data.backends.helpers import wait_until

LAUNCH = (sys.executable, "-m", "karat_scale", "launch", "--ranks", "2")
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
def test_without_a_list_one_rank_for_each_gpu_of_the_machine(
    nvidia: int, amd: int, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def start(recipe: Path, *overrides: str) -> "subprocess.Popen[str]":
    command = [*LAUNCH, "train", str(recipe), *SMALL, *QUICK, f"run.dir={recipe.parent / 'run'}", *overrides]
    return subprocess.Popen(command, env=karat_environment(), stderr=subprocess.PIPE, text=True)


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
        "error: data.path = /nowhere is not a directory; make it with data_prep/make_webdataset.py or correct the path"
    ]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_torchrun_ends_with_the_error_and_no_rank_says_it_before(recipe: Path) -> None:
    arguments = ["train", str(recipe), *SMALL, *QUICK, "data.path=/nowhere", f"run.dir={recipe.parent / 'run'}"]
    command = karat_command(arguments, processes=2)
    done = subprocess.run(command, env=karat_environment(), capture_output=True, text=True, timeout=300)
    before, _, after = done.stderr.partition("Traceback")
    assert "/nowhere" not in before
    assert "error: data.path = /nowhere is not a directory" in after.strip().splitlines()[-2]


def test_torch_reads_the_error_that_is_left_to_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert say_to_launcher('no such "place"', "1")
    assert ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(file)).message == 'error: no such "place"'


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


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "the launcher"])
def test_ranks_do_not_outlive_each_other_or_the_launcher(recipe: Path, victim: str) -> None:
    run = recipe.parent / "run"
    process = start(recipe, "train.epochs=100000")
    wait_until(lambda: (run / "metrics.jsonl").is_file() and len(events(run, "train")) > 1, 120)
    ranks = ranks_of(process)
    if victim == "the launcher":
        process.kill()
        assert ended(process)[0] == -signal.SIGKILL
    else:
        number = int(victim[-1])
        ranks[number].send_signal(signal.SIGSEGV)
        code, error = ended(process)
        assert code == 128 + signal.SIGSEGV
        first, second = [line for line in error.splitlines() if "error: " in line]
        assert first == f"error: {victim} was ended by SIGSEGV"
        assert second.startswith(f"[rank {1 - number}] error: rank {number}")
        assert "has ended without a word" in second
    wait_until(lambda: not any(rank.is_running() and rank.status() != "zombie" for rank in ranks), 60)
