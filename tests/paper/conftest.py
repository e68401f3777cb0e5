"""Fixtures of a docs folder, and of `python -m paper` on it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from karat_scale.foundation.errors import run_script
from paper.__main__ import main


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "ledger").mkdir(parents=True)
    return tmp_path / "docs"


@pytest.fixture
def ledger(docs: Path) -> Callable[..., int]:
    def run(*runs: Path) -> int:
        with pytest.raises(SystemExit) as ended:
            run_script(lambda: main([*map(str, runs), "--docs", str(docs)]))
        return int(ended.value.code or 0)

    return run
