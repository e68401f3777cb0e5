"""Augmentation by batch, for libraries that decode and crop whole batches themselves."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.data.augment import TrainTransform
from karat_scale.data.draw import Draw
from karat_scale.data.order import sample_seed
from karat_scale.data.plan import BatchSlice


class BatchFinisher:
    """Draws as the other backends draw, and does after the crop what they do, in `threads` threads.

    Pillow and numpy let go of the interpreter's lock while they work on pixels.
    """

    def __init__(self, transform: TrainTransform, seed: int, threads: int) -> None:
        self._transform = transform
        self._seed = seed
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="karat-augment")

    def draw(self, part: BatchSlice, dimensions: Iterable[tuple[int, int]]) -> tuple[Draw, ...]:
        """A draw for each sample of a slice, of these (width, height)."""
        return tuple(
            self._transform.draw(sample_seed(self._seed, part.epoch, sample_id), width, height)
            for sample_id, (width, height) in zip(part.sample_ids.tolist(), dimensions, strict=True)
        )

    def finish(self, views: npt.NDArray[np.uint8], draws: Sequence[Draw]) -> torch.Tensor:
        """Flip, RandAugment, jitter, erasing on the crops, uint8 [b, size, size, 3]; returns uint8 [b, 3, size, size].

        The crops are read and let go, so they may be views of a buffer that is filled again afterwards.
        """
        batch, height, width, channels = views.shape
        images = torch.empty(batch, channels, height, width, dtype=torch.uint8)
        pixels = images.numpy()

        def one(row: int) -> None:
            pixels[row] = self._transform.finish(views[row], draws[row])

        for _ in self._pool.map(one, range(batch)):
            pass
        return images

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)
