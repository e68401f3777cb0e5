"""Oxford Flowers-102 as a source: its official files.

102flowers.tgz     jpg/image_00001.jpg, ...
imagelabels.mat    the class of each image, from 1
setid.mat          which images train, validate and test

As in the transfer experiments of DeiT and others, the split train is the official training and validation images
together, 2,040; the split test, 6,149, is val to recipes.
"""

import io
import tarfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torchvision.datasets import Flowers102

from karat_scale.data.prepare.sources.base import ListedSource, Openers, SourceOptions
from karat_scale.data.prepare.sources.pixels import renumbered
from karat_scale.data.prepare.sources.published import PublishedFiles, mat_array
from karat_scale.foundation.errors import DataError

IMAGES, LABELS, SETS = (Flowers102._file_dict[part][0] for part in ("image", "label", "setid"))
FOLDER = "flowers-102"  # torchvision's folder
_SPLITS = {"train": ("trnid", "valid"), "test": ("tstid",)}
# Older torchvision does not have the readable names of the classes.
CLASSES: list[str] = getattr(Flowers102, "classes", None) or [str(number) for number in range(1, 103)]


def flowers_splits(src: Path, options: SourceOptions) -> tuple[Openers, list[str]]:
    """Return the splits of the Flowers-102 in `src`, and its classes; both empty if there is none. Raises DataError."""
    files = PublishedFiles(src, "flowers102", dict(Flowers102._file_dict.values()), folder=FOLDER)
    if not files.are_there:
        return {}, []
    contents = files.checked(options.any_hash)
    images = _images(contents[IMAGES])
    labels = mat_array(LABELS, contents[LABELS], "labels").reshape(-1)
    found: Openers = {}
    for split, parts in _SPLITS.items():
        ids = np.concatenate([mat_array(SETS, contents[SETS], part).reshape(-1) for part in parts])
        found[split] = partial(FlowersSource, images, labels, ids, files.facts)
    return found, CLASSES


class FlowersSource(ListedSource):
    """The images with these numbers, which count from 1. See Source. Raises DataError if one is missing."""

    def __init__(
        self,
        images: dict[str, bytes],
        labels: npt.NDArray[Any],
        ids: npt.NDArray[Any],
        facts: dict[str, Any],
        classes: list[str],
    ) -> None:
        paths = [f"jpg/image_{number:05d}.jpg" for number in ids]
        missing = next((path for path in paths if path not in images), None)
        if missing is not None or ids.max(initial=0) > len(labels):
            raise DataError(f"{SETS} names {missing or paths[-1]}, which has no image or label; fetch all again")
        own = renumbered(LABELS, labels[ids.astype(np.int64) - 1].astype(np.int64) - 1, CLASSES, classes)
        super().__init__(classes, paths, own, [len(images[path]) for path in paths], facts)
        self._images = images

    def read(self, index: int) -> bytes:
        return self._images[self._paths[index]]


def _images(archive: bytes) -> dict[str, bytes]:
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            return {member.name: tar.extractfile(member).read() for member in tar if member.isreg()}  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{IMAGES} is damaged or cut short ({error}); fetch it again") from error
