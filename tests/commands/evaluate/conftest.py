"""One short real run on shards."""

from pathlib import Path

import pytest

from tests.conftest import TrainOnce


@pytest.fixture
def run(shards: Path, train_once: TrainOnce, tmp_path: Path) -> Path:
    """A run of a test's own; its large files are links."""
    trained = train_once("evaluated", f"path: {shards}", "attention.kind=karat", "model.image_size=32")
    copy = tmp_path / "run"
    copy.mkdir()
    for path in trained.iterdir():
        (copy / path.name).symlink_to(path)
    return copy
