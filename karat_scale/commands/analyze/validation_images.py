"""Chosen images of a run's validation split, through the run's own backend."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.data.augmentation.normalize import Normalize
from karat_scale.data.backends import Backend, ImageSpec, open_backend
from karat_scale.data.batch import Batch
from karat_scale.data.plan import PADDING, BatchSlice
from karat_scale.foundation.errors import DataError
from karat_scale.recipe import Recipe


class ValidationImages:
    """The same images in the same order in each pass, in batches, so that memory does not grow with their number.

    `bad` counts the images that could not be read, in the last pass.
    """

    def __init__(self, recipe: Recipe, count: int, ids: tuple[int, ...] | None = None) -> None:
        # Few images need no workers, and analyses of several runs should not need more processes.
        self._spec = ImageSpec.of(recipe.changed(data__workers=0))
        self._normalize = Normalize(recipe.augment.mean, recipe.augment.std)
        self.bad = 0
        backend = self._open()
        try:
            self.classes, total = backend.classes, backend.num_val
        finally:
            backend.close()
        if ids is None:
            ids = tuple(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist())
        outside = [i for i in ids if not 0 <= i < total]
        if outside or not ids:
            raise DataError(
                f"image {outside[0] if outside else 'list'}: the validation split has images 0 to {total - 1}"
            )
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def raw(self, batch_size: int) -> Iterator[Batch]:
        """Yield batches of bytes, without the images that could not be read."""
        self.bad = 0
        slices = [
            BatchSlice(0, number, _padded(self.ids[start : start + batch_size], batch_size))
            for number, start in enumerate(range(0, len(self.ids), batch_size))
        ]
        backend = self._open()
        try:
            read = 0
            for batch in backend.eval_batches(slices):
                self.bad += len(batch.bad)
                keep = batch.valid
                read += int(keep.sum())
                if keep.any():
                    yield Batch(batch.images[keep], batch.labels[keep], batch.sample_ids[keep], batch.valid[keep])
            if not read:
                raise DataError(f"none of the {len(self.ids)} chosen validation images can be read")
        finally:
            backend.close()

    def batches(self, batch_size: int, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield normalised float32 images [b, 3, H, W] and labels [b]."""
        for batch in self.raw(batch_size):
            yield self.normalized(batch, device), batch.labels.to(device)

    def normalized(self, batch: Batch, device: torch.device) -> torch.Tensor:
        """Return a batch's bytes as normalised float32 images [b, 3, H, W]."""
        return self._normalize(batch.images.to(device))

    def in_memory(self, batch_size: int, device: torch.device) -> "ImagesInMemory":
        """The batches of `batches` for many passes: decoded once and kept as bytes."""
        return ImagesInMemory(list(self.raw(batch_size)), self._normalize, device)

    def _open(self) -> Backend:
        return open_backend(self._spec)


class ImagesInMemory:
    """Yield normalised float32 images [b, 3, H, W] and labels [b], converted from the bytes in each pass."""

    def __init__(self, kept: list[Batch], normalize: Normalize, device: torch.device) -> None:
        self._kept, self._normalize, self._device = kept, normalize, device

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in self._kept:
            yield self._normalize(batch.images.to(self._device)), batch.labels.to(self._device)

    def __len__(self) -> int:
        return sum(len(batch.labels) for batch in self._kept)


def _padded(ids: tuple[int, ...], size: int) -> npt.NDArray[np.int64]:
    return np.array([*ids, *[PADDING] * (size - len(ids))], dtype=np.int64)
