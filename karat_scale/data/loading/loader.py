"""Batches in plan order from parallel worker processes, with digests of the data.

Forked workers leave the images of their batches in shared memory that is reused. torch would give each tensor a new
file in /dev/shm, whose pages must be mapped again in both processes. For an image of 224 px that costs 0.2 ms, up to a
fifth of its decoding, and containers often have a small /dev/shm.

One digest is of a data set's classes. The other is one number for the training samples and the augmentation of each. It
is a sum over samples, so it is the same for any world size, micro batch, number of workers and backend, and for a run
that was stopped and resumed. Two runs with the same digest trained on the same data.
"""

import itertools
import json
import math
import mmap
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b, sha256
from typing import Any, Protocol

import numpy.typing as npt
import torch

from karat_scale.data.batch import BadSample, Batch, Draw, Streamed
from karat_scale.data.loading.workers import OrderedResults, worker_number
from karat_scale.data.plan import BatchSlice
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
        worker = worker_number()
        assert worker is not None
        if math.prod(shape) > self._room:
            raise ValueError("a loader's first batch must be its largest")
        slot = worker * self._count + self._filled % self._count
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


BITS = 40  # sums over thousands of ranks stay exact in float64


def batch_digest(batch: Batch) -> int:
    """Return the batch's part of the sum, below 2^40: global batch, id, label and draw of each sample."""
    if batch.digest is not None:
        return batch.digest
    total = 0
    draws = batch.draws or (None,) * len(batch.labels)
    for sample_id, label, draw in zip(batch.sample_ids.tolist(), batch.labels.tolist(), draws, strict=True):
        text = repr((batch.epoch, batch.batch, sample_id, label, draw))
        total += int.from_bytes(blake2b(text.encode(), digest_size=BITS // 8).digest(), "little")
    digest: int = total % 2**BITS
    return digest


def with_digest(batch: Batch) -> Batch:
    """Return the batch with its digest. It takes about 10 us a sample, so the maker of the batch should call this."""
    return batch if batch.digest is not None else replace(batch, digest=batch_digest(batch))


def class_order_digest(names: Sequence[str]) -> str:
    """Return the SHA-256, as hex, of the names of classes in the order of their labels."""
    return sha256(json.dumps(list(names)).encode()).hexdigest()


def classes_digest(names: Iterable[str]) -> str:
    """Return the SHA-256, as hex, of the names of classes, in any order."""
    return sha256(json.dumps(sorted(names)).encode()).hexdigest()


class MakesBatches(Protocol):
    """An object that turns a slice into its batch."""

    def shape(self, part: BatchSlice) -> Shape:
        """Return the shape of the images, [b, 3, H, W]."""

    def fill(self, part: BatchSlice, images: torch.Tensor) -> Batch:
        """Return the batch; its pixels are written to `images`, uint8 of that shape."""

    def whereabouts(self, workers: int) -> str:
        """Return the last sample of each worker."""


class OrderedLoader(OrderedResults[Batch]):
    """Return the batches of `slices`, none of which is larger than the first. See OrderedResults."""

    def __init__(
        self, make: MakesBatches, slices: Iterable[BatchSlice], workers: int, prefetch: int, timeout: float
    ) -> None:
        self._slices = slices  # kept until the last batch: a process may fetch ahead for them
        parts = iter(slices)
        first = list(itertools.islice(parts, 1))
        slots = ImageSlots(workers, prefetch, make.shape(first[0])) if workers and first else None
        work = partial(_fill, make, slots)
        super().__init__(work, itertools.chain(first, parts), workers, prefetch, timeout, make.whereabouts)


def _fill(make: MakesBatches, slots: ImageSlots | None, part: BatchSlice) -> Batch | Sent:
    shape = make.shape(part)
    if slots is None:
        return with_digest(make.fill(part, torch.empty(shape, dtype=torch.uint8)))
    return slots.send(with_digest(make.fill(part, slots.next(shape))))
