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
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b, sha256
from typing import Any

import torch

from karat_scale.data.batch import Batch
from karat_scale.data.loading.assemble import Assembler
from karat_scale.data.loading.workers import OrderedResults, worker_number
from karat_scale.data.plan import BatchSlice
from karat_scale.foundation.errors import DataError

Shape = tuple[int, ...]
Packed = tuple[int, Shape, Batch]


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

    def next(self, shape: Shape) -> torch.Tensor:
        """Return the calling worker's next slot. Raises ValueError for more images than fit."""
        worker = worker_number()
        assert worker is not None
        if math.prod(shape) > self._room:
            raise ValueError("a loader's first batch must be its largest")
        slot = worker * self._count + self._filled % self._count
        self._filled += 1
        return self._at(slot * self._room, shape)

    def pack(self, batch: Batch) -> Packed:
        """Return a batch with images in a slot as something that is small when it is pickled."""
        images = batch.images
        return int(images.storage_offset()), tuple(images.shape), replace(batch, images=torch.empty(0))

    def unpack(self, packed: Packed) -> Batch:
        """Return the batch with a copy of its images, page-locked if this process uses a GPU."""
        offset, shape, batch = packed
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_initialized())
        return replace(batch, images=images.copy_(self._at(offset, shape)))

    def _at(self, offset: int, shape: Shape) -> torch.Tensor:
        return self._slots[offset : offset + math.prod(shape)].view(shape)


BITS = 40  # sums over thousands of ranks stay exact in float64


def batch_digest(batch: Batch) -> int:
    """Return the batch's part of the sum, below 2^40: global batch, id, label and draw of each sample."""
    if batch.digest is not None:
        return batch.digest
    draws = batch.draws or (None,) * len(batch.labels)
    rows = zip(batch.sample_ids.tolist(), batch.labels.tolist(), draws, strict=True)
    return digest_sum((batch.epoch, batch.batch, *row) for row in rows)


def digest_sum(rows: Iterable[tuple[Any, ...]]) -> int:
    """Return the sum of the digests of what `repr` shows of each row, modulo 2^40."""
    digests = (blake2b(repr(row).encode(), digest_size=BITS // 8).digest() for row in rows)
    return sum(int.from_bytes(digest, "little") for digest in digests) % 2**BITS


def with_digest(batch: Batch) -> Batch:
    """Return the batch with its digest. It takes about 10 us a sample, so the maker of the batch should call this."""
    return batch if batch.digest is not None else replace(batch, digest=batch_digest(batch))


def class_order_digest(names: Sequence[str]) -> str:
    """Return the SHA-256, as hex, of the names of classes in the order of their labels."""
    return sha256(json.dumps(list(names)).encode()).hexdigest()


def classes_digest(names: Iterable[str]) -> str:
    """Return the SHA-256, as hex, of the names of classes, in any order."""
    return sha256(json.dumps(sorted(names)).encode()).hexdigest()


class OrderedLoader(OrderedResults[Batch]):
    """Return the batches of `slices`, none of which is larger than the first. See OrderedResults."""

    def __init__(
        self, make: Assembler, slices: Iterable[BatchSlice], workers: int, prefetch: int, timeout: float
    ) -> None:
        self._given = slices  # kept until the last batch: a process may fetch ahead for them
        parts = iter(slices)
        first = list(itertools.islice(parts, 1))
        self._slots = ImageSlots(workers, prefetch, make.shape(first[0])) if workers and first else None
        work = partial(_fill, make, self._slots)
        super().__init__(work, itertools.chain(first, parts), workers, prefetch, timeout, make.whereabouts)

    def _received(self, answer: Any) -> Batch:
        assert self._slots is not None
        return self._slots.unpack(answer)


def _fill(make: Assembler, slots: ImageSlots | None, part: BatchSlice) -> Batch | Packed:
    if slots is None:
        return with_digest(make[part])
    return slots.pack(with_digest(make.fill(part, slots.next(make.shape(part)))))
