"""Streams of real tars, with an indexed split to evaluate on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from karat_scale.recipe import DataConfig
from tests.data.tars import write_stream


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Four tars of 5, 9, 3 and 7 samples, numbered through."""
    return write_stream(tmp_path / "tars", (5, 9, 3, 7))


@pytest.fixture
def stream_config(make_shards, data_config) -> Callable[..., DataConfig]:
    """A recipe's data section over tars, as they are spelled."""
    directory = make_shards()

    def make(stream: object, **fields: object) -> DataConfig:
        given = {"order": "stream", "stream": str(stream), "stream_samples": 24, "stream_buffer": 4}
        return data_config(directory, **{**given, **fields})

    return make
