"""The order of an epoch and every seed of the data path, as pure functions.

Nothing here depends on world size, workers, backend or the history of the run. Streams come from BLAKE2 and
from Philox's raw output, which numpy never changes, so an order is the same under every numpy version.
"""

import struct
from hashlib import blake2b

import numpy as np
import numpy.typing as npt


def _digest(purpose: bytes, size: int, *values: int) -> bytes:
    # The purpose keeps the streams of order, samples and batches apart though their numbers are equal.
    return blake2b(struct.pack(f"<{len(values)}q", *values), digest_size=size, person=purpose).digest()


def epoch_order(seed: int, epoch: int, num_samples: int, policy: str = "full") -> npt.NDArray[np.int64]:
    """The samples of one epoch in training order: int64 [num_samples], a permutation of 0 .. num_samples - 1.

    `full` ranks the samples by independent 64-bit random numbers. Raises ValueError for another policy.
    """
    if policy != "full":
        raise ValueError(f"unknown order policy {policy!r}; use 'full'")
    key = np.frombuffer(_digest(b"order", 16, seed, epoch), dtype="<u8")
    ranks = np.random.Philox(key=key).random_raw(num_samples)
    return np.argsort(ranks, kind="stable").astype(np.int64, copy=False)


def sample_seed(seed: int, epoch: int, sample_id: int) -> int:
    """The 64-bit seed of one sample's augmentation in one epoch."""
    return int.from_bytes(_digest(b"sample", 8, seed, epoch, sample_id), "little")


def batch_seed(seed: int, epoch: int, batch: int) -> int:
    """The 64-bit seed of what one global batch draws as a whole: mixup or cutmix, lambda and box."""
    return int.from_bytes(_digest(b"batch", 8, seed, epoch, batch), "little")
