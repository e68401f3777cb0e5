"""The order of an epoch and every seed of the data path, as pure functions.

Nothing here depends on world size, workers, backend or the history of the run. Streams come from BLAKE2 and
from Philox's raw output, which numpy never changes, so an order is the same under every numpy version.
"""

import struct
from hashlib import blake2b

import numpy as np
import numpy.typing as npt


def _digest(purpose: bytes, size: int, *values: int) -> bytes:
    # The purpose keeps the streams of order, samples and batches separate even if their numbers are equal.
    return blake2b(struct.pack(f"<{len(values)}q", *values), digest_size=size, person=purpose).digest()


BLOCK_SAMPLES, WINDOW_BLOCKS = 256, 32


def epoch_order(
    seed: int,
    epoch: int,
    num_samples: int,
    policy: str = "full",
    block_samples: int = BLOCK_SAMPLES,
    window_blocks: int = WINDOW_BLOCKS,
) -> npt.NDArray[np.int64]:
    """Return the samples of one epoch in training order: int64 [num_samples], a permutation of 0 .. num_samples - 1.

    `full` ranks the samples by independent 64-bit random numbers. `block` is for disks with slow seeks: it permutes
    blocks of consecutive samples, then shuffles within windows of that many blocks. Raises ValueError for another
    policy.
    """
    if policy == "full":
        return _permutation(_digest(b"order", 16, seed, epoch), num_samples)
    if policy != "block":
        raise ValueError(f"unknown order policy {policy!r}; use 'full' or 'block'")
    blocks = _permutation(_digest(b"blocks", 16, seed, epoch), -(-num_samples // block_samples))
    ids = (blocks[:, None] * block_samples + np.arange(block_samples)).ravel()
    ids = ids[ids < num_samples]
    window = np.arange(num_samples) // (block_samples * window_blocks)
    ranks = _ranks(_digest(b"windows", 16, seed, epoch), num_samples)
    return ids[np.lexsort((ranks, window))]


def _permutation(key: bytes, length: int) -> npt.NDArray[np.int64]:
    return np.argsort(_ranks(key, length), kind="stable").astype(np.int64, copy=False)


def _ranks(key: bytes, length: int) -> npt.NDArray[np.uint64]:
    return np.random.Philox(key=np.frombuffer(key, dtype="<u8")).random_raw(length)


def sample_seed(seed: int, epoch: int, sample_id: int) -> int:
    """Return the 64-bit seed of one sample's augmentation in one epoch."""
    return int.from_bytes(_digest(b"sample", 8, seed, epoch, sample_id), "little")


def shuffle_seed(seed: int, entry: int) -> int:
    """Return the 64-bit seed that shuffles the samples of one entry of a stream's endless list of shards."""
    return int.from_bytes(_digest(b"shuffle", 8, seed, entry), "little")


def batch_seed(seed: int, epoch: int, batch: int) -> int:
    """Return the 64-bit seed of the draws of a whole global batch: mixup or cutmix, lambda and box."""
    return int.from_bytes(_digest(b"batch", 8, seed, epoch, batch), "little")
