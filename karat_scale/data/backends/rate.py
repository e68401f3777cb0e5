"""The speed of a recipe's data path in images a second, as one process sees it."""

import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.plan import PADDING, BatchSlice
from karat_scale.recipe import Recipe


def images_per_second(
    recipe: Recipe,
    workers: int,
    batch: int,
    seconds: float,
    ids: npt.NDArray[np.int64] | None = None,
    ready: Callable[[], object] = tuple,
) -> float:
    """Time training batches for about `seconds`, once all workers have started. Raises UserError as the backend does.

    Args:
        workers: instead of `data.workers`; 0 reads, decodes and augments in this process, on one core.
        ids: of the samples, again and again; all of them in random order if None.
        ready: called before the time runs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        backend = open_backend(ImageSpec.of(recipe.changed(data__workers=workers, data__verify="size")))
        try:
            if recipe.data.is_stream:  # its samples have no ids before they are read
                ids = np.full(batch, PADDING)
            order = np.random.default_rng(0).permutation(backend.num_train) if ids is None else ids
            batches = backend.train_batches(_endless_slices(order, batch, max(1, workers)))
            for _ in range(max(1, workers)):
                next(batches)
            ready()
            images, begun = 0, time.perf_counter()
            while images == 0 or time.perf_counter() - begun < seconds:
                images += len(next(batches).labels)
            return images / (time.perf_counter() - begun)
        finally:
            backend.close()
    finally:
        torch.set_num_threads(threads)


def _endless_slices(ids: npt.NDArray[np.int64], batch: int, lanes: int) -> Iterator[BatchSlice]:
    for number in itertools.count():
        places = np.arange(number * batch, (number + 1) * batch) % len(ids)
        yield BatchSlice(0, number, ids[places].astype(np.int64), number % lanes, lanes)
