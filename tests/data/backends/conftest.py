"""Backends over shards or betons of these samples."""

from functools import partial

import pytest

from tests.data.betons import make_betons, need_ffcv


@pytest.fixture
def dali(opened):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install -e '.[dali]'")
    return partial(opened, backend="dali", workers=1)


@pytest.fixture
def webdataset(opened):
    """What DALI's batches are compared with: the same shards, decoded by torchvision."""
    return partial(opened, decoder="torchvision")


@pytest.fixture
def betons(make_shards):
    """Makes betons of the shards of these samples; returns their directory."""
    need_ffcv()
    return lambda train=None, val=None, options=(): make_betons(make_shards(train, val), *options)
