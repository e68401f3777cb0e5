"""The speed of the recipe's data path in images per second, as a whole and in parts."""

from dataclasses import dataclass

import numpy as np

from karat_scale.data.backends.rate import images_per_second
from karat_scale.engine.distributed import World
from karat_scale.recipe import Recipe

LARGEST_BATCH = 16


@dataclass(frozen=True)
class DataSpeed:
    """Images per second of one rank, the slowest. Bytes come from the page cache.

    one_core: reading, decoding and the recipe's augmentation on one core. decode_one_core: the same without
    RandAugment and colour jitter. workers: with the recipe's workers.
    """

    one_core: float
    decode_one_core: float
    workers: float

    @property
    def decode_share(self) -> float:
        """The share of the work that is not augmentation."""
        return min(1.0, self.one_core / self.decode_one_core)


def measure_data(recipe: Recipe, ids: np.ndarray, batch: int, seconds: float, world: World) -> DataSpeed:
    """Time the backend for about `seconds`. Raises DataError."""
    bare = recipe.changed(augment__randaugment="", augment__color_jitter=0.0)
    is_generated = recipe.data.row.files is None
    in_process = recipe.data.fewest_workers
    batch = min(batch, LARGEST_BATCH)
    augments = not is_generated and bare != recipe
    share = seconds / (2 + augments)
    one_core = _slowest_rate(recipe, in_process, ids, batch, share, world)
    decode = _slowest_rate(bare, in_process, ids, batch, share, world) if augments else one_core
    with_workers = one_core
    if recipe.data.workers != in_process and not is_generated:
        with_workers = _slowest_rate(recipe, recipe.data.workers, ids, batch, share, world)
    return DataSpeed(one_core, decode, with_workers)


def _slowest_rate(recipe: Recipe, workers: int, ids: np.ndarray, batch: int, seconds: float, world: World) -> float:
    """Return images per second once all workers have started; all ranks measure at the same time."""
    rate = images_per_second(recipe, workers, batch, seconds, ids, ready=lambda: world.any(False))
    return min(world.gather(rate))
