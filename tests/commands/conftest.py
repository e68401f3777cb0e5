"""Short real runs on the shared images, each trained once for all test processes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SMALL, karat, made_once

TrainOnce = Callable[..., Path]


@pytest.fixture(scope="session")
def train_once(tmp_path_factory: pytest.TempPathFactory) -> TrainOnce:
    """Train the small model under a name, on the data of a section `data`, with overrides; the run's directory.

    Do not write into it.
    """

    def train_once(name: str, data: str, *overrides: str) -> Path:
        def train(root: Path) -> None:
            recipe = root / "owls.yaml"
            recipe.write_text(f"data: {{{data}}}\nschedule: {{warmup_epochs: 0.5}}\n")
            done = karat("train", str(recipe), *SMALL, f"run.dir={root / name}", *overrides)
            assert done.returncode == 0, done.stderr

        return made_once(tmp_path_factory, f"commands-{name}", train) / name

    return train_once
