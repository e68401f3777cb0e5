"""slurm/imagenet_fourier_karat.sh on a real SLURM: interrupted in any way, a run ends in the same weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from karat_scale.train.tensor_storage import load_tensors
from tests.conftest import SMALL, events, karat, summary
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.jobs import Job, submit
from tests.train.test_resume import equal

STEPS = 16  # 2 epochs of 64 samples in batches of 8
SCRIPT = "imagenet_fourier_karat.sh"
RECIPE = "attention: {kind: karat}\nschedule: {warmup_epochs: 0.5}\ndata: {path: set by the script}\n"
# Evaluation in batches of one and a save after each step: signals find them under way.
OVERRIDES = (*SMALL, "model.proj_drop=0.1", "train.eval_batch=1", "checkpoint.every_steps=1")

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


def last_checkpoint(run: Path) -> dict[str, object]:
    """All tensor files of a run's last checkpoint."""
    last = run / "checkpoints" / f"step-{STEPS:08d}"
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


def assert_ends_like(job: Job, whole: Path) -> None:
    """The job comes to its end, and the run equals the uninterrupted one bit for bit."""
    assert job.wait() == "COMPLETED 0", job.log
    assert events(run_of(job), "resume"), job.log
    assert equal(last_checkpoint(run_of(job)), last_checkpoint(whole))
    assert summary(run_of(job))["data_digest"] == summary(whole)["data_digest"] != 0


def test_two_nodes_train_what_one_process_trains(train: Train, uninterrupted: Path) -> None:
    job = train("model.proj_drop=0", options=("--nodes=2",), RUN="run")
    assert job.wait() == "COMPLETED 0", job.log
    assert summary(run_of(job))["world_size"] == 2
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
