"""Fixtures of backends over shards or betons of small samples."""

from functools import partial

import pytest

from tests.data.betons import make_betons, need_ffcv


@pytest.fixture
def dali(opened):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install -e '.[dali]'")
    return partial(opened, backend="dali", workers=1)


@pytest.fixture
def webdataset(opened):
    """Return a function that opens the backend with which DALI is compared: webdataset, decoded by torchvision."""
    return partial(opened, decoder="torchvision")


@pytest.fixture
def betons(make_shards):
    """Return a function that makes betons of the shards of these samples, and returns their directory."""
    need_ffcv()
    return lambda train=None, val=None, options=(): make_betons(make_shards(train, val), *options)
