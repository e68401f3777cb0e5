"""The `synthetic` backend: images generated from their sample id, without files.

It is for tests, and to measure everything except the data. Each class has its own coarse pattern under noise, so a
model can learn the classes. The recipe's augmentation does not apply.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.data.batch import Batch
from karat_scale.data.loading.assemble import ImageSpec
from karat_scale.data.order import sample_seed
from karat_scale.data.plan import PADDING, BatchSlice

PATTERN_CELLS = 4
NOISE_STARTS = 1 << 20
TRAIN_STREAM, VAL_STREAM = 0, 1


class SyntheticBackend:
    """The `synthetic` backend; see Backend. Sample i has label i mod classes, in both splits."""

    def __init__(self, spec: ImageSpec) -> None:
        image_size = spec.image_size
        self._samples = spec.data.synthetic_samples
        self._image_size = image_size
        self._num_classes = spec.num_classes
        self._seed = spec.seed
        self._pixels = 3 * image_size * image_size
        # An image's noise is a window of one fixed stretch of noise: a copy is much cheaper than new noise.
        self._noise = self._draw(key=0, count=NOISE_STARTS + self._pixels) >> 1
        self._cell = np.minimum(np.arange(image_size) * PATTERN_CELLS // image_size, PATTERN_CELLS - 1)

    @staticmethod
    def _draw(key: int, count: int) -> npt.NDArray[np.uint8]:
        raw = np.random.Philox(key=key).random_raw(-(-count // 8))
        return raw.astype("<u8", copy=False).view(np.uint8)[:count]

    @property
    def num_train(self) -> int:
        return self._samples

    @property
    def num_val(self) -> int:
        return self._samples

    @property
    def num_classes(self) -> int:
        return self._num_classes

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(f"class {label}" for label in range(self._num_classes))

    @property
    def identity(self) -> str:
        """What is generated."""
        return f"{self._samples} synthetic images of {self._num_classes} classes, seed {self._seed}"

    def train_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        return (self._batch(part, TRAIN_STREAM) for part in slices)

    def eval_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        return (self._batch(part, VAL_STREAM) for part in slices)

    def _batch(self, part: BatchSlice, stream: int) -> Batch:
        valid = part.sample_ids != PADDING
        labels = np.where(valid, part.sample_ids % self._num_classes, 0)
        images = torch.zeros(len(valid), 3, self._image_size, self._image_size, dtype=torch.uint8)
        pixels = images.numpy()
        for row in np.flatnonzero(valid):
            pixels[row] = self._image(int(part.sample_ids[row]), int(labels[row]), stream)
        return Batch.of(part, images, labels, valid)

    def _image(self, sample_id: int, label: int, stream: int) -> npt.NDArray[np.uint8]:
        start = sample_seed(self._seed, stream, sample_id) % NOISE_STARTS
        noise = self._noise[start : start + self._pixels].reshape(3, self._image_size, self._image_size)
        cells = self._draw(key=1 + label, count=3 * PATTERN_CELLS**2) >> 1
        pattern = cells.reshape(3, PATTERN_CELLS, PATTERN_CELLS)[:, self._cell[:, None], self._cell]
        return noise + pattern

    def close(self) -> None:
        """Do nothing: no file is open."""
