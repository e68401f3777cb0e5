"""Images that a source holds as raw pixels: each is encoded when it is read."""

import hashlib
import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from karat_scale.data.prepare.sources.base import Encoding, Source
from karat_scale.foundation.errors import DataError

JPEG_QUALITY = 95
_CHUNK = 4096


class PixelSource(Source):
    """Images uint8 [n, H, W] or [n, H, W, 3] with their class numbers. See Source.

    file: their file, for reports. own: the source's classes, which the labels number; `classes`, the shards',
    may have them in another order. facts: additional facts for dataset.json. Raises DataError if images and
    labels do not fit.
    """

    def __init__(
        self,
        file: str,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[Any],
        own: list[str],
        classes: list[str],
        encoding: Encoding,
        facts: dict[str, Any] | None = None,
    ) -> None:
        if images.ndim not in (3, 4) or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(f"{file} holds {images.shape} values, its labels {labels.shape}; fetch both again")
        if len(images) == 0:
            raise DataError(f"{file} holds no images")
        # Sizes are unknown before encoding; the pixels are about the upper limit.
        sizes = np.full(len(images), images[0].size)
        facts = {**(facts or {}), "encoding": encoding}
        super().__init__(classes, renumbered(file, labels, own, classes), sizes, facts)
        self._file, self._images, self._encoding = file, images, encoding

    def name(self, index: int) -> str:
        return f"{self._file}[{index}]"

    def key(self, index: int) -> str:
        return f"{index:06d}"

    def read(self, index: int) -> bytes:
        buffer = io.BytesIO()
        image = Image.fromarray(np.ascontiguousarray(self._images[index]))
        image.save(buffer, self._encoding, quality=JPEG_QUALITY)  # PNG ignores the quality
        return buffer.getvalue()

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for start in range(0, len(self), _CHUNK):
            digest.update(self._images[start : start + _CHUNK].tobytes())
        digest.update(self.labels.astype(np.uint8).tobytes())
        return digest.hexdigest()


def renumbered(file: str, labels: npt.NDArray[Any], own: list[str], classes: list[str]) -> npt.NDArray[np.int32]:
    """Convert labels that number `own` to labels that number `classes`. Raises DataError for an unknown one."""
    wrong = np.flatnonzero((labels < 0) | (labels >= len(own)))
    if len(wrong):
        raise DataError(
            f"{file}: sample {wrong[0]} has label {labels[wrong[0]]}, but there are {len(own)} classes; "
            "correct the classes or the labels"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    renamed: npt.NDArray[np.int32] = np.array([numbers[name] for name in own], dtype=np.int32)[labels]
    return renamed
