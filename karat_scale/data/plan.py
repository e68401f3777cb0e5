"""The order of an epoch, every seed of the data path, and the samples of each batch on each rank, as pure functions.

Nothing here depends on workers, backend or the history of the run, and all is planned before anything is read. Random
numbers come from BLAKE2 and from Philox's raw output, which numpy never changes, so an order is the same under every
numpy version.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import DataError, RecipeError
from karat_scale.recipe import Recipe, RunRecipe


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
    blocks of consecutive samples, then shuffles within windows of `window_blocks` blocks.
    """
    if policy == "full":
        return _permutation(_digest(b"order", 16, seed, epoch), num_samples)
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


PADDING = -1


class LanePlace(NamedTuple):
    """The place of a lane in a stream: an entry of the endless list of shards, and how many of its samples are used."""

    entry: int
    used: int = 0


@dataclass(frozen=True, eq=False)
class BatchSlice:
    """One rank's micro batch of one global batch.

    `sample_ids` is int64 [b]; PADDING (-1) fills up the last batch of an evaluation. `batch` counts global
    batches within the epoch.

    A slice of a stream has PADDING for all ids. lane: the lane that it is read from, one of the `lanes` of all ranks;
    see `karat_scale.data.streams`. place: the place to start reading at; None to continue.
    """

    epoch: int
    batch: int
    sample_ids: npt.NDArray[np.int64]
    lane: int = 0
    lanes: int = 1
    place: LanePlace | None = None

    @property
    def ids(self) -> list[int]:
        """The ids without padding."""
        ids: list[int] = self.sample_ids[self.sample_ids != PADDING].tolist()
        return ids


def choose_micro_batch(global_batch: int, world_size: int, wanted: int | None, even: bool) -> int:
    """Return the micro batch of every rank: `wanted` limited to the rank's part, or the whole part.

    `even` requires even micro batches, because mixup and cutmix mix neighbours. Raises RecipeError if the
    global batch cannot be divided in this way.
    """
    part, rest = divmod(global_batch, world_size)
    unit = 2 * world_size if even else world_size
    if rest or part < 1 or (even and part % 2):
        pairs = " in even parts, as mixup and cutmix need" if even else ""
        raise RecipeError(
            f"train.global_batch = {global_batch} does not divide over {world_size} ranks{pairs}; "
            f"use another number of ranks, or train.global_batch={max(1, math.ceil(global_batch / unit)) * unit}"
        )
    micro = part if wanted is None else min(wanted, part)
    if micro < 1 or part % micro or (even and micro % 2):
        fits = [m for m in range(1, part + 1) if part % m == 0 and not (even and m % 2)]
        best = max((m for m in fits if m <= micro), default=fits[0])
        raise RecipeError(
            f"train.micro_batch = {micro} does not divide each rank's {part} samples of a global batch"
            f"{' into even parts' if even else ''}; set train.micro_batch={best}"
        )
    return micro


def micro_batch_of(recipe: RunRecipe, world_size: int) -> int:
    """Return the micro batch of a recipe on `world_size` ranks. Raises RecipeError like `choose_micro_batch`."""
    train, mixes = recipe.train, isinstance(recipe, Recipe) and recipe.augment.mixes
    return choose_micro_batch(train.global_batch, world_size, train.micro_batch, even=mixes)


def possible_micro_batch(recipe: RunRecipe, world_size: int) -> int | None:
    """Return what `micro_batch_of` returns, or None if there is no such micro batch."""
    try:
        return micro_batch_of(recipe, world_size)
    except RecipeError:
        return None


def check_one_batch(num_samples: int, global_batch: int) -> None:
    """Raise DataError if the training split is smaller than one global batch."""
    if num_samples == 0:
        raise DataError("the training split has no samples; correct data.path or data.train_split")
    if num_samples < global_batch:
        raise DataError(
            f"an epoch has {plural(num_samples, 'sample')}, fewer than train.global_batch = {global_batch}; "
            f"set train.global_batch to at most {num_samples}"
        )


def total_steps(steps_per_epoch: int, epochs: int, max_steps: int | None) -> int:
    """Return the number of global batches of a whole run: those of its epochs, or `max_steps` if that is fewer."""
    planned = epochs * steps_per_epoch
    return min(planned, max_steps or planned)


@dataclass(frozen=True)
class TrainPlan:
    """The training batches of one rank. The last incomplete global batch of an epoch is dropped.

    Global batch t of an epoch is the same set in the same order for every world size; rank k takes its k-th
    contiguous part, in contiguous micro batches. Raises DataError when an epoch has no whole batch and
    RecipeError when the global batch does not divide.

    lanes: for a stream, the number of lanes of each rank, which supply its micro batches in turn; 0 if samples have
    ids.
    """

    seed: int
    num_samples: int
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int
    order: str = "full"
    block_samples: int = BLOCK_SAMPLES
    window_blocks: int = WINDOW_BLOCKS
    lanes: int = 0

    def __post_init__(self) -> None:
        choose_micro_batch(self.global_batch, self.world_size, self.micro_batch, even=False)
        check_one_batch(self.num_samples, self.global_batch)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch

    @property
    def accumulation(self) -> int:
        """Micro batches per step on each rank."""
        return self.global_batch // self.world_size // self.micro_batch

    def slices(self, start_step: int, stop_step: int) -> Iterator[BatchSlice]:
        """Yield the micro batches of steps start_step .. stop_step - 1, counted from the start of training."""
        if self.lanes:
            ids = np.full(self.micro_batch, PADDING, dtype=np.int64)
            for number in range(start_step * self.accumulation, stop_step * self.accumulation):
                epoch, batch = divmod(number // self.accumulation, self.steps_per_epoch)
                lane = self.rank * self.lanes + number % self.lanes
                yield BatchSlice(epoch, batch, ids, lane, self.lanes * self.world_size)
            return
        order_epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(start_step, stop_step):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self.epoch_order(epoch), epoch
            yield from self.cut(order, epoch, batch)

    def epoch_order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the samples of an epoch, int64 [num_samples], the same on every rank."""
        return epoch_order(self.seed, epoch, self.num_samples, self.order, self.block_samples, self.window_blocks)

    def cut(self, order: npt.NDArray[np.int64], epoch: int, batch: int) -> Iterator[BatchSlice]:
        """Yield this rank's micro batches of one global batch, given the epoch's order."""
        part = self.accumulation * self.micro_batch
        first = batch * self.global_batch + self.rank * part
        for start in range(first, first + part, self.micro_batch):
            yield BatchSlice(epoch, batch, order[start : start + self.micro_batch].copy())


@dataclass(frozen=True)
class EvalPlan:
    """The evaluation batches of one rank: every sample once over all ranks, and the same number of batches on each.

    most: the most samples of a batch; a batch is never larger than the rank's share.
    """

    num_samples: int
    most: int
    rank: int
    world_size: int

    @property
    def _per_rank(self) -> int:
        return math.ceil(self.num_samples / self.world_size)

    @property
    def _batch(self) -> int:
        return min(self.most, self._per_rank)

    @property
    def num_batches(self) -> int:
        return math.ceil(self._per_rank / self.most)

    def slices(self) -> Iterator[BatchSlice]:
        """Yield all batches of this rank, in the order of the split, padded with PADDING to the same size."""
        first = self.rank * self._per_rank
        last = min(first + self._per_rank, self.num_samples)
        for number in range(self.num_batches):
            start = first + number * self._batch
            ids = np.full(self._batch, PADDING, dtype=np.int64)
            count = max(0, min(self._batch, last - start))
            ids[:count] = np.arange(start, start + count)
            yield BatchSlice(0, number, ids)
