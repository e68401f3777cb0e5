"""Runs as a user starts them, stopped where a test wants, and what they leave to compare."""

import signal
import subprocess
import time
from pathlib import Path

import psutil

from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.checkpoint.tensor_storage import load_tensors
from tests.conftest import events, karat_command, karat_environment

STEPS = 16  # 2 epochs of 64 samples in batches of 8


def start(recipe: Path, run: Path, *overrides: str, processes: int = 1) -> subprocess.Popen[str]:
    command = karat_command(["train", str(recipe), f"run.dir={run}", *overrides], processes)
    return subprocess.Popen(
        command,
        env=karat_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the launcher, the ranks (torchrun gives each a session of its own) and their workers."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.communicate()
    psutil.wait_procs(family, timeout=30)


def wait_for_checkpoint(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the run has saved `step` or a later one."""
    store = CheckpointStore(run / "checkpoints")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        name = store.pointed("latest") if store.root.is_dir() else None
        if name and int(name.removeprefix("step-")) >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    raise AssertionError("no checkpoint in two minutes")


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the run has reported training step `step`."""
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").is_file() and any(e["step"] == step for e in events(run, "train"))):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def final_tensors(run: Path, steps: int = STEPS) -> dict[str, object]:
    """All tensor files of the last checkpoint: weights, optimizer, EMA and random generators."""
    last = run / "checkpoints" / f"step-{steps:08d}"
    return {path.name: load_tensors(path) for path in sorted(last.glob("*.pt"))}


def losses(run: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events(run, "train")}
