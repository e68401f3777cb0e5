"""Functions that start runs as a user does, stop them where a test wants, and compare what they leave."""

import math
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.checkpoint.tensor_storage import load_tensors
from tests.conftest import events, karat_command, karat_done, karat_environment, rank_environments, summary, wait_until
from tests.small_engines import equal
from tests.warm import Started

HELD = Path(__file__).with_name("held.py")
STEPS = 16  # 2 epochs of 64 samples in batches of 8


def start(recipe: Path, run: Path, *overrides: str, processes: int = 1, by: str = "train") -> Started:
    """Start a run on `processes` ranks, without a launcher."""
    environments = rank_environments(processes) if processes > 1 else [karat_environment()]
    return Started("karat_scale", [by, str(recipe), f"run.dir={run}", *overrides], environments)


def start_held(recipe: Path, run: Path, text: str, *overrides: str, processes: int = 1, by: str = "train") -> Started:
    """Start a run whose rank 0 pauses once it has printed the text, and wait until it pauses.

    So the run does nothing more before a signal.
    """
    environments = rank_environments(processes) if processes > 1 else [karat_environment()]
    environments = [{**one, "HELD_AT": "no text" if rank else text} for rank, one in enumerate(environments)]
    process = Started(str(HELD), [by, str(recipe), f"run.dir={run}", *overrides], environments)
    wait_in_run(lambda: psutil.Process(process.pids[0]).status() == psutil.STATUS_STOPPED, process)
    return process


def start_torchrun(recipe: Path, run: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start a run on two ranks under torchrun."""
    line = karat_command(["train", str(recipe), f"run.dir={run}", *overrides], 2)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        line, env=karat_environment(), stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def kill_all(process: Started) -> None:
    """Send SIGKILL to the ranks and their workers."""
    process.send_signal(signal.SIGSTOP)  # otherwise it may end before all of its processes are found
    ranks = [psutil.Process(pid) for pid in process.pids]
    family = [*(worker for rank in ranks for worker in rank.children(recursive=True)), *ranks]
    for member in family:
        with suppress(psutil.NoSuchProcess):  # a command that it ran may have ended meanwhile
            member.send_signal(signal.SIGKILL)
    process.communicate()
    psutil.wait_procs(family, timeout=30)


def stopped_by(process: Started, number: signal.Signals) -> str:
    """Send a signal to a run, assert that it stops with exit code 75, and return all that it printed."""
    process.send_signal(signal.SIGSTOP)  # small steps may take less time than the signal takes to all ranks
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 75, output
    return output


def wait_in_run(condition: Callable[[], bool], process: Started | subprocess.Popen[str]) -> None:
    """Wait until the condition holds; fail if the run ends before that."""

    def holds() -> bool:
        if found := condition():
            return found
        assert process.poll() is None, process.communicate()[0]
        return False

    wait_until(holds, 120)


def wait_for_checkpoint(run: Path, step: int, process: Started | subprocess.Popen[str]) -> None:
    """Wait until the run has saved `step` or a later one."""
    store = CheckpointStore(run / "checkpoints")

    def is_saved() -> bool:
        name = store.pointed("latest") if store.root.is_dir() else None
        return bool(name) and int(name.removeprefix("step-")) >= step

    wait_in_run(is_saved, process)


def wait_for_step(run: Path, step: int, process: Started) -> None:
    """Wait until the run has reported training step `step`."""
    log = run / "metrics.jsonl"
    wait_in_run(lambda: log.is_file() and any(event["step"] == step for event in events(run, "train")), process)


def last_tensors(run: Path) -> dict[str, object]:
    """Return the tensors of the checkpoint that `latest` names: weights, optimizer, averages and random generators."""
    store = CheckpointStore(run / "checkpoints")
    name = store.pointed("latest")
    assert name is not None, f"{run} has no last checkpoint"
    return {f"{name}/{path.name}": load_tensors(path) for path in sorted((store.root / name).glob("*.pt"))}


def losses(run: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events(run, "train")}


def assert_same_run(run: Path, whole: Path) -> None:
    """Assert that two runs have the same losses, the same samples, and the same bits in the last checkpoint."""
    assert losses(run) == losses(whole)
    digest, expected = (summary(one).get("data_digest") for one in (run, whole))  # detection has none
    assert digest == expected != 0
    assert equal(last_tensors(run), last_tensors(whole))


def assert_a_kill_changes_nothing(recipe: Path, scratch: Path, *overrides: str, processes: int = 1) -> None:
    """Assert that a run that is killed after its third step and started again ends as an undisturbed run does."""
    whole, cut = scratch / "whole", scratch / "cut"
    own = ("checkpoint.every_steps=1", "checkpoint.keep_last=2", *overrides)
    karat_done("train", str(recipe), f"run.dir={whole}", *own, processes=processes)
    kill_all(start_held(recipe, cut, "saved step-00000003 in", *own, processes=processes))
    karat_done("train", str(recipe), f"run.dir={cut}", *own, processes=processes)
    (resume,) = events(cut, "resume")
    assert 3 <= resume["step"] < STEPS
    assert_same_run(cut, whole)
    assert summary(cut)["restarts"] == 1
    total, *parts = summary(cut)["wall_time"].values()
    assert math.isclose(sum(parts), total, rel_tol=0.01)
    first, second = events(cut, "start")
    span = events(cut, "end")[-1]["time"] - first["began"]
    between = second["began"] - second["last_sign"]  # nothing ran then, and no job was in a queue
    assert 0.99 * (span - between) <= total <= 1.01 * span
