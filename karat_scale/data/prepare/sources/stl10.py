"""STL-10 as a source: its binary version, packed or unpacked, without the unlabelled images.

stl10_binary.tar.gz    stl10_binary/train_X.bin, train_y.bin, test_X.bin, test_y.bin, class_names.txt
"""

from functools import partial
from pathlib import Path

import numpy as np
from torchvision.datasets import STL10

from karat_scale.data.prepare.sources.base import Openers, SourceOptions
from karat_scale.data.prepare.sources.pixels import PixelSource
from karat_scale.data.prepare.sources.published import PublishedFiles
from karat_scale.foundation.errors import DataError

SIDE = 96


def stl10_splits(src: Path, options: SourceOptions) -> tuple[Openers, list[str]]:
    """Return the splits of the STL-10 in `src`, and its classes; both empty if there is none. Raises DataError."""
    md5: dict[str, str | None] = {STL10.class_names_file: None}
    md5 |= {file: md5 for file, md5 in (*STL10.train_list, *STL10.test_list) if not file.startswith("unlabeled")}
    files = PublishedFiles(src, "stl10", md5, STL10.filename, STL10.base_folder)
    if not files.are_there:
        return {}, []
    own = files.checked(options.any_hash)[STL10.class_names_file].decode("utf-8", "replace").split()
    return {split: partial(_open, split, files, own, options) for split in ("train", "test")}, own


def _open(split: str, files: PublishedFiles, own: list[str], options: SourceOptions, classes: list[str]) -> PixelSource:
    name = f"{split}_X.bin"
    pixels = np.frombuffer(files.contents[name], dtype=np.uint8)
    if pixels.size % (3 * SIDE * SIDE):
        raise DataError(f"{name} has {pixels.size} bytes, not a whole number of images; fetch it again")
    # Each image is three planes, each column by column.
    images = pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 3, 2, 1)
    labels = np.frombuffer(files.contents[f"{split}_y.bin"], dtype=np.uint8).astype(np.int64) - 1
    return PixelSource(name, images, labels, own, classes, options.encoding or "png", files.facts)
