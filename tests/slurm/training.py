"""A small training run as a job: how to wait for a moment of it, and what to compare in the end."""

import contextlib
import re
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from tests.conftest import SMALL, events, karat_done, wait_until
from tests.slurm.jobs import END_SECONDS, Job
from tests.training.runs import assert_same_run, last_tensors

SCRIPT = "imagenet_fourier_karat.sh"
RECIPE = "attention: {kind: karat}\nschedule: {warmup_epochs: 0.5}\ndata: {path: set by the script}\n"
# Evaluation in batches of one and a save after each step, so that signals arrive during both.
OVERRIDES = (*SMALL, "train.eval_batch=1", "checkpoint.every_steps=1")

Train = Callable[..., Job]


def train_alone(recipe: Path, shards: Path, run: Path, *overrides: str) -> Path:
    """Train to the end in one process, without SLURM; return the run."""
    karat_done("train", str(recipe), *OVERRIDES, *overrides, f"data.path={shards}", f"run.dir={run}")
    return run


def run_of(job: Job) -> Path:
    return job.output.parent / "run"


def weights(run: Path) -> torch.Tensor:
    """Return all weights after the last step as one vector."""
    (states,) = [states for name, states in last_tensors(run).items() if "/mp_rank_00" in name]
    module = states["module"]  # type: ignore[index]
    return torch.cat([module[key].double().flatten() for key in sorted(module)])


def relative_distance(run: Path, reference: Path) -> float:
    """Return the L2 norm of the difference of all last weights, divided by the norm of the reference's."""
    expected = weights(reference)
    return float((weights(run) - expected).norm() / expected.norm())


def has_event(job: Job, kind: str, step: int) -> bool:
    file = run_of(job) / "metrics.jsonl"
    return file.is_file() and any(event["step"] >= step for event in events(run_of(job), kind))


def wait_for(job: Job, kind: str, step: int) -> None:
    """Wait until the run has reported an event of this step or a later one."""

    def reported() -> bool:
        assert not job.ended, job.log
        return has_event(job, kind, step)

    wait_until(reported, 120, f"event {kind} of step {step}")


def process_of(job: Job, rank: int) -> psutil.Process:
    """Return the trainer of a rank, which is a child of the rank's wrapper."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if (environment.get("SLURM_JOB_ID"), environment.get("RANK")) == (job.id, str(rank)):
                parent = process.parent()
                is_python = "karat_scale" in process.cmdline() and process.name() != "bash"
                if is_python and parent is not None and parent.name() == "bash":
                    return process
    raise AssertionError(f"job {job.id} has no rank {rank}:\n{job.log}")


def signal_held(job: Job) -> None:
    """Send USR2 to the batch script while rank 0 is suspended, since small steps may take less time than the signal."""
    rank = process_of(job, rank=0)
    rank.suspend()
    job.signal_batch()
    wait_until(lambda: is_pending(rank, signal.SIGUSR2), 60, "the signal reaches the rank")
    rank.resume()


def is_pending(process: psutil.Process, number: signal.Signals) -> bool:
    """Return whether the signal is pending for the process, which is stopped."""
    (mask,) = re.findall(r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


def assert_ends_like(job: Job, whole: Path, seconds: float = END_SECONDS) -> None:
    """Assert that the job resumes and completes, and that the run equals the uninterrupted one bit for bit."""
    assert job.wait(seconds) == "COMPLETED 0", job.log
    assert events(run_of(job), "resume"), job.log
    assert_same_run(run_of(job), whole)
