"""The backends of images in files: folders, indexed WebDataset shards, and FFCV's betons.

Samples are read by their place, since a reader that streams (webdataset's own, FFCV's Loader) keeps no exact order.

`ImageBackend` decodes and augments in data workers. `BatchDecodingBackend` is for a library that
decodes images together, such as DALI or nvJPEG. Such a library gets our bytes, our order and our crops. It decodes; the
rest is the code of the other backends. On a GPU where only a flip follows the crop, the library also resizes and
flips, and the batches are on the GPU.
"""

import copy
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.data.backends.row_reader import Row, RowReader
from karat_scale.data.batch import Batch
from karat_scale.data.decoders import Decoder, make_decoder
from karat_scale.data.decoders.decode import View, blank_jpeg
from karat_scale.data.decoders.ffcv import FfcvDecoder
from karat_scale.data.decoders.pillow import TorchvisionDecoder, resize_region
from karat_scale.data.loading.assemble import Assembler, ImageAssembler, ImageSource, ImageSpec
from karat_scale.data.loading.device_feed import RunAhead
from karat_scale.data.loading.loader import OrderedLoader
from karat_scale.data.loading.workers import FetchedAhead
from karat_scale.data.plan import PADDING, BatchSlice
from karat_scale.data.shards.beton import BetonSplit
from karat_scale.data.shards.cache import RemoteUse
from karat_scale.data.shards.folder import FolderSplit
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.foundation.errors import DataError

Batches = TypeVar("Batches", OrderedLoader, RunAhead, FetchedAhead)


class SplitBackend:
    """The counts and names of a training and a validation source, and closing of all batches. See Backend."""

    def __init__(self, train: ImageSource, val: ImageSource) -> None:
        self._train, self._val = train, val
        self._handed_out: weakref.WeakSet[OrderedLoader | RunAhead | FetchedAhead] = weakref.WeakSet()

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

    @property
    def identity(self) -> object:
        return self._train.identity

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
    train = FolderSplit(data.path, data.train_split, spec.num_classes)
    if data.val_split == data.train_split:
        return ImageBackend(train, train, spec)
    return ImageBackend(train, FolderSplit(data.path, data.val_split, spec.num_classes, train.classes), spec)


def open_shards(spec: ImageSpec) -> tuple[ShardSplit, ShardSplit]:
    """Open the training and the validation split of shards. Raises DataError if they are not right."""
    data = spec.data
    common = spec.num_classes, data.verify
    train = ShardSplit(data.path, data.train_split, *common, spec.readahead, RemoteUse.of(data, training=True))
    if data.val_split == data.train_split:
        return train, train
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
    same = data.val_split == data.train_split
    val = train if same else BetonSplit(data.path, data.val_split, spec.num_classes, data.verify, lends=lends)
    if train.classes != val.classes:
        raise DataError(f"{train.path} and {val.path} have different classes; make both from one source")
    return ImageBackend(train, val, spec, decoder)


Pixels = npt.NDArray[np.uint8]
# What the library is given in place of a row that it need not decode: every batch goes through it, to keep their order.
BLANK, BLANK_VIEW = np.frombuffer(blank_jpeg(8), dtype=np.uint8), View((0, 0, 1, 1), (0, 0, 1, 1), (1, 1))


@dataclass(frozen=True, eq=False)
class Request:
    """JPEGs and the view of each that is wanted, mirrored where `flips` says so."""

    data: list[npt.NDArray[np.uint8]]
    views: list[View]
    flips: list[bool]

    def __len__(self) -> int:
        return len(self.data)


class BatchDecoder(Protocol):
    """A library that decodes batches."""

    def decoded(self, requests: Iterable[Request]) -> Generator[torch.Tensor | list[Pixels] | None, None, None]:
        """Yield the result of each request, in order.

        The result is the finished views, uint8 [b, 3, size, size]; or the regions of the views, uint8 [h, w, 3] each,
        which may be overwritten when the next result is asked for; or None if one of the images cannot be decoded.

        Raises:
            DataError: the library does not start.
            RuntimeError: it fails for another reason than an image.
        """


