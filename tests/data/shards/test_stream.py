"""Streams from a web server, by the webdataset library's own curl."""

from pathlib import Path

import pytest

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.plan import TrainPlan
from karat_scale.foundation.errors import DataError
from karat_scale.recipe import AugmentConfig
from tests.conftest import free_port
from tests.data.backends.helpers import SIZE, contents
from tests.data.streams.conftest import stream_config, tars

__all__ = ["stream_config", "tars"]


def test_a_web_server_gives_the_bytes_of_the_files_and_its_refusals_are_named(nginx, stream_config, tars: Path) -> None:
    def train(stream: str) -> list[object]:
        backend = open_backend(ImageSpec(stream_config(stream), AugmentConfig(), SIZE, 3, 5))
        try:
            return contents(backend.train_batches(TrainPlan(5, 24, 4, 2, 0, 1, "stream", lanes=1).slices(0, 6)))
        finally:
            backend.close()

    place = f"http://127.0.0.1:{nginx(tars)}"
    found = train(f"{place}/{{0..3}}.tar")
    # The same images; the name of a tar is part of a sample's id, which seeds its augmentation.
    assert sorted(label for one in found for label in one[3]) == sorted(  # type: ignore[index]
        label
        for one in train(f"{tars}/{{0..3}}.tar")
        for label in one[3]  # type: ignore[index]
    )
    assert found == train(f"{place}/{{0..3}}.tar")
    with pytest.raises(DataError, match=r"/no.tar ended with exit code 22"):
        train(f"{place}/no.tar")
    with pytest.raises(DataError, match="ended with exit code 7"):
        train(f"pipe:curl -s http://127.0.0.1:{free_port()}/0.tar")
