"""The servers of tests/servers.py, and a cache of its own for each test."""

from pathlib import Path

import pytest

from tests.servers import gs, nginx, s3, s3_port

__all__ = ["gs", "nginx", "s3", "s3_port"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("KARAT_DATA_CACHE", str(cache))
    return cache
