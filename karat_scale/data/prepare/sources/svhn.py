"""SVHN's cropped digits as a source: train_32x32.mat, test_32x32.mat and, as a separate split, extra_32x32.mat.

The files give the digit 0 the label 10; here the class of every digit is its number.
"""

from functools import partial
from pathlib import Path

import numpy as np
from torchvision.datasets import SVHN

from karat_scale.data.prepare.sources.base import Openers, SourceOptions
from karat_scale.data.prepare.sources.pixels import PixelSource
from karat_scale.data.prepare.sources.published import PublishedFiles, mat_array
from karat_scale.foundation.errors import DataError

DIGITS = [str(digit) for digit in range(10)]
_LABEL_OF_ZERO = 10


def svhn_splits(src: Path, options: SourceOptions) -> tuple[Openers, list[str]]:
    """Return the splits whose files are in `src`, and the classes; both empty if there is none."""
    found: Openers = {}
    for split, (_, file, md5) in SVHN.split_list.items():
        files = PublishedFiles(src, "svhn_extra" if split == "extra" else "svhn", {file: md5})
        if files.are_there:
            found[split] = partial(_open, file, files, options)
    return found, DIGITS if found else []


def _open(file: str, files: PublishedFiles, options: SourceOptions, classes: list[str]) -> PixelSource:
    data = files.checked(options.any_hash)[file]
    images, labels = mat_array(file, data, "X"), mat_array(file, data, "y").reshape(-1).astype(np.int64)
    if images.ndim != 4 or images.shape[2] != 3 or images.dtype != np.uint8:
        raise DataError(f"{file}: X is {images.dtype} {images.shape}, not uint8 [H, W, 3, n]; fetch it again")
    digits = np.where(labels == _LABEL_OF_ZERO, 0, np.where(labels == 0, -1, labels))
    encoding = options.encoding or "png"
    return PixelSource(file, np.moveaxis(images, -1, 0), digits, DIGITS, classes, encoding, files.facts)
