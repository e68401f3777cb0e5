"""IDX files, the format of MNIST and Fashion-MNIST, as a source of grey images."""

import gzip
import re
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from karat_scale.data.prepare.sources.base import Openers, SourceOptions
from karat_scale.data.prepare.sources.pixels import PixelSource
from karat_scale.foundation.errors import DataError

CLASSES_FILE = "classes.txt"
_IMAGES = re.compile(r"(?P<split>\w+)-images[-.]idx3-ubyte(\.gz)?")
_LABELS = "labels{}idx1-ubyte"


def idx_splits(src: Path, options: SourceOptions) -> tuple[Openers, list[str]]:
    """Return the splits whose image files are in `src`, such as train and t10k, and their classes. Raises DataError."""
    found: dict[str, Path] = {}
    for path in sorted(src.iterdir()):
        match = _IMAGES.fullmatch(path.name)
        if match:
            found.setdefault(match["split"], path)
    if not found:
        return {}, []
    own = _classes(src, list(found.values()))
    return {name: partial(_open, path, own, options) for name, path in found.items()}, own


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Return the array of an IDX file of bytes, plain or gzipped. Raises DataError if it is damaged."""
    fix = "fetch it again"
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; {fix}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an IDX file of bytes; {fix}")
    dimensions = data[3]
    shape = np.frombuffer(data[4 : 4 + 4 * dimensions].ljust(4 * dimensions, b"\0"), dtype=">u4").astype(int)
    expected = 4 + 4 * dimensions + int(shape.prod())
    if len(data) != expected:
        raise DataError(f"{path} has {len(data)} bytes, but its header says {expected}; {fix}")
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _open(images: Path, own: list[str], options: SourceOptions, classes: list[str]) -> PixelSource:
    labels = read_idx(_labels_of(images))
    # The demo's figures were measured with JPEG; at this quality it is smaller than PNG and off by a level or two.
    return PixelSource(str(images), read_idx(images), labels, own, classes, options.encoding or "jpeg")


def _classes(src: Path, images: list[Path]) -> list[str]:
    """Return class names from classes.txt beside the files, one per line; else the numbers up to the largest label."""
    listed = src / CLASSES_FILE
    if listed.is_file():
        return [line.strip() for line in listed.read_text().splitlines() if line.strip()]
    largest = max(int(read_idx(_labels_of(path)).max(initial=0)) for path in images)
    return [str(label) for label in range(largest + 1)]


def _labels_of(images: Path) -> Path:
    for separator in "-.":
        for ending in (".gz", ""):
            name = images.name.split("-images")[0] + "-" + _LABELS.format(separator) + ending
            if (images.parent / name).is_file():
                return images.parent / name
    raise DataError(f"{images} has no labels file beside it; expected {images.name.replace('images', 'labels')}")
