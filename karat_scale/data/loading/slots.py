"""Memory in which forked workers leave the images of their batches, and which is reused.

torch would give each tensor a new file in /dev/shm, whose pages must be mapped again in both processes. For an image of
224 px that costs 0.2 ms, up to a fifth of its decoding, and containers often have a small /dev/shm.
"""

import itertools
import math
import mmap
import weakref
from typing import Any

import numpy.typing as npt
import torch
from torch.utils.data import get_worker_info

from karat_scale.data.augmentation.draw import Draw
from karat_scale.data.batch import BadSample, Batch, Streamed
from karat_scale.foundation.errors import DataError

Shape = tuple[int, ...]
Small = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]
Rest = tuple[tuple[BadSample, ...], tuple[Draw, ...], int, int, int | None, Streamed | None]


class ImageSlots:
    """Memory for `count` batches of images, uint8 of `shape`, for each worker. Create it before the workers are forked.

    A worker fills its slots in turn. The images are copied when a batch is received, so a worker may be up to
    `count` batches ahead. Raises DataError if there is not enough memory.
    """

    def __init__(self, workers: int, count: int, shape: Shape) -> None:
        self._count, self._room = count, math.prod(shape)
        size = workers * count * self._room
        try:
            memory = mmap.mmap(-1, max(1, size))
        except (OSError, OverflowError) as error:
            raise DataError(
                f"no {size / 2**30:.1f} GiB of memory for prefetched batches; lower data.prefetch or data.workers"
            ) from error
        self._slots = torch.frombuffer(memory, dtype=torch.uint8)
        self._filled = 0
        self._key = next(_KEYS)
        _IN_USE[self._key] = self

    def next(self, shape: Shape) -> torch.Tensor:
        """Return the calling worker's next slot. Raises ValueError for more images than fit."""
        worker = get_worker_info()
        assert worker is not None
        if math.prod(shape) > self._room:
            raise ValueError("a loader's first batch must be its largest")
        slot = worker.id * self._count + self._filled % self._count
        self._filled += 1
        return self._at(slot * self._room, shape)

    def send(self, batch: Batch) -> "Sent":
        """Return a batch with images in a slot, as an object that is small when pickled and becomes a Batch again."""
        return Sent(self._key, int(batch.images.storage_offset()), batch)

    def take(self, offset: int, shape: Shape) -> torch.Tensor:
        """Return a copy of a slot, page-locked if this process uses a GPU."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_initialized()).copy_(
            self._at(offset, shape)
        )

    def _at(self, offset: int, shape: Shape) -> torch.Tensor:
        return self._slots[offset : offset + math.prod(shape)].view(shape)


class Sent:
    """See ImageSlots.send."""

    def __init__(self, key: int, offset: int, batch: Batch) -> None:
        self._key, self._offset, self._batch = key, offset, batch

    def __reduce__(self) -> tuple[Any, ...]:
        batch = self._batch
        # As arrays, since torch would also pass each small tensor as a file.
        small = batch.labels.numpy(), batch.sample_ids.numpy(), batch.valid.numpy()
        rest = batch.bad, batch.draws, batch.epoch, batch.batch, batch.digest, batch.streamed
        return _received, (self._key, self._offset, tuple(batch.images.shape), small, rest)


def _received(key: int, offset: int, shape: Shape, small: Small, rest: Rest) -> Batch:
    labels, sample_ids, valid = (torch.from_numpy(column) for column in small)
    return Batch(_IN_USE[key].take(offset, shape), labels, sample_ids, valid, *rest)


_KEYS = itertools.count()
_IN_USE: "weakref.WeakValueDictionary[int, ImageSlots]" = weakref.WeakValueDictionary()
