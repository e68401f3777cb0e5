"""Digests of data: of the training samples, and of a data set's classes.

The first is one number for the training samples and the augmentation of each. It is a sum over samples,
so it is the same for any world size, micro batch, number of workers and backend, and for a run that was stopped and
resumed. Two runs with the same digest trained on the same data.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b, sha256

from karat_scale.data.batch import Batch

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
