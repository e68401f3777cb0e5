"""One number that says which samples were trained on, and how each was augmented.

It is a sum over samples, so it is the same for any world size, micro batch, number of workers and backend, and for a
run that was stopped and went on. Two runs with the same digest saw the same data.
"""

from hashlib import blake2b

from karat_scale.data.batch import Batch

BITS = 40  # sums over thousands of ranks stay exact in float64


def batch_digest(batch: Batch) -> int:
    """The batch's part of the sum, below 2^40: of each sample its global batch, id, label and draw."""
    total = 0
    draws = batch.draws or (None,) * len(batch.labels)
    for sample_id, label, draw in zip(batch.sample_ids.tolist(), batch.labels.tolist(), draws, strict=True):
        text = repr((batch.epoch, batch.batch, sample_id, label, draw))
        total += int.from_bytes(blake2b(text.encode(), digest_size=BITS // 8).digest(), "little")
    return total % 2**BITS
