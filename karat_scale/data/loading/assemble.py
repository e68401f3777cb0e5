"""The interface of all backends, and how a batch is made from its ids: read, decoded, transformed, from any source."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.data.augmentation.augment import EvalTransform, TrainTransform
from karat_scale.data.batch import BadSample, Batch, Draw, Streamed
from karat_scale.data.decoders import Decoder
from karat_scale.data.decoders.decode import UndecodableImageError, View, read_chosen
from karat_scale.data.loading.workers import Whereabouts
from karat_scale.data.order import sample_seed
from karat_scale.data.plan import PADDING, BatchSlice
from karat_scale.data.shards.shard_files import NO_BLOCKS, Blocks
from karat_scale.foundation.errors import DataError
from karat_scale.recipe import AugmentConfig, DataConfig, Recipe


@dataclass(frozen=True)
class ImageSpec:
    """The images that a run asks a backend for: square, `image_size` pixels wide, of at most `num_classes` classes."""

    data: DataConfig
    augment: AugmentConfig
    image_size: int
    num_classes: int
    seed: int

    @classmethod
    def of(cls, recipe: Recipe) -> "ImageSpec":
        """Return what a recipe asks for."""
        return cls(recipe.data, recipe.augment, recipe.model.image_size, recipe.model.num_classes, recipe.run.seed)

    @property
    def readahead(self) -> Blocks:
        """The blocks that are read at once, for `order: block`."""
        return Blocks(self.data.block_samples, self.data.window_blocks) if self.data.order == "block" else NO_BLOCKS


class Backend(Protocol):
    """A source of whole batches. The interface is per batch, since FFCV and DALI decode and augment by batch.

    Batches come in the order of the slices, and depend only on slice, recipe and seed.
    """

    @property
    def num_train(self) -> int:
        """Number of training samples."""

    @property
    def num_val(self) -> int:
        """Number of evaluation samples."""

    @property
    def num_classes(self) -> int:
        """Number of classes in the data; the model may have more."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""

    @property
    def identity(self) -> object:
        """What the training samples are, as plain data; of copies it is equal."""

    def train_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        """Return augmented batches. Loading starts at once and runs ahead of the reader."""

    def eval_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        """Return centre-cropped batches. Ids of PADDING give zeros with valid = False."""

    def close(self) -> None:
        """Stop workers and close files. Iterators handed out before yield no more."""


MAX_REPLACEMENTS = 100
Pixels = npt.NDArray[np.uint8]


class ImageSource(Protocol):
    """Encoded images by sample id."""

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """The label of each sample."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""

    @property
    def identity(self) -> object:
        """What the samples are, as plain data; of copies it is equal."""

    def __len__(self) -> int: ...

    def read(self, sample_id: int) -> bytes:
        """Return the image's bytes. Raises DataError if they have changed."""

    def locate(self, sample_id: int) -> tuple[str, str]:
        """Return the sample's key (or path) and its shard, for messages."""

    def file_of(self, sample_id: int) -> str:
        """Return the path of the file that holds the sample, without reading the disk."""

    def close(self) -> None:
        """Close open files."""


@runtime_checkable
class PreparesSamples(Protocol):
    """A source that fetches the samples of a batch together."""

    def prepare(self, sample_ids: Iterable[int]) -> None:
        """Fetch what these samples need. Raises DataError."""


def prepare(source: ImageSource, part: BatchSlice) -> None:
    """Let a source fetch the samples of a slice together, if it can. Raises DataError."""
    if isinstance(source, PreparesSamples):
        source.prepare(part.sample_ids[part.sample_ids != PADDING].tolist())


class Sample(NamedTuple):
    """A sample that may fill a row of a batch. epoch: whose seed its augmentation is drawn from."""

    id: int
    label: int
    epoch: int
    read: Callable[[], bytes]
    locate: Callable[[], tuple[str, str]]


class Assembler(ABC):
    """Makes a Batch from a BatchSlice: samples are drawn for, decoded, viewed, and finished.

    If the recipe says skip, the next candidate replaces a training sample that cannot be used. It is augmented by its
    own seed, so it looks as it does at its own place. In an evaluation, padding and unreadable samples are zeros with
    valid = False.
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
        return self.fill(part, torch.empty(self.shape(part), dtype=torch.uint8))

    @abstractmethod
    def _candidates(self, part: BatchSlice) -> Iterator[Iterator[Sample]]:
        """For each row the samples that may fill it, the best first; none for padding. Raises DataError."""

    @abstractmethod
    def whereabouts(self, workers: int) -> str:
        """Return where each worker was last, for the message of a loader that gets no batch."""

    def _streamed(self, part: BatchSlice) -> Streamed | None:
        """Return what the batch that was just filled says of its stream."""
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
                            f"{bad[-1]}; remove it from the data set, or skip such images: add data.on_bad_sample=skip "
                            "'resume.allow=[data.on_bad_sample]'"
                        ) from error
                    continue
                pixels[row], valid[row] = self.transform.finish(view, draw), True
                if draw is not None:
                    draws.append(draw)
                break
            if not valid[row] and self._training:
                raise DataError(f"{bad[-1]}, nor can any that may replace it be used; put the data set right")
        pixels[~valid] = 0
        return Batch.of(part, images, labels, valid, ids, tuple(bad), tuple(draws), self._streamed(part))

    def choose(self, epoch: int, sample_id: int, width: int, height: int) -> tuple[View, Draw | None]:
        """What is looked at of a sample of these dimensions in pixels, and what was drawn."""
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
        prepare(self._source, part)
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