class BatchDecodingBackend(SplitBackend):
    """See Backend. `data.workers` is the number of threads that read, and again of those that resize and augment.

    gpu: the number of the GPU that the process uses, or None. stream: what the library works on there. make_decoder:
    returns the library for batches of which only crop and flip are wanted (True), or for others.
    """

    def __init__(
        self,
        splits: tuple[ImageSource, ImageSource],
        spec: ImageSpec,
        make_decoder: Callable[[bool], BatchDecoder],
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        super().__init__(*splits)
        self._spec, self._data = spec, spec.data
        # Its pixels are those of the library and resize_region, so a batch is the same whichever makes it.
        self._decoder = TorchvisionDecoder(spec.augment.interpolation, spec.data.max_pixels)
        self._threads = max(1, spec.data.workers)
        self._make_decoder, self._stream = make_decoder, stream
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="karat-augment")

    def train_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        return self._run_ahead(slices, self._train, training=True)

    def eval_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        return self._run_ahead(slices, self._val, training=False)

    def _run_ahead(self, slices: Iterable[BatchSlice], split: ImageSource, training: bool) -> RunAhead:
        # A source of its own for each iterator, since each has a thread.
        source = copy.copy(split)
        make = ImageAssembler(source, self._spec, self._decoder, training)
        reader = RowReader(source, self._decoder, make.choose, self._data.max_pixels, self._threads)
        library = self._make_decoder(self._spec.augment.workers_only_flip or not training)
        batches = self._batches(self._fetched_ahead(split, slices), reader, library, make, source)
        return self._handing_out(RunAhead(batches, self._data.prefetch, self._data.timeout, reader.whereabouts))

    def _batches(
        self,
        slices: Iterable[BatchSlice],
        reader: RowReader,
        library: BatchDecoder,
        make: ImageAssembler,
        source: ImageSource,
    ) -> Generator[Batch, None, None]:
        if self._stream is not None:
            torch.cuda.set_device(self._stream.device)  # of this thread, which else opens a context on GPU 0, too
        under_way: deque[tuple[BatchSlice, list[Row | None] | None]] = deque()

        def requests() -> Iterator[Request]:
            for part in slices:
                rows = reader.read(part)
                under_way.append((part, rows))
                yield _request(rows or [None] * len(part.sample_ids))

        try:
            for decoded in library.decoded(requests()):
                part, rows = under_way.popleft()
                if rows is None or decoded is None:  # it finds the bad sample, too
                    yield make[part]
                    continue
                images = self._images(rows, decoded, make)
                valid = part.sample_ids != PADDING
                labels = np.where(valid, source.labels[part.sample_ids], 0).astype(np.int64)
                draws = tuple(row.draw for row in rows if row is not None and row.draw is not None)
                batch = Batch.of(part, images, labels, valid, draws=draws)
                yield batch if self._stream is None or images.is_cuda else batch.pin_memory()
        finally:
            reader.close()
            source.close()

    def _images(
        self, rows: list[Row | None], decoded: torch.Tensor | list[Pixels], make: ImageAssembler
    ) -> torch.Tensor:
        finish = make.transform.finish
        if isinstance(decoded, torch.Tensor):  # finished, but for the rows that the library was not asked for
            with on_stream(self._stream):
                for number, row in enumerate(rows):
                    if row is None:
                        decoded[number] = 0
                    elif row.pixels is not None:
                        decoded[number] = torch.from_numpy(np.ascontiguousarray(finish(row.pixels, row.draw)))
            return decoded
        images = torch.zeros(len(rows), 3, self._spec.image_size, self._spec.image_size, dtype=torch.uint8)
        pixels = images.numpy()

        def one(number: int, row: Row | None) -> None:
            if row is not None:
                view = row.pixels
                if view is None:
                    view = resize_region(decoded[number], row.view, self._spec.augment.interpolation)
                pixels[number] = finish(view, row.draw)

        for _ in self._pool.map(one, range(len(rows)), rows):
            pass
        return images

    def close(self) -> None:
        super().close()
        self._pool.shutdown(cancel_futures=True)


def _request(rows: list[Row | None]) -> Request:
    blank = BLANK, BLANK_VIEW, False
    asked = [
        blank if row is None or row.data is None else (row.data, row.view, row.draw is not None and row.draw.flip)
        for row in rows
    ]
    return Request(*(list(column) for column in zip(*asked, strict=True)))


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on a stream of its own, which does not wait for training; done on the device at the end of the block.

    Only the calling thread waits. Then other streams may read the results, and the library may have its memory back.
    Without a stream the block is run as it is.
    """
    with torch.cuda.stream(stream):  # type: ignore[no-untyped-call, unused-ignore]
        yield
        if stream is not None:
            stream.record_event().synchronize()


def for_training(images: torch.Tensor) -> torch.Tensor:
    """Return finished images; on a GPU, their memory is not used again before training has read them."""
    if images.is_cuda:
        images.record_stream(torch.cuda.default_stream(images.device))
    return images


def gpu_in_use() -> int | None:
    """Return the number of the GPU that this process uses. A run on the CPU of a machine with GPUs uses none."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None
