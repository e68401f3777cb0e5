"""The backends whose batches are made by data workers, from folders, indexed shards and betons; generated images.

Samples are read by their place, since a reader that streams (webdataset's own, FFCV's Loader) keeps no exact order.

The `synthetic` backend generates images from their sample id, without files. It is for tests, and to measure everything
except the data. Each class has its own coarse pattern under noise, so a model can learn the classes. The recipe's
augmentation does not apply.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.data.batch import Batch
from karat_scale.data.decoders import Decoder, make_decoder
from karat_scale.data.decoders.libraries import FfcvDecoder
from karat_scale.data.loading.assemble import Assembler, ImageAssembler, ImageSpec, OrderedLoader
from karat_scale.data.loading.workers import FetchedAhead
from karat_scale.data.plan import PADDING, BatchSlice, TrainPlan, sample_seed
from karat_scale.data.shards.beton import BetonSplit
from karat_scale.data.shards.remote import RemoteUse
from karat_scale.data.shards.shard_files import ImageSource
from karat_scale.data.shards.shards import FolderSplit, ShardSplit, class_folders
from karat_scale.foundation.console import few
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.tables import Files

B = TypeVar("B")


class Backend:
    """A source of whole batches, since some libraries decode and augment by batch.

    Batches come in the order of the slices, and depend only on slice, recipe and seed.

    Attributes:
        num_train, num_val: the number of training and of evaluation samples.
        classes: the names of the classes in the order of the labels; the model may have more.
        notices: lines on what the data lacks, and on files that are left out.
    """

    notices: Sequence[str] = ()

    def __init__(self, spec: ImageSpec, num_train: int, num_val: int, classes: tuple[str, ...]) -> None:
        self.spec, self.num_train, self.num_val, self.classes = spec, num_train, num_val, classes
        self._handed_out: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def num_classes(self) -> int:
        """Number of classes in the data."""
        return len(self.classes)

    @property
    def identity(self) -> object:
        """The training samples' identity as plain data, equal for copies; by default their number and classes."""
        return [self.num_train, *self.classes]

    def plan(
        self, global_batch: int, micro_batch: int, rank: int, world_size: int, lanes: int | None = None
    ) -> TrainPlan:
        """Return the plan of the training batches of one of `world_size` ranks. Raises DataError and RecipeError.

        lanes: for a stream, the number of lanes of each rank; by default the recipe's.
        """
        data = self.spec.data
        order = data.order, data.block_samples, data.window_blocks, data.lanes if lanes is None else lanes
        return TrainPlan(self.spec.seed, self.num_train, global_batch, micro_batch, rank, world_size, *order)

    def train_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        """Return augmented batches. Loading starts at once and runs ahead of the reader."""
        raise NotImplementedError

    def eval_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        """Return centre-cropped batches. Ids of PADDING give zeros with valid = False."""
        raise NotImplementedError

    def _handing_out(self, batches: B) -> B:
        """Remember batches that `close` must stop."""
        self._handed_out.add(batches)
        return batches

    def close(self) -> None:
        """Stop workers and close files. Iterators handed out before yield no more."""
        for batches in list(self._handed_out):
            batches.close()


class SplitBackend(Backend):
    """Batches of a training and a validation source. See Backend."""

    def __init__(self, train: ImageSource, val: ImageSource, spec: ImageSpec) -> None:
        super().__init__(spec, len(train), len(val), train.classes)
        self._train, self._val, self._data = train, val, spec.data
        notices = [found for found in dict.fromkeys((train.notice, val.notice)) if found]
        trained, tested = (np.bincount(split.labels, minlength=self.num_classes) for split in (train, val))
        if spec.data.is_stream:  # the classes of its samples are not known
            trained = np.ones_like(tested)
        empty = [name for name, images in zip(train.classes, trained, strict=False) if not images]
        untested = [
            name for name, images, seen in zip(train.classes, tested, trained, strict=False) if seen and not images
        ]
        if empty and spec.trains:
            notices.append(f"{len(empty)} of {self.num_classes} classes without training images: {few(empty)}")
        if untested:
            missing = f"{len(untested)} of {self.num_classes} classes without validation images: {few(untested)}"
            notices.append(f"{missing}; top-1 is over the others")
        if spec.data.verify == "hash" and spec.data.row.files is Files.IMAGES:
            notices.append("data.verify=hash has no effect: no hashes of image files are known")
        self.notices = notices

    @property
    def identity(self) -> object:
        return self._train.identity

    def _fetched_ahead(self, source: ImageSource, slices: Iterable[BatchSlice]) -> Iterable[BatchSlice]:
        """Return the slices; if their samples are at a URL, a process fetches them ahead."""
        return self._handing_out(FetchedAhead(source, slices, source.ahead)) if source.ahead else slices

    def close(self) -> None:
        super().close()
        self._train.close()
        self._val.close()


