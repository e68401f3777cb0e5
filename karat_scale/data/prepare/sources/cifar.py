"""CIFAR-10 and CIFAR-100 as sources: their Python version, packed or unpacked.

cifar-10-python.tar.gz     cifar-10-batches-py/data_batch_1, ..., data_batch_5, test_batch, batches.meta
cifar-100-python.tar.gz    cifar-100-python/train, test, meta; the classes are the 100 fine ones
"""

import io
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torchvision.datasets import CIFAR10, CIFAR100

from karat_scale.data.prepare.sources.base import Openers, SourceOptions
from karat_scale.data.prepare.sources.pixels import PixelSource
from karat_scale.data.prepare.sources.published import PublishedFiles
from karat_scale.foundation.errors import DataError

SIDE = 32
_NAMES = {"cifar10": CIFAR10, "cifar100": CIFAR100}
# All names that NumPy's arrays in a pickle need, in its versions 1 and 2.
_HARMLESS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


def cifar_splits(src: Path, options: SourceOptions) -> tuple[Openers, list[str]]:
    """Return the splits of the CIFAR in `src`, and its classes; both empty if there is none. Raises DataError."""
    for name, data_set in _NAMES.items():
        lists = {"train": data_set.train_list, "test": data_set.test_list}
        md5 = {data_set.meta["filename"]: data_set.meta["md5"]}
        md5 |= {file: md5 for files in lists.values() for file, md5 in files}
        files = PublishedFiles(src, name, md5, data_set.filename, data_set.base_folder)
        if files.are_there:
            contents = files.checked(options.any_hash)
            own = _read(data_set.meta["filename"], contents)[data_set.meta["key"]]
            opener = partial(_open, data_set.base_folder, files, own, options)
            return {split: partial(opener, [file for file, _ in listed]) for split, listed in lists.items()}, own
    return {}, []


def _open(
    folder: str, files: PublishedFiles, own: list[str], options: SourceOptions, batches: list[str], classes: list[str]
) -> PixelSource:
    images, labels = zip(*(_batch(f"{folder}/{name}", _read(name, files.contents)) for name in batches), strict=True)
    name = f"{folder}/{batches[0]}" if len(batches) == 1 else f"{folder}/{batches[0]} to {batches[-1]}"
    encoding = options.encoding or "png"
    return PixelSource(name, np.concatenate(images), np.concatenate(labels), own, classes, encoding, files.facts)


def _batch(name: str, batch: dict[str, Any]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    data, labels = batch.get("data"), batch.get("labels", batch.get("fine_labels"))
    whole = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[1:] == (3 * SIDE * SIDE,)
    if data is None or not whole or not isinstance(labels, list):
        raise DataError(f"{name} does not have the images and labels of CIFAR's Python version; fetch it again")
    return data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), np.array(labels, dtype=np.int64)


def _read(name: str, contents: dict[str, bytes]) -> dict[str, Any]:
    try:
        # Python 2 wrote the files; their texts are bytes of latin1.
        found = _PlainUnpickler(io.BytesIO(contents[name]), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises nearly any error
        raise DataError(f"{name} is not a file of CIFAR's Python version ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{name} is not a file of CIFAR's Python version; fetch it again")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in found.items()}


class _PlainUnpickler(pickle.Unpickler):
    """Reads plain data and NumPy's arrays. A pickle that needs anything else is refused, so none runs code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it needs {module}.{name}, which images do not use")
        return super().find_class(module, name)
