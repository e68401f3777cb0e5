"""The batch that a backend gives to the trainer, the record of what was drawn for its samples, and digests of the data.

One digest is of a data set's classes. The other is one number for the training samples and the augmentation of each. It
is a sum over samples, so it is the same for any world size, micro batch, number of workers and backend, and for a run
that was stopped and resumed. Two runs with the same digest trained on the same data.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.data.plan import BatchSlice, LanePlace

# A RandAugment operation's name and the arguments of its function: degrees, factors, pixels.
Operation = tuple[str, tuple[float, ...]]


@dataclass(frozen=True)
class Draw:
    """The augmentation of one sample, as it was drawn. Two backends must agree on it.

    box: left, top, width, height in source pixels. ops: RandAugment's operations with their arguments. jitter:
    (name, factor) in the order applied. erase: left, top, width, height in pixels of the result, and the seed of the
    noise that fills it.
    """

    box: tuple[int, int, int, int]
    flip: bool = False
    ops: tuple[Operation, ...] = ()
    jitter: tuple[tuple[str, float], ...] = ()
    erase: tuple[int, int, int, int, int] | None = None


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be decoded (or, in a stream, used), and the reason."""

    sample_id: int
    key: str
    shard: str
    reason: str
    done: str = "decoded"

    def __str__(self) -> str:
        return f"sample {self.key} in {self.shard} cannot be {self.done}: {self.reason}"


@dataclass(frozen=True)
class Streamed:
    """A batch's position in its stream: its lane, the place after its last sample, and (key, shard) of each sample."""

    lane: int
    place: LanePlace
    sources: tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro batch.

    images: uint8 [b, 3, H, W]. labels: int64 [b]; 0 in padding. sample_ids: int64 [b]; if training replaced an
    unreadable sample, the id of its replacement. valid: bool [b]; False for padding and for unreadable samples of an
    evaluation. bad: the unreadable samples. draws: the augmentation of each sample of a training batch. epoch and
    batch: those of the slice. digest: the value of `batch_digest`, if the maker of the batch has computed it. streamed:
    the position in the stream; None if the batch is not from a stream.
    """

    images: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor
    valid: torch.Tensor
    bad: tuple[BadSample, ...] = ()
    draws: tuple[Draw, ...] = ()
    epoch: int = 0
    batch: int = 0
    digest: int | None = None
    streamed: Streamed | None = None

    @classmethod
    def of(
        cls,
        part: BatchSlice,
        images: torch.Tensor,
        labels: npt.NDArray[np.int64],
        valid: npt.NDArray[np.bool_],
        **more: Any,
    ) -> "Batch":
        """Return the batch of a slice, with these and `more` fields."""
        ids = torch.from_numpy(part.sample_ids.copy())
        numbers, real = torch.from_numpy(labels), torch.from_numpy(valid)
        return cls(images, numbers, ids, real, epoch=part.epoch, batch=part.batch, **more)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors that move to the device."""
        return [self.images, self.labels, self.valid]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """Return the same batch on `device`; the copy overlaps with other work if the memory is pinned.

        `sample_ids` stay on the host, because only the host uses them.
        """
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Return the same batch in page-locked memory, except what is on a device."""
        return self._with_each(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)

    def _with_each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return replace(self, images=change(self.images), labels=change(self.labels), valid=change(self.valid))


BITS = 40  # sums over thousands of ranks stay exact in float64


def batch_digest(batch: Batch) -> int:
    """Return the batch's part of the digest sum, below 2^40: of each sample's global batch, id, label and draw."""
    if batch.digest is not None:
        return batch.digest
    draws = batch.draws or (None,) * len(batch.labels)
    rows = zip(batch.sample_ids.tolist(), batch.labels.tolist(), draws, strict=True)
    return digest_sum((batch.epoch, batch.batch, *row) for row in rows)


def digest_sum(rows: Iterable[tuple[Any, ...]]) -> int:
    """Return the sum of the digests of each row's `repr`, modulo 2^40."""
    digests = (blake2b(repr(row).encode(), digest_size=BITS // 8).digest() for row in rows)
    return sum(int.from_bytes(digest, "little") for digest in digests) % (1 << BITS)


def with_digest(batch: Batch) -> Batch:
    """Return the batch with its digest. It takes about 10 us a sample, so the maker of the batch should call this."""
    return batch if batch.digest is not None else replace(batch, digest=batch_digest(batch))


def class_order_digest(names: Sequence[str]) -> str:
    """Return the SHA-256, as hex, of the names of classes in the order of their labels."""
    return sha256(json.dumps(list(names)).encode()).hexdigest()


def classes_digest(names: Iterable[str]) -> str:
    """Return the SHA-256, as hex, of the names of classes, in any order."""
    return sha256(json.dumps(sorted(names)).encode()).hexdigest()
