"""Backends, opened over shards or betons of these samples and closed at the end."""

from functools import partial

import pytest

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.recipe import AugmentConfig
from tests.data.backends.helpers import SIZE
from tests.data.betons import make_betons, need_ffcv


@pytest.fixture
def opened(data_config):
    """Opens a backend over a directory, by default with the paper's augmentation."""
    backends = []

    def make(directory, augment=None, seed=5, size=SIZE, classes=3, **fields):
        spec = ImageSpec(data_config(directory, **fields), augment or AugmentConfig(), size, classes, seed)
        backends.append(open_backend(spec))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


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
