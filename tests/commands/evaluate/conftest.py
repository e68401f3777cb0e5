"""One short real run on shards."""

from pathlib import Path

import pytest

from tests.conftest import TrainOnce


@pytest.fixture
def run(shards: Path, train_once: TrainOnce, tmp_path: Path) -> Path:
    """Return a directory of links to the files of a trained run, to which a test may add files."""
    trained = train_once("evaluated", f"path: {shards}", "attention.kind=karat", "model.image_size=32")
    copy = tmp_path / "run"
    copy.mkdir()
    for path in trained.iterdir():
        (copy / path.name).symlink_to(path)
    return copy
