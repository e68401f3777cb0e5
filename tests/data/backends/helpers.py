"""Helpers that the tests of the backends share."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from karat_scale.data.shards.tars import EncodedSample
from karat_scale.recipe import AugmentConfig
from tests.data.conftest import encode, exif, photo

SIZE = 16
CROP_AND_FLIP = AugmentConfig(color_jitter=0, randaugment="")


def broken(number: int) -> EncodedSample:
    return EncodedSample(f"broken-{number}", "jpg", encode(noise(number, 32))[:-400], number % 3)


def contents(batches):
    """Return all that batches hold, in a form that `==` compares."""
    return [
        (
            b.epoch,
            b.batch,
            b.images.numpy().tobytes(),
            b.labels.tolist(),
            b.sample_ids.tolist(),
            b.valid.tolist(),
            b.draws,
            b.bad,
        )
        for b in batches
    ]


def children() -> set[int]:
    """Return this process's children. An earlier test may have left some that end by themselves."""
    me = os.getpid()
    return {int(pid) for pid in Path(f"/proc/self/task/{me}/children").read_text().split()}


def running(pid: int) -> bool:
    """Return whether a process exists and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def flip(path: Path, at: int, by: int = 0xFF) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= by
    path.write_bytes(data)


def all_ended_since(before: set[int]) -> bool:
    """Return whether all children that were not there before have ended; one may still be a zombie."""
    return not any(map(running, children() - before))


def noise(number: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)


def odd_samples() -> Iterator[EncodedSample]:
    pixels = photo(3, 50, 40)
    image = Image.fromarray(pixels)
    trailing = encode(pixels, quality=95) + b"\0\0"
    variants = {
        "rotated": encode(pixels, quality=95, exif=exif(6)),
        "grey": encode(np.asarray(image.convert("L")), quality=95),
        "cmyk": encode(image.convert("CMYK")),
        "progressive": encode(pixels, progressive=True),
        "png": encode(pixels, "PNG"),
        "palette": encode(image.convert("P"), "PNG"),
        "alpha": encode(image.convert("RGBA"), "PNG"),
        "trailing": trailing,
        "thin": encode(pixels[:1]),
        "one pixel": encode(pixels[:1, :1]),
        "subsampled": encode(pixels, subsampling=0),
    }
    for name, data in variants.items():
        yield EncodedSample(name, "jpg", data, 0)


def hollow(number: int) -> EncodedSample:
    """Return a JPEG that is damaged only in the header of its scan, so that only decoding shows it."""
    data = encode(noise(number))
    start = data.index(b"\xff\xda") + 2  # of the scan's header
    return EncodedSample(f"hollow-{number}", "jpg", data[:start] + b"\0\2" + data[start + 2 :], number % 3)
