"""The backends that need a library of their own, opened over shards of these samples."""

import pytest

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.recipe import AugmentConfig
from tests.data.backends.helpers import SIZE
from tests.data.betons import make_betons, need_ffcv


@pytest.fixture
def dali(data_config):
    """Opens the backend over a directory, by default with one thread; closes it at the end."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install -e '.[dali]'")
    opened = []

    def make(directory, augment=None, seed=5, size=SIZE, **fields):
        config = data_config(directory, **{"backend": "dali", "workers": 1, **fields})
        opened.append(open_backend(ImageSpec(config, augment or AugmentConfig(), size, 3, seed)))
        return opened[-1]

    yield make
    for backend in opened:
        backend.close()


@pytest.fixture
def webdataset(data_config):
    """What DALI's batches are compared with: the same shards, decoded by torchvision."""

    def make(directory, augment=None, seed=5, size=SIZE, **fields):
        config = data_config(directory, **{"decoder": "torchvision", **fields})
        return open_backend(ImageSpec(config, augment or AugmentConfig(), size, 3, seed))

    return make


@pytest.fixture
def betons(make_shards, data_config):
    """Betons of the shards of these samples, and a function that makes a recipe's data section for them."""
    need_ffcv()

    def make(train=None, val=None, options=()):
        directory = make_betons(make_shards(train, val), *options)
        return directory, lambda **fields: data_config(directory, backend="ffcv", **fields)

    return make
