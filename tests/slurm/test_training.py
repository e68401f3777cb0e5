"""slurm/imagenet_fourier_karat.sh on a real SLURM: interrupted in any way, a run ends in the same weights."""

import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from karat_scale.train.tensor_storage import load_tensors
from tests.conftest import SMALL, events, karat, karat_command, karat_environment, summary
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.jobs import END_SECONDS, Job, submit
from tests.train.conftest import equal

STEPS = 16  # 2 epochs of 64 samples in batches of 8
LIMIT_OUTLASTED = 90  # seconds
SCRIPT = "imagenet_fourier_karat.sh"
RECIPE = "attention: {kind: karat}\nschedule: {warmup_epochs: 0.5}\ndata: {path: set by the script}\n"
# Evaluation in batches of one and a save after each step: signals find them under way.
OVERRIDES = (*SMALL, "train.eval_batch=1", "checkpoint.every_steps=1")

Train = Callable[..., Job]


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def uninterrupted(recipe: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others must equal, in one process and without SLURM."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = karat("train", str(recipe), *OVERRIDES, f"data.path={shards}", f"run.dir={run}")
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def train(cluster: Cluster, recipe: Path, shards: Path, tmp_path: Path) -> Train:
    """Submit the training script with the small recipe; the run is tmp_path/run."""

    def start(*overrides: str, options: tuple[str, ...] = (), **settings: str | Path) -> Job:
        chosen = {"RECIPE": recipe, "SHARDS": shards, "RUN": tmp_path / "run", **settings}
        return submit(cluster, SCRIPT, *OVERRIDES, *overrides, options=options, cwd=tmp_path, **chosen)

    return start


def run_of(job: Job) -> Path:
    return job.output.parent / "run"


def last_checkpoint(run: Path, step: int = STEPS) -> dict[str, object]:
    """All tensor files of a run's last checkpoint."""
    last = run / "checkpoints" / f"step-{step:08d}"
    return {path.name: load_tensors(path) for path in sorted(last.glob("*.pt"))}


def weights(run: Path) -> torch.Tensor:
    """All weights after the last step, as one vector."""
    (states,) = [states for name, states in last_checkpoint(run).items() if name.startswith("mp_rank_00")]
    module = states["module"]  # type: ignore[index]
    return torch.cat([module[key].double().flatten() for key in sorted(module)])


def has_event(job: Job, kind: str, step: int) -> bool:
    file = run_of(job) / "metrics.jsonl"
    return file.is_file() and any(event["step"] >= step for event in events(run_of(job), kind))


def wait_for(job: Job, kind: str, step: int) -> None:
    """Until the run has reported an event of that step or a later one."""

    def reported() -> bool:
        assert not job.ended, job.log
        return has_event(job, kind, step)

    wait_until(reported, 120, f"event {kind} of step {step}")


def process_of(job: Job, rank: int) -> psutil.Process:
    """The trainer of a rank: a child of its wrapper."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if (environment.get("SLURM_JOB_ID"), environment.get("SLURM_PROCID")) == (job.id, str(rank)):
                parent = process.parent()
                if "karat_scale" in process.cmdline() and parent is not None and parent.name() == "bash":
                    return process
    raise AssertionError(f"job {job.id} has no rank {rank}:\n{job.log}")


def assert_ends_like(job: Job, whole: Path, step: int = STEPS, seconds: float = END_SECONDS) -> None:
    """The job comes to its end, and the run equals the uninterrupted one bit for bit."""
    assert job.wait(seconds) == "COMPLETED 0", job.log
    assert events(run_of(job), "resume"), job.log
    assert equal(last_checkpoint(run_of(job), step), last_checkpoint(whole, step))
    assert summary(run_of(job))["data_digest"] == summary(whole)["data_digest"] != 0


def test_two_nodes_train_what_one_process_trains(train: Train, uninterrupted: Path) -> None:
    job = train(options=("--nodes=2",))
    assert job.wait() == "COMPLETED 0", job.log
    assert summary(run_of(job))["world_size"] == 2
    alone, together = weights(uninterrupted), weights(run_of(job))
    assert (alone - together).norm() / alone.norm() < 1e-5
    assert summary(run_of(job))["data_digest"] == summary(uninterrupted)["data_digest"]


@pytest.mark.parametrize(
    ("kind", "step"),
    [("train", 1), ("train", 5), ("train", 8), ("checkpoint", 3)],
    ids=["first step", "training", "evaluation", "saving"],
)
def test_preempted_by_signal_it_saves_comes_back_and_ends_alike(
    train: Train, uninterrupted: Path, kind: str, step: int
) -> None:
    job = train()
    wait_for(job, kind, step)
    job.signal_batch()
    assert_ends_like(job, uninterrupted)
    assert job.starts == 2
    assert "requeued" in job.log


@pytest.mark.timeout(1200)
def test_a_time_limit_saves_and_the_job_comes_back(
    train: Train, recipe: Path, shards: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    # A minute is the shortest limit, and SLURM looks at it each half minute: as many epochs as last longer here.
    epochs = round(LIMIT_OUTLASTED * summary(uninterrupted)["images_per_second"] / 64)
    long = (f"train.epochs={epochs}", "train.eval_every_epochs=50", "checkpoint.every_steps=64")
    whole = tmp_path / "whole"
    arguments = ("train", str(recipe), *OVERRIDES, *long, f"data.path={shards}", f"run.dir={whole}")
    done = subprocess.run(karat_command(arguments), env=karat_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    job = train(*long, options=("--time=1", "--signal=B:USR2@55"))
    assert_ends_like(job, whole, step=8 * epochs, seconds=700)
    assert job.starts >= 2


def test_a_killed_node_brings_the_job_back(train: Train, uninterrupted: Path, cluster: Cluster) -> None:
    job = train(options=("--nodes=2",))
    wait_for(job, "checkpoint", 3)
    cluster.kill_node(cluster.nodes[1])
    try:
        wait_until(lambda: job.starts > 1 or job.ended, 120, "the job is requeued")
    finally:
        cluster.start_node(cluster.nodes[1])
    assert job.wait() == "COMPLETED 0", job.log
    assert events(run_of(job), "resume"), job.log
    alone, together = weights(uninterrupted), weights(run_of(job))
    assert (alone - together).norm() / alone.norm() < 1e-5


def test_a_cancelled_job_does_not_come_back(train: Train, cluster: Cluster) -> None:
    job = train()
    wait_for(job, "train", 2)
    cluster.command("scancel", job.id)
    assert job.wait().startswith("CANCELLED")
    cluster.wait_idle()
    assert job.field("JobState") == "CANCELLED"


def test_restarts_that_save_nothing_new_end_the_job(train: Train, cluster: Cluster) -> None:
    # Ranks that run when SLURM requeues a job have KillWait to save; this model takes longer to build.
    job = train("model.embed_dim=768", "model.depth=24", IDLE_RESTARTS="1")
    for start in (1, 2):
        wait_until(lambda start=start: f"start {start}:" in job.log, 90, f"start {start}")
        cluster.command("scontrol", "requeue", job.id)
    assert job.wait() == "FAILED 1", job.log
    assert "2 restarts without a new checkpoint (the newest is none)" in job.log.splitlines()[-1]
    assert job.starts == 3


def test_the_first_rank_to_fail_has_the_last_word(train: Train) -> None:
    job = train(options=("--nodes=2",))
    wait_for(job, "train", 2)
    process_of(job, rank=1).kill()
    assert job.wait() == "FAILED 1", job.log
    assert "rank 1 on 127.0.0.2 was killed by signal 9 (KILL)" in job.log.splitlines()[-1]


def test_a_rank_that_hangs_is_named_and_ends_the_job(train: Train) -> None:
    job = train("train.epochs=200", options=("--nodes=2",), STALL_SECONDS="20")
    wait_for(job, "train", 2)
    process_of(job, rank=1).suspend()
    assert job.wait() == "FAILED 1", job.log
    last = job.log.splitlines()[-1]
    assert last.startswith("error: rank 1 on 127.0.0.2 (process "), job.log
    assert "stopped or gone, no stacks" in last
    # The rank that waited shows where it did.
    assert "Timeout (0:00:20)!" in job.log
    assert 'train/loop.py", line' in job.log


def test_a_signal_before_the_ranks_run_brings_the_job_back(train: Train, uninterrupted: Path) -> None:
    job = train()
    wait_until(lambda: job.field("JobState") == "RUNNING", 30, "the job runs")
    time.sleep(0.5)  # the batch script loads its environment
    job.signal_batch()
    assert job.wait() == "COMPLETED 0", job.log
    assert job.starts == 2
    assert equal(last_checkpoint(run_of(job)), last_checkpoint(uninterrupted))
