"""Most of these tests run on a real SLURM; all that do are marked slow."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job, submit
from tests.slurm.packages import SLURM, missing_reason
from tests.slurm.training import OVERRIDES, RECIPE, SCRIPT, Train, train_alone

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and "cluster" in item.fixturenames:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Yield a cluster of two nodes, which is started once for all tests."""
    reason = missing_reason(SLURM)
    if reason:
        pytest.skip(reason)
    with Cluster(nodes=2) as running:
        yield running


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def uninterrupted(recipe, shards, tmp_path_factory) -> Path:
    """Return the run that all others must equal. One process trains it without SLURM."""
    return train_alone(recipe, shards, tmp_path_factory.mktemp("uninterrupted") / "run")


@pytest.fixture(scope="session")
def on_two_nodes(cluster, recipe, shards, tmp_path_factory) -> Path:
    """Return the same run, trained by an undisturbed job on two nodes."""
    cwd = tmp_path_factory.mktemp("two")
    settings = {"RECIPE": recipe, "SHARDS": shards, "RUN": cwd / "run"}
    job = submit(cluster, SCRIPT, *OVERRIDES, options=("--nodes=2",), cwd=cwd, **settings)
    assert job.wait() == "COMPLETED 0", job.log
    return cwd / "run"


@pytest.fixture
def train(cluster, recipe, shards, tmp_path) -> Train:
    """Return a function that submits the training script with the small recipe; the run is tmp_path/run."""

    def start(*overrides: str, options: tuple[str, ...] = (), **settings: str | Path) -> Job:
        chosen = {"RECIPE": recipe, "SHARDS": shards, "RUN": tmp_path / "run", **settings}
        return submit(cluster, SCRIPT, *OVERRIDES, *overrides, options=options, cwd=tmp_path, **chosen)

    return start
