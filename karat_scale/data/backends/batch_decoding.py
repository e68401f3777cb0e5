"""Backends of a library that decodes images together, such as DALI or nvJPEG.

Such a library gets our bytes, our order and our crops. It decodes; the rest is the code of the other backends. The
encoded images of a batch are read by threads, with the operations to apply to each. On a GPU where only a flip follows
the crop, the library also resizes and flips, and the batches are on the GPU.
"""

import copy
import resource
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import Protocol

import numpy as np
import torch

from karat_scale.data.backends.images import SplitBackend
from karat_scale.data.batch import Batch, Draw
from karat_scale.data.decoders.decode import Decoder, UndecodableImageError, View, blank_jpeg, check_pixels, read_chosen
from karat_scale.data.decoders.jpeg_header import read_frame
from karat_scale.data.decoders.libraries import TorchvisionDecoder, resize_region
from karat_scale.data.loading.assemble import ImageAssembler, ImageSpec, Pixels
from karat_scale.data.loading.device_feed import RunAhead
from karat_scale.data.plan import PADDING, BatchSlice
from karat_scale.data.shards.shard_files import MAX_OPEN_SHARDS, ImageSource
from karat_scale.foundation.errors import DataError

# The second bytes of markers: 0 means a plain 0xff, those of restarts differ in their last three bits.
START_OF_SCAN, END_OF_IMAGE, STUFFED, RESTART, FILL = 0xDA, 0xD9, 0x00, 0xD0, 0xFF

# From (epoch, sample id, width, height) to the view, and to the draw if there is one.
Choose = Callable[[int, int, int, int], tuple[View, Draw | None]]


@dataclass(frozen=True, eq=False)
class Row:
    """One sample of a batch: the JPEG whose `view` is to be decoded, or its `pixels` if they are decoded already."""

    view: View
    draw: Draw | None
    data: Pixels | None = None
    pixels: Pixels | None = None


class RowReader:
    """Reads the rows of a slice in up to `threads` threads, so that a slow file system gets many requests at a time.

    A library decodes batches of ordinary, complete JPEGs. All others are decoded here, by `decoder`. So is a damaged
    JPEG, even if its wanted part may be intact: all backends must find the same samples bad.
    """

    def __init__(self, source: ImageSource, decoder: Decoder, choose: Choose, max_pixels: int, threads: int) -> None:
        self._source, self._decoder, self._choose, self._max_pixels = source, decoder, choose, max_pixels
        self._own = threading.local()
        self._sources: list[ImageSource] = []
        self._at: dict[int, int] = {}
        threads = min(threads, _readers_with_files(threads))
        # The threads are daemons: one that waits for a dead file system does not keep the process alive.
        self._pool = ThreadPool(threads) if threads > 1 else None

    def read(self, part: BatchSlice) -> list[Row | None] | None:
        """Return the rows of a slice, None for padding; None instead of the list if one cannot be read or decoded.

        Raises:
            DataError: they are at a URL, and cannot be fetched.
        """
        self._source.prepare(part.ids)
        ids = part.sample_ids.tolist()

        def row(sample_id: int) -> Row | None:
            return None if sample_id == PADDING else self._row(part.epoch, sample_id)

        try:
            return self._pool.map(row, ids) if self._pool else [row(sample_id) for sample_id in ids]
        except (UndecodableImageError, DataError):
            return None

    def _row(self, epoch: int, sample_id: int) -> Row:
        # Each thread has its own open files.
        if not hasattr(self._own, "source"):
            self._own.source = copy.copy(self._source)
            self._sources.append(self._own.source)
        thread = threading.get_ident()
        self._at[thread] = sample_id
        try:
            data = self._own.source.read(sample_id)
        finally:
            del self._at[thread]
        choose = partial(self._choose, epoch, sample_id)
        frame, encoded = read_frame(data), np.frombuffer(data, dtype=np.uint8)
        if frame is None or not frame.is_grey_or_colour or not _ends_as_it_should(encoded):
            pixels, view, draw = read_chosen(self._decoder, data, choose)
            return Row(view, draw, pixels=pixels)
        check_pixels(frame.width, frame.height, self._max_pixels)
        return Row(*choose(frame.width, frame.height), data=encoded)

    def whereabouts(self) -> str:
        """Return what is being read now, for the message of a loader that gets no batch."""
        at = sorted(self._at.copy().values())
        if not at:
            return "all files were read, and pixels were processed"
        places = ", ".join(f"sample {i} in {self._source.file_of(i)}" for i in at)
        return f"reading {places}; check that file system"

    def close(self) -> None:
        """Stop the threads and close their files."""
        if self._pool:
            self._pool.terminate()
            self._pool = None
        for source in self._sources:
            source.close()


def _ends_as_it_should(data: Pixels) -> bool:
    """True if the JPEG's last scan runs to the end of the image and of the data, without another marker in it."""
    codes = data[np.flatnonzero(data[:-1] == 0xFF) + 1]
    markers = codes[(codes != STUFFED) & (codes != FILL) & (codes & 0xF8 != RESTART)]
    ends: list[int] = [*markers[-2:].tolist(), *data[-2:].tolist()]
    return ends == [START_OF_SCAN, END_OF_IMAGE, 0xFF, END_OF_IMAGE]


def _readers_with_files(wanted: int) -> int:
    """Return how many readers, at most `wanted`, may each keep as many shards open as a source does.

    If this process may open too few files, it allows itself more, as far as the system lets it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = (2 * wanted + 1) * MAX_OPEN_SHARDS  # training and evaluation, and all else
    if soft != resource.RLIM_INFINITY and soft < needed:
        more = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with suppress(OSError, ValueError):  # some sandboxes refuse it
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft // MAX_OPEN_SHARDS - 1))


# What the library is given in place of a row that it need not decode: every batch goes through it, to keep their order.
BLANK, BLANK_VIEW = np.frombuffer(blank_jpeg(8), dtype=np.uint8), View((0, 0, 1, 1), (0, 0, 1, 1), (1, 1))


@dataclass(frozen=True, eq=False)
class Request:
    """JPEGs and the view of each that is wanted, mirrored where `flips` says so."""

    data: list[Pixels]
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
        super().__init__(*splits, spec)
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
        make = ImageAssembler(source, self.spec, self._decoder, training)
        reader = RowReader(source, self._decoder, make.choose, self._data.max_pixels, self._threads)
        library = self._make_decoder(self.spec.augment.workers_only_flip or not training)
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
        images = torch.zeros(len(rows), 3, self.spec.image_size, self.spec.image_size, dtype=torch.uint8)
        pixels = images.numpy()

        def one(number: int, row: Row | None) -> None:
            if row is not None:
                view = row.pixels
                if view is None:
                    view = resize_region(decoded[number], row.view, self.spec.augment.interpolation)
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
