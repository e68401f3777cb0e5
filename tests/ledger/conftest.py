"""A docs folder, and `karat ledger` on it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from karat_scale.cli import main


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "ledger").mkdir(parents=True)
    return tmp_path / "docs"


@pytest.fixture
def ledger(docs: Path) -> Callable[..., int]:
    return lambda *runs: main(["ledger", *map(str, runs), "--docs", str(docs)])
