"""What the backends' tests have in common."""

import io
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image

from karat_scale.data.shard_writer import EncodedSample

SIZE = 16


def broken(number: int) -> EncodedSample:
    noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return EncodedSample(f"broken-{number}", "jpg", buffer.getvalue()[:-400], number % 3)


def contents(batches):
    """All that batches hold, as something that compares."""
    return [
        (
            b.epoch,
            b.batch,
            b.images.numpy().tobytes(),
            b.labels.tolist(),
            b.sample_ids.tolist(),
            b.valid.tolist(),
            b.draws,
            b.bad,
        )
        for b in batches
    ]


def children() -> list[int]:
    me = os.getpid()
    return [int(pid) for pid in Path(f"/proc/self/task/{me}/children").read_text().split()]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
