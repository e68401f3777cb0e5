"""Real shards of small real images, written by the project's own writer."""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from karat_scale.data.backends import Backend, ImageSpec, open_backend
from karat_scale.data.shards.shard_format import DatasetRecord, SplitRecord, write_dataset_record
from karat_scale.data.shards.tars import EncodedSample, shard_name, write_shard
from karat_scale.recipe import AugmentConfig, DataConfig
from tests.data.tars import write_stream

CLASSES = ["ant", "bee", "cat"]


def encode(image: np.ndarray | Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def photo(seed: int, width: int = 24, height: int = 20) -> np.ndarray:
    """Return a smooth colour image that JPEG keeps well, different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def sample(number: int, label: int | None = None) -> EncodedSample:
    data = encode(photo(number, 20 + number % 9, 18 + number % 7), quality=95)
    return EncodedSample(f"{number:04d}", "jpg", data, number % len(CLASSES) if label is None else label)


def write_split(directory: Path, split: str, samples: list[EncodedSample], per_shard: int = 8) -> SplitRecord:
    shards = [
        write_shard(directory, shard_name(split, number), samples[start : start + per_shard])
        for number, start in enumerate(range(0, len(samples), per_shard))
    ]
    return SplitRecord(
        samples=sum(shard.samples for shard in shards), bytes=sum(shard.bytes for shard in shards), shards=shards
    )


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes shards of a train and a val split, and returns their directory."""

    def make(train: list[EncodedSample] | None = None, val: list[EncodedSample] | None = None) -> Path:
        directory = tmp_path / "shards"
        directory.mkdir()
        record = DatasetRecord(classes=CLASSES)
        record.splits["train"] = write_split(directory, "train", train or [sample(i) for i in range(40)])
        record.splits["val"] = write_split(directory, "val", val or [sample(100 + i) for i in range(11)])
        write_dataset_record(directory, record)
        return directory

    return make


@pytest.fixture
def make_sample() -> Callable[..., EncodedSample]:
    return sample


@pytest.fixture
def data_config() -> Callable[..., DataConfig]:
    def make(directory: Path, **fields: object) -> DataConfig:
        return DataConfig.model_validate({"path": str(directory), "workers": 0, "prefetch": 2, **fields})

    return make


@pytest.fixture
def cheap_augment() -> AugmentConfig:
    return AugmentConfig(scale=(0.5, 1.0), color_jitter=0, randaugment="")


@pytest.fixture
def sample_data() -> Path:
    """Return the directory of real images, or skip the test if there is none."""
    folder = Path(os.environ.get("KARAT_SAMPLE_DATA", "../shared/data"))
    if not folder.is_dir():
        pytest.skip(f"no sample images in {folder}; set KARAT_SAMPLE_DATA")
    return folder


@pytest.fixture
def opened(data_config) -> Iterator[Callable[..., Backend]]:
    """Yield a function that opens a backend over a directory or of a data section.

    The default augmentation is the paper's. The backends are closed after the test.
    """
    backends = []

    def make(data, augment=None, seed=5, size=16, classes=3, **fields):
        config = data if isinstance(data, DataConfig) else data_config(data, **fields)
        backends.append(open_backend(ImageSpec(config, augment or AugmentConfig(), size, classes, seed)))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Return the directory of four tars of 5, 9, 3 and 7 samples, numbered consecutively."""
    return write_stream(tmp_path / "tars", (5, 9, 3, 7))


@pytest.fixture
def stream_config(make_shards, data_config) -> Callable[..., DataConfig]:
    """Return a function that makes a data section with `stream` as given and an indexed split to evaluate on."""
    given = {"order": "stream", "stream_samples": 24, "stream_buffer": 4}
    directory = make_shards()
    return lambda stream, **fields: data_config(directory, **{**given, "stream": str(stream), **fields})
