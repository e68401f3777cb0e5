"""Two short real runs, one of each kind, on the shared shards."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from karat_scale.commands.analyze.predictions import FILE
from karat_scale.commands.analyze.trained_run import TrainedRun, open_run
from tests.commands.analyze.browser import Browser, open_browser
from tests.conftest import TrainOnce


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


KEEP_ALL = (
    "checkpoint.every_steps=4",
    "checkpoint.every_minutes=null",
    "checkpoint.keep_last=50",
    "checkpoint.snapshots=1",
)


@pytest.fixture(scope="session")
def trained(shards: Path, train_once: TrainOnce) -> Callable[[str], Path]:
    """Return a function that gives the directory of a run of a kind of attention, and trains it at its first call.

    The run has 16 steps, a checkpoint every 4 steps, and snapshots of the weights at the start and the end.
    """
    return lambda kind: train_once(kind, f"path: {shards}", *KEEP_ALL, f"attention.kind={kind}")


@pytest.fixture(params=["karat", "softmax"])
def any_run(request: pytest.FixtureRequest, trained: Callable[[str], Path]) -> TrainedRun:
    return open_run(trained(request.param))


@pytest.fixture
def karat_run(trained: Callable[[str], Path]) -> TrainedRun:
    return open_run(trained("karat"))


@pytest.fixture
def softmax_run(trained: Callable[[str], Path]) -> TrainedRun:
    return open_run(trained("softmax"))


@pytest.fixture
def own_run(karat_run: TrainedRun, tmp_path: Path) -> TrainedRun:
    """Return a copy of the KArAt run, which a test may change."""
    shutil.copytree(karat_run.path, tmp_path / "karat", ignore=shutil.ignore_patterns(FILE, "analysis"))
    return open_run(tmp_path / "karat")