class ImageBackend(SplitBackend):
    """Two sources of encoded images, one for each split. See Backend.

    decoder: the decoder to use instead of the one in `data.decoder`.
    """

    def __init__(self, train: ImageSource, val: ImageSource, spec: ImageSpec, decoder: Decoder | None = None) -> None:
        super().__init__(train, val, spec)
        decoder = decoder or make_decoder(spec.data, spec.augment.interpolation)
        self._make_train = ImageAssembler(train, spec, decoder, training=True)
        self._make_val = ImageAssembler(val, spec, decoder, training=False)

    def train_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        return self._load(self._make_train, self._fetched_ahead(self._train, slices))

    def locate(self, sample_id: int) -> tuple[str, str]:
        """Return the key of a training sample, and the name of the file or folder that holds it."""
        return self._train.locate(sample_id)

    def eval_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        return self._load(self._make_val, self._fetched_ahead(self._val, slices))

    def _load(self, make: Assembler, slices: Iterable[BatchSlice]) -> OrderedLoader:
        loader = OrderedLoader(make, slices, self._data.workers, self._data.prefetch, self._data.timeout)
        return self._handing_out(loader)


def open_folder(spec: ImageSpec) -> ImageBackend:
    """Open an ImageFolder, train/<class>/<image> and val/<class>/<image>. Raises DataError if it is not right."""
    data = spec.data
    if not spec.trains:
        # Without them, a class that this split lacks would change the numbers of the others.
        folder = Path(data.path).expanduser() / data.train_split
        there = folder.is_dir() or "train_split" in data.model_fields_set
        classes = tuple(class_folders(folder)) if there else None
        val = FolderSplit(data.path, data.val_split, spec.num_classes, classes)
        return ImageBackend(val, val, spec)
    train = FolderSplit(data.path, data.train_split, spec.num_classes)
    if data.val_split == data.train_split:
        return ImageBackend(train, train, spec)
    return ImageBackend(train, FolderSplit(data.path, data.val_split, spec.num_classes, train.classes), spec)


def open_shards(spec: ImageSpec) -> tuple[ShardSplit, ShardSplit]:
    """Open the training and the validation split of shards. Raises DataError if they are not right."""
    data = spec.data
    common = spec.num_classes, data.verify
    of_train, of_val = (RemoteUse.of(data, training, spec.ranks) for training in (True, False))
    if not spec.trains:
        val = ShardSplit(data.path, data.val_split, *common, remote=of_val)
        return val, val
    train = ShardSplit(data.path, data.train_split, *common, spec.readahead, of_train)
    if data.val_split == data.train_split:
        return train, train
    return train, ShardSplit(data.path, data.val_split, *common, remote=of_val)


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
    train_split = data.train_split if spec.trains else data.val_split
    train = BetonSplit(data.path, train_split, spec.num_classes, data.verify, spec.readahead, lends)
    same = data.val_split == train_split
    val = train if same else BetonSplit(data.path, data.val_split, spec.num_classes, data.verify, lends=lends)
    if train.classes != val.classes:
        raise DataError(f"{train.path} and {val.path} have different classes; make both from one source")
    return ImageBackend(train, val, spec, decoder)


PATTERN_CELLS = 4
NOISE_STARTS = 1 << 20
TRAIN_STREAM, VAL_STREAM = 0, 1


class SyntheticBackend(Backend):
    """The `synthetic` backend; see Backend. Sample i has label i mod classes, in both splits."""

    def __init__(self, spec: ImageSpec) -> None:
        samples, image_size = spec.data.synthetic_samples, spec.image_size
        super().__init__(spec, samples, samples, tuple(f"class {label}" for label in range(spec.num_classes)))
        self._pixels = 3 * image_size * image_size
        # An image's noise is a window of one fixed stretch of noise: a copy is much cheaper than new noise.
        self._noise = self._draw(key=0, count=NOISE_STARTS + self._pixels) >> 1
        self._cell = np.minimum(np.arange(image_size) * PATTERN_CELLS // image_size, PATTERN_CELLS - 1)

    @staticmethod
    def _draw(key: int, count: int) -> npt.NDArray[np.uint8]:
        raw = np.random.Philox(key=key).random_raw(-(-count // 8))
        return raw.astype("<u8", copy=False).view(np.uint8)[:count]

    @property
    def identity(self) -> str:
        return f"{self.num_train} synthetic images of {self.num_classes} classes, seed {self.spec.seed}"

    def train_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        return (self._batch(part, TRAIN_STREAM) for part in slices)

    def eval_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        return (self._batch(part, VAL_STREAM) for part in slices)

    def _batch(self, part: BatchSlice, stream: int) -> Batch:
        valid = part.sample_ids != PADDING
        labels = np.where(valid, part.sample_ids % self.num_classes, 0)
        shape = len(valid), 3, self.spec.image_size, self.spec.image_size
        images = torch.zeros(shape, dtype=torch.uint8, device="cpu")
        pixels = images.numpy()
        for row in np.flatnonzero(valid):
            pixels[row] = self._image(int(part.sample_ids[row]), int(labels[row]), stream)
        return Batch.of(part, images, labels, valid)

    def _image(self, sample_id: int, label: int, stream: int) -> npt.NDArray[np.uint8]:
        start = sample_seed(self.spec.seed, stream, sample_id) % NOISE_STARTS
        noise = self._noise[start : start + self._pixels].reshape(3, self.spec.image_size, self.spec.image_size)
        cells = self._draw(key=1 + label, count=3 * PATTERN_CELLS**2) >> 1
        pattern = cells.reshape(3, PATTERN_CELLS, PATTERN_CELLS)[:, self._cell[:, None], self._cell]
        return noise + pattern
