"""Batches of encoded images from files: folders, indexed WebDataset shards, and FFCV's betons.

Samples are read by their place, since a reader that streams (webdataset's own, FFCV's Loader) keeps no exact order.
Images are decoded and augmented by torch's DataLoader workers.
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from karat_scale.data.batch import Batch
from karat_scale.data.decoders import Decoder, make_decoder
from karat_scale.data.decoders.ffcv import FfcvDecoder
from karat_scale.data.loading.assemble import EvalAssembler, ImageSource, TrainAssembler
from karat_scale.data.loading.base import ImageSpec
from karat_scale.data.loading.fetcher import FetchedAhead
from karat_scale.data.loading.loader import MakesBatches, OrderedLoader
from karat_scale.data.plan import BatchSlice
from karat_scale.data.shards.beton import BetonSplit
from karat_scale.data.shards.folder import FolderSplit
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.data.shards.use import RemoteUse
from karat_scale.foundation.errors import DataError


class Closable(Protocol):
    """Batches that are made ahead, by a thread or process that must be stopped."""

    def close(self) -> None:
        """Stop making batches."""


Batches = TypeVar("Batches", bound=Closable)


class SplitBackend:
    """The counts and names of a training and a validation source, and closing of all batches. See Backend."""

    def __init__(self, train: ImageSource, val: ImageSource) -> None:
        self._train, self._val = train, val
        self._handed_out: weakref.WeakSet[Closable] = weakref.WeakSet()

    @property
    def num_train(self) -> int:
        return len(self._train)

    @property
    def num_val(self) -> int:
        return len(self._val)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._train.classes

    def _handing_out(self, batches: Batches) -> Batches:
        """Remember batches that `close` must stop."""
        self._handed_out.add(batches)
        return batches

    def _fetched_ahead(self, source: ImageSource, slices: Iterable[BatchSlice]) -> Iterable[BatchSlice]:
        """Return the slices; if their samples are at a URL, a process fetches them ahead."""
        if isinstance(source, ShardSplit) and source.ahead:
            return self._handing_out(FetchedAhead(source, slices, source.ahead))
        return slices

    def close(self) -> None:
        for batches in list(self._handed_out):
            batches.close()
        self._train.close()
        self._val.close()


class ImageBackend(SplitBackend):
    """Two sources of encoded images, one for each split. See Backend.

    decoder: instead of the one in `data.decoder`.
    """

    def __init__(self, train: ImageSource, val: ImageSource, spec: ImageSpec, decoder: Decoder | None = None) -> None:
        super().__init__(train, val)
        self._data = spec.data
        decoder = decoder or make_decoder(spec.data, spec.augment.interpolation)
        self._make_train, self._make_val = TrainAssembler(train, spec, decoder), EvalAssembler(val, spec, decoder)

    def train_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        return self._load(self._make_train, self._fetched_ahead(self._train, slices))

    def locate(self, sample_id: int) -> tuple[str, str]:
        """Return the key of a training sample, and the name of the file or folder that holds it."""
        return self._train.locate(sample_id)

    def eval_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        return self._load(self._make_val, self._fetched_ahead(self._val, slices))

    def _load(self, make: MakesBatches, slices: Iterable[BatchSlice]) -> OrderedLoader:
        loader = OrderedLoader(make, slices, self._data.workers, self._data.prefetch, self._data.timeout)
        return self._handing_out(loader)


def open_folder(spec: ImageSpec) -> ImageBackend:
    """Open an ImageFolder, train/<class>/<image> and val/<class>/<image>. Raises DataError if it is not right."""
    data = spec.data
    train = FolderSplit(data.path, data.train_split, spec.num_classes)
    return ImageBackend(train, FolderSplit(data.path, data.val_split, spec.num_classes, train.classes), spec)


def open_shards(spec: ImageSpec) -> tuple[ShardSplit, ShardSplit]:
    """Open the training and the validation split of shards. Raises DataError if they are not right."""
    data = spec.data
    common = spec.num_classes, data.verify
    train = ShardSplit(data.path, data.train_split, *common, spec.readahead, RemoteUse.of(data, training=True))
    return train, ShardSplit(data.path, data.val_split, *common, remote=RemoteUse.of(data, training=False))


def open_webdataset(spec: ImageSpec) -> ImageBackend:
    """Open indexed WebDataset shards. Raises DataError if they are not right."""
    return ImageBackend(*open_shards(spec), spec)


def open_ffcv(spec: ImageSpec) -> ImageBackend:
    """Open betons.

    `data.decoder = auto` uses FFCV's decoder. If the recipe names another decoder, FFCV need not be installed. Raises
    DataError if the betons are not right, and RecipeError if FFCV is not installed.
    """
    data = spec.data
    decoder = FfcvDecoder(spec.augment.interpolation, data.max_pixels) if data.decoder == "auto" else None
    lends = decoder is not None
    train = BetonSplit(data.path, data.train_split, spec.num_classes, data.verify, spec.readahead, lends)
    val = BetonSplit(data.path, data.val_split, spec.num_classes, data.verify, lends=lends)
    if train.classes != val.classes:
        raise DataError(f"{train.path} and {val.path} have different classes; make both from one source")
    return ImageBackend(train, val, spec, decoder)
