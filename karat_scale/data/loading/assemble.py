"""Make batches from sample ids: read, decode and transform images of any source, here or in worker processes.

Forked workers leave the images of their batches in shared memory that is reused. torch would give each tensor a new
file in /dev/shm, whose pages must be mapped again in both processes. For an image of 224 px that costs 0.2 ms, up to a
fifth of its decoding, and containers often have a small /dev/shm.
"""

import itertools
import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.data.augmentation.augment import EvalTransform, TrainTransform
from karat_scale.data.batch import BadSample, Batch, Draw, Streamed, with_digest
from karat_scale.data.decoders import Decoder
from karat_scale.data.decoders.decode import UndecodableImageError, View, read_chosen
from karat_scale.data.loading.workers import OrderedResults, Whereabouts, worker_number
from karat_scale.data.plan import PADDING, BatchSlice, sample_seed
from karat_scale.data.shards.shard_files import NO_BLOCKS, Blocks, ImageSource
from karat_scale.foundation.errors import DataError
from karat_scale.recipe import AugmentConfig, DataConfig, Recipe


@dataclass(frozen=True)
class ImageSpec:
    """The images that a run asks a backend for: square, `image_size` pixels wide, of at most `num_classes` classes.

    trains: whether the run trains. If not, the training split is not read, and the evaluation's takes its place.
    device: where the batches go; None for the device that this process uses. ranks: the number of ranks that share the
    batches; None for the launcher's.
    """

    data: DataConfig
    augment: AugmentConfig
    image_size: int
    num_classes: int
    seed: int
    trains: bool = True
    device: torch.device | None = None
    ranks: int | None = None

    @classmethod
    def of(cls, recipe: Recipe, trains: bool = True) -> "ImageSpec":
        """Return the spec of a recipe's images."""
        size, classes = recipe.model.image_size, recipe.model.num_classes
        return cls(recipe.data, recipe.augment, size, classes, recipe.run.seed, trains)

    @property
    def readahead(self) -> Blocks:
        """The blocks that are read at once, for `order: block`."""
        return Blocks(self.data.block_samples, self.data.window_blocks) if self.data.order == "block" else NO_BLOCKS


MAX_REPLACEMENTS = 100
Pixels = npt.NDArray[np.uint8]


class Sample(NamedTuple):
    """A sample that may fill a row of a batch. epoch: the epoch whose seed its augmentation is drawn from."""

    id: int
    label: int
    epoch: int
    read: Callable[[], bytes]
    locate: Callable[[], tuple[str, str]]


class Assembler(ABC):
    """Makes a Batch from a BatchSlice: draws each sample's augmentation, decodes its view, and finishes it.

    If `on_bad_sample` is skip, the next candidate replaces a training sample that cannot be used. It is augmented with
    its own seed, so it looks the same as at its own place. In an evaluation, padding and unreadable samples are zeros
    with valid = False.
    """

    def __init__(self, spec: ImageSpec, decoder: Decoder, training: bool) -> None:
        transform = TrainTransform if training else EvalTransform
        self.transform: TrainTransform | EvalTransform = transform(spec.augment, spec.image_size)
        self._seed, self._image_size, self._training = spec.seed, spec.image_size, training
        self._stop = spec.data.on_bad_sample == "stop"
        self._decoder = decoder
        self._whereabouts = Whereabouts()

    def shape(self, part: BatchSlice) -> tuple[int, ...]:
        """Return the shape of the slice's images."""
        return len(part.sample_ids), 3, self._image_size, self._image_size

    def __getitem__(self, part: BatchSlice) -> Batch:
        return self.fill(part, torch.empty(self.shape(part), dtype=torch.uint8, device="cpu"))

    @abstractmethod
    def _candidates(self, part: BatchSlice) -> Iterator[Iterator[Sample]]:
        """Return for each row the samples that may fill it, the best first; none for padding. Raises DataError."""

    @abstractmethod
    def whereabouts(self, workers: int) -> str:
        """Return where each worker was last, for the message of a loader that gets no batch."""

    def _streamed(self, part: BatchSlice) -> Streamed | None:
        """Return the position in the stream of the batch that was just filled; None without a stream."""
        return None

    def fill(self, part: BatchSlice, images: torch.Tensor) -> Batch:
        """Return the batch; its pixels are written to `images`. Raises DataError."""
        pixels, ids = images.numpy(), part.sample_ids.copy()
        labels, valid = np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=bool)
        bad: list[BadSample] = []
        draws: list[Draw] = []
        for row, candidates in enumerate(self._candidates(part)):
            for sample in candidates:
                ids[row], labels[row] = sample.id, sample.label
                try:
                    choose = partial(self.choose, sample.epoch, sample.id)
                    view, _, draw = read_chosen(self._decoder, sample.read(), choose)
                except UndecodableImageError as error:
                    bad.append(BadSample(sample.id, *sample.locate(), str(error), error.done))
                    if self._stop:
                        raise DataError(
                            f"{bad[-1]}; remove it from the data set, or skip such images: add data.on_bad_sample=skip"
                        ) from error
                    continue
                pixels[row], valid[row] = self.transform.finish(view, draw), True
                if draw is not None:
                    draws.append(draw)
                break
            if not valid[row] and self._training:
                raise DataError(
                    f"{bad[-1]}, and no other image can replace it; look for bad images with karat data DIR"
                )
        pixels[~valid] = 0
        more = {"bad": tuple(bad), "draws": tuple(draws), "streamed": self._streamed(part)}
        return Batch.of(replace(part, sample_ids=ids), images, labels, valid, **more)

    def choose(self, epoch: int, sample_id: int, width: int, height: int) -> tuple[View, Draw | None]:
        """Return the view of a sample of these dimensions in pixels, and what was drawn."""
        return self.transform.choose(sample_seed(self._seed, epoch, sample_id), width, height)


