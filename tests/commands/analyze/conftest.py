"""Two short real runs, one of each kind, on the shared shards."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from karat_scale.commands.analyze.trained_run import TrainedRun, open_run
from tests.commands.analyze.browser import Browser, open_browser
from tests.conftest import SMALL, karat, made_once


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
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a run of 16 steps with a checkpoint each 4, and snapshots of the weights at the start and end.

    By kind of attention; trained at first use.
    """

    def train(kind: str, root: Path) -> None:
        recipe = root / f"{kind}.yaml"
        recipe.write_text(f"data: {{path: {shards}}}\nschedule: {{warmup_epochs: 0.5}}\n")
        done = karat("train", str(recipe), *SMALL, *KEEP_ALL, f"attention.kind={kind}", f"run.dir={root / kind}")
        assert done.returncode == 0, done.stderr

    return lambda kind: made_once(tmp_path_factory, f"run-{kind}", lambda root: train(kind, root)) / kind


@pytest.fixture(params=["karat", "softmax"])
def any_run(request: pytest.FixtureRequest, trained: Callable[[str], Path]) -> TrainedRun:
    return open_run(trained(request.param))


@pytest.fixture
def karat_run(trained: Callable[[str], Path]) -> TrainedRun:
    return open_run(trained("karat"))


@pytest.fixture
def softmax_run(trained: Callable[[str], Path]) -> TrainedRun:
    return open_run(trained("softmax"))
