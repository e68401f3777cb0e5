"""The images that `karat bench data` reads: some of yours, or photo-like ones made here, in each backend's layout."""

import io
import itertools
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from karat_scale.data.decoders.decode import UndecodableImageError, decode_rgb
from karat_scale.data.decoders.jpeg_header import read_frame
from karat_scale.data.shards.shard_format import DatasetRecord, SplitRecord, write_dataset_record
from karat_scale.data.shards.shard_writer import EncodedSample, shard_name, write_shard
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.foundation.errors import DataError

CLASSES, PER_SHARD = 10, 100
# As ImageNet's files are: a median of 500 x 375 pixels, and about 110 KB.
LONG_SIDE, SHORT_SIDE, QUALITY = 500, 375, 93
OCTAVES, NOISE = 7, 12.0
JPEG_ENDINGS = (".jpg", ".jpeg")


@dataclass(frozen=True)
class SampleImages:
    """Encoded images in memory, as shards, and as an ImageFolder. Each split holds the same images."""

    encoded: tuple[bytes, ...]
    shards: Path
    folder: Path
    source: str

    @property
    def megabytes(self) -> float:
        return sum(len(data) for data in self.encoded) / 1e6


def prepare_images(scratch: Path, count: int, shards: str | None, tar: str | None) -> SampleImages:
    """Up to `count` images of a directory of shards, of a tar, or made here, laid out under `scratch`.

    Only grey and colour JPEGs that are whole, which every contender can read. Raises DataError where there are none.
    """
    if shards:
        found, source = _from_shards(shards), shards
    elif tar:
        found, source = _from_tar(tar), tar
    else:
        found, source = (photo_like(seed) for seed in itertools.count()), "made here"
    encoded = list(itertools.islice(filter(_is_ordinary, found), count))
    if not encoded:
        raise DataError(f"{source} holds no JPEG; name another by --path or --tar")
    _write_shards(scratch / "shards", encoded)
    _write_folder(scratch / "folder", encoded)
    return SampleImages(tuple(encoded), scratch / "shards", scratch / "folder", source)


def photo_like(seed: int) -> bytes:
    """A JPEG with detail at every scale, as photographs have; the same for the same seed."""
    rng = np.random.default_rng(seed)
    size = (LONG_SIDE, SHORT_SIDE) if seed % 4 else (SHORT_SIDE, LONG_SIDE)
    pixels = np.full((size[1], size[0], 3), 128.0)
    for octave in range(1, OCTAVES + 1):
        cells = rng.uniform(-1, 1, (2**octave, 2**octave, 3))
        # Brightness varies more than colour.
        cells = 0.7 * cells.mean(axis=2, keepdims=True) + 0.3 * cells
        as_image = Image.fromarray((127.5 + 127.5 * cells).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        pixels += (np.asarray(as_image) - 127.5) * 2.6 / 1.45**octave
    pixels += rng.normal(0, NOISE, pixels.shape[:2])[..., None]
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _is_ordinary(data: bytes) -> bool:
    frame = read_frame(data)
    if frame is None or not frame.is_grey_or_colour:
        return False
    try:
        decode_rgb(data)
    except UndecodableImageError:
        return False
    return True


def _from_shards(directory: str) -> Iterator[bytes]:
    split = ShardSplit(directory, "train", num_classes=1 << 30)
    try:
        yield from map(split.read, range(len(split)))
    finally:
        split.close()


def _from_tar(path: str) -> Iterator[bytes]:
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.lower().endswith(JPEG_ENDINGS) and (file := tar.extractfile(member)):
                    yield file.read()
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"--tar {path} cannot be read: {error}") from error


def _write_shards(directory: Path, encoded: list[bytes]) -> None:
    directory.mkdir()
    record = DatasetRecord(classes=[_class_name(label) for label in range(min(CLASSES, len(encoded)))])
    samples = [EncodedSample(f"{i:06d}", "jpg", data, i % CLASSES) for i, data in enumerate(encoded)]
    for split in ("train", "val"):
        written = [
            write_shard(directory, shard_name(split, number), samples[start : start + PER_SHARD])
            for number, start in enumerate(range(0, len(samples), PER_SHARD))
        ]
        record.splits[split] = SplitRecord(
            samples=len(samples), bytes=sum(shard.bytes for shard in written), shards=written
        )
    write_dataset_record(directory, record)


def _write_folder(directory: Path, encoded: list[bytes]) -> None:
    for split in ("train", "val"):
        for label in range(min(CLASSES, len(encoded))):
            (directory / split / _class_name(label)).mkdir(parents=True)
        for number, data in enumerate(encoded):
            (directory / split / _class_name(number % CLASSES) / f"{number:06d}.jpg").write_bytes(data)


def _class_name(label: int) -> str:
    return f"class-{label:02d}"