class ImageAssembler(Assembler):
    """Makes batches of samples that have ids. A sample that cannot be used is replaced by the ids that follow it."""

    def __init__(self, source: ImageSource, spec: ImageSpec, decoder: Decoder, training: bool) -> None:
        super().__init__(spec, decoder, training)
        self._source = source
        self._tries = min(MAX_REPLACEMENTS, len(source)) if training else 1

    def _candidates(self, part: BatchSlice) -> Iterator[Iterator[Sample]]:
        ids = part.sample_ids.tolist()
        if ids and ids[0] != PADDING:
            self._whereabouts.tell(ids[0])
        self._source.prepare(part.ids)
        return (self._from(sample_id, part.epoch) for sample_id in ids)

    def _from(self, first: int, epoch: int) -> Iterator[Sample]:
        source = self._source
        for number in range(first, first + self._tries) if first != PADDING else ():
            used = number % len(source)
            self._whereabouts.tell(used)
            yield Sample(
                used, int(source.labels[used]), epoch, partial(source.read, used), partial(source.locate, used)
            )

    def whereabouts(self, workers: int) -> str:
        return self._whereabouts.told(workers, lambda i: f"at sample {i} in {self._source.file_of(i)}")


Shape = tuple[int, ...]
Packed = tuple[int, Shape, Batch]


class ImageSlots:
    """Memory for `count` batches of images, uint8 of `shape`, for each worker. Create it before the workers are forked.

    A worker fills its slots in turn. The images are copied when a batch is received, so a worker may be up to
    `count` batches ahead. Raises DataError if there is not enough memory.
    """

    def __init__(self, workers: int, count: int, shape: Shape) -> None:
        self._count, self._room = count, math.prod(shape)
        size = workers * count * self._room
        try:
            memory = mmap.mmap(-1, max(1, size))
        except (OSError, OverflowError) as error:
            raise DataError(
                f"no {size / 2**30:.1f} GiB of memory for prefetched batches; lower data.prefetch or data.workers"
            ) from error
        self._slots = torch.frombuffer(memory, dtype=torch.uint8)
        self._filled = 0

    def next(self, shape: Shape) -> torch.Tensor:
        """Return the calling worker's next slot. Raises ValueError for more images than fit."""
        worker = worker_number()
        assert worker is not None
        if math.prod(shape) > self._room:
            raise ValueError("a loader's first batch must be its largest")
        slot = worker * self._count + self._filled % self._count
        self._filled += 1
        return self._at(slot * self._room, shape)

    def pack(self, batch: Batch) -> Packed:
        """Return a batch, whose images are in a slot, in a form that is small when it is pickled."""
        images = batch.images
        return int(images.storage_offset()), tuple(images.shape), replace(batch, images=torch.empty(0, device="cpu"))

    def unpack(self, packed: Packed) -> Batch:
        """Return the batch with a copy of its images, page-locked if this process uses a GPU."""
        offset, shape, batch = packed
        images = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=torch.cuda.is_initialized())
        return replace(batch, images=images.copy_(self._at(offset, shape)))

    def _at(self, offset: int, shape: Shape) -> torch.Tensor:
        return self._slots[offset : offset + math.prod(shape)].view(shape)


class OrderedLoader(OrderedResults[Batch]):
    """Iterates over the batches of `slices`, none of which is larger than the first. See OrderedResults."""

    def __init__(
        self, make: Assembler, slices: Iterable[BatchSlice], workers: int, prefetch: int, timeout: float
    ) -> None:
        self._given = slices  # kept until the last batch: a process may fetch ahead for them
        parts = iter(slices)
        first = list(itertools.islice(parts, 1))
        self._slots = ImageSlots(workers, prefetch, make.shape(first[0])) if workers and first else None
        work = partial(_fill, make, self._slots)
        super().__init__(work, itertools.chain(first, parts), workers, prefetch, timeout, make.whereabouts)

    def _received(self, answer: Any) -> Batch:
        assert self._slots is not None
        return self._slots.unpack(answer)

    def close(self) -> None:
        """Stop the workers, and the process that fetches ahead."""
        super().close()
        self._given = ()


def _fill(make: Assembler, slots: ImageSlots | None, part: BatchSlice) -> Batch | Packed:
    if slots is None:
        return with_digest(make[part])
    return slots.pack(with_digest(make.fill(part, slots.next(make.shape(part)))))
