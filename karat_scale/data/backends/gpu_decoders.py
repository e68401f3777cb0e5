"""Backends of a library that decodes whole batches: DALI, or nvJPEG on the GPU through torchcodec or torchvision.

Such a library gets our bytes, our order and our crops. It decodes; the rest is the code of the other backends. The
encoded images of a batch are read by threads, with the operations to apply to each. On a GPU where only a flip follows
the crop, the library also resizes and flips, and the batches are on the GPU.

Whole batches of JPEGs go through DALI in the order they are given, except those that it cannot decode. DALI's readers
keep no exact order, its random crops draw from a stream of their own, and its epochs vary in length. So it only
decodes.

The code works round three properties of DALI. A JPEG that cannot be decoded invalidates DALI's pipeline, and what was
under way in it is lost; an error of the GPU does the same, with the same type. EXIF orientation is applied unless it
is switched off. Outputs are views of DALI's memory.
"""

import copy
import importlib
import re
import resource
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import Any, Protocol

import numpy as np
import torch

from karat_scale.data.augmentation.device_augment import resize_views
from karat_scale.data.backends.images import SplitBackend, open_shards
from karat_scale.data.batch import Batch, Draw
from karat_scale.data.decoders.decode import Decoder, UndecodableImageError, View, blank_jpeg, check_pixels, read_chosen
from karat_scale.data.decoders.jpeg_header import hide_exif, read_frame
from karat_scale.data.decoders.libraries import JpegDecoder, TorchvisionDecoder, find_jpeg_decoder, resize_region
from karat_scale.data.loading.assemble import ImageAssembler, ImageSpec, Pixels
from karat_scale.data.loading.device_feed import RunAhead
from karat_scale.data.plan import PADDING, BatchSlice
from karat_scale.data.shards.shard_files import MAX_OPEN_SHARDS, ImageSource
from karat_scale.foundation.errors import DataError, RecipeError, one_line
from karat_scale.foundation.tables import EXTRAS, how_to_install

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
            DataError: the samples are at a URL, and cannot be fetched.
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
        if frame is None or not _ends_as_it_should(encoded):
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
BLANK = np.frombuffer(blank_jpeg(8), dtype=np.uint8), View((0, 0, 1, 1), (0, 0, 1, 1), (1, 1)), False


@dataclass(frozen=True, eq=False)
class Request:
    """JPEGs and the wanted view of each, mirrored where `flips` says so."""

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
    """See Backend. `data.workers` is the number of threads that read, and also of those that resize and augment.

    stream: the CUDA stream of the library, on a GPU. make_decoder: returns the library for batches that need only crop
    and flip (True), or for others.
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
                asked = [
                    BLANK if row is None or row.data is None else (row.data, row.view, bool(row.draw and row.draw.flip))
                    for row in rows or [None] * len(part.sample_ids)
                ]
                yield Request(*(list(column) for column in zip(*asked, strict=True)))

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


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on a separate stream, which does not wait for training; at the end of the block the device has done it.

    Only the calling thread waits. After that, other streams may read the results, and the library may reuse its memory.
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


def gpu_of(spec: ImageSpec) -> int | None:
    """Return the number of the GPU that the batches are for. A run on the CPU of a machine with GPUs uses none."""
    device = spec.device
    if not (torch.cuda.is_initialized() if device is None else device.type == "cuda"):
        return None
    return torch.cuda.current_device() if device is None or device.index is None else device.index


# Batches that DALI works on at a time: one is decoded while the next is read.
QUEUE_DEPTH = 2
INTERPOLATIONS = {"bilinear": "INTERP_LINEAR", "bicubic": "INTERP_CUBIC"}

# DALI's words where CUDA or an allocation failed. nvImageCodec's failures are 3 and 4 for a bad image; 5 to 7 are an
# allocation, an execution, and a GPU that is not supported.
_GPU_FAILURE = re.compile(r"CUDA|\bcuda[A-Z]|[Cc]an't allocate|out of memory|nvImageCodec failure: '#[567]'")


@dataclass(frozen=True)
class DaliDecoder:
    """Decodes on `threads` threads of the CPU, or with nvJPEG where `device_id` is a GPU's number.

    With `size` DALI resizes and mirrors too, where it decodes. Without it the regions of the views come back as they
    are, for a resize that equals the other backends'. On a GPU `stream` takes the results over.
    """

    threads: int
    interpolation: str
    device_id: int | None = None
    size: int | None = None
    stream: torch.cuda.Stream | None = None

    def decoded(self, requests: Iterable[Request]) -> Generator["torch.Tensor | list[Pixels] | None", None, None]:
        """Yield the result of each request, in order; see BatchDecoder.

        With a size it is uint8 [b, 3, size, size], on the GPU if there is one; else the regions, uint8 [h, w, 3] each.
        It is None if DALI cannot decode one of the images. The regions are DALI's memory, and valid until the next
        result is asked for. Raises DataError if DALI does not start, and RuntimeError if it fails for another reason
        than an image.
        """
        upcoming = iter(requests)
        waiting: deque[Request] = deque()
        errors: list[Exception] = []  # of the requests, for after the batches that precede them
        while True:
            first = waiting.popleft() if waiting else next(upcoming, None)
            if first is None:
                if errors:
                    raise errors[0]
                return
            waiting.appendleft(first)
            yield from self._until_failure(waiting, upcoming, errors)

    def _until_failure(
        self, waiting: deque[Request], upcoming: Iterator[Request], errors: list[Exception]
    ) -> Generator["torch.Tensor | list[Pixels] | None", None, None]:
        """Run one pipeline until the requests end, one is larger than the first, or a batch fails.

        Requests that were fed and not decoded are put back into `waiting`.
        """
        largest = len(waiting[0])
        under_way: deque[Request] = deque()

        def feed() -> Iterator[tuple[Any, ...]]:
            try:
                while (request := waiting.popleft() if waiting else next(upcoming, None)) is not None:
                    if len(request) > largest:
                        waiting.appendleft(request)
                        return
                    under_way.append(request)
                    yield self._inputs(request)
            except Exception as error:  # DALI would report it before the batches that precede it
                errors.append(error)

        pipeline = self._build(feed(), largest)
        while True:
            try:
                (output,) = pipeline.run()
                result = self._result(output)
            except StopIteration:
                break
            except (RuntimeError, IndexError) as error:
                _raise_unless_of_an_image(error, self.stream)
                under_way.popleft()
                waiting.extendleft(reversed(under_way))
                del pipeline
                yield None
                return
            under_way.popleft()
            yield result

    def _inputs(self, request: Request) -> tuple[Any, ...]:
        regions = np.array([view.region for view in request.views], dtype=np.int32)
        inputs = request.data, regions[:, :2].copy(), regions[:, 2:] - regions[:, :2]
        if self.size is None:
            return inputs
        boxes = np.array([view.box_in_region for view in request.views], dtype=np.float32)
        top_left, bottom_right = boxes[:, 1::-1].copy(), boxes[:, :1:-1].copy()
        return *inputs, top_left, bottom_right, np.array(request.flips, dtype=np.int32)

    def _build(self, source: Iterator[tuple[Any, ...]], batch: int) -> Any:
        # Not an import statement, since DALI is an extra.
        dali, fn = importlib.import_module(EXTRAS["dali"].module), importlib.import_module("nvidia.dali.fn")
        types = importlib.import_module("nvidia.dali.types")
        inputs = [(types.UINT8, 1), (types.INT32, 1), (types.INT32, 1)]
        if self.size is not None:
            inputs += [(types.FLOAT, 1), (types.FLOAT, 1), (types.INT32, 0)]
        pipeline = dali.Pipeline(batch, self.threads, self.device_id, prefetch_queue_depth=QUEUE_DEPTH)
        with pipeline:
            data, starts, shapes, *rest = fn.external_source(
                source=source,
                num_outputs=len(inputs),
                dtype=[kind for kind, _ in inputs],
                ndim=[dimensions for _, dimensions in inputs],
                no_copy=True,  # the requests under way keep their bytes
            )
            images = fn.decoders.image_slice(
                data,
                starts,
                shapes,
                device="cpu" if self.device_id is None else "mixed",
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
            )
            if self.size is not None:
                top_left, bottom_right, flips = rest
                images = fn.resize(
                    images,
                    size=[self.size, self.size],
                    interp_type=getattr(types, INTERPOLATIONS[self.interpolation]),
                    roi_start=top_left,
                    roi_end=bottom_right,
                )
                images = fn.crop_mirror_normalize(images, mirror=flips, dtype=types.UINT8, output_layout="CHW")
            pipeline.set_outputs(images)
        try:
            pipeline.build()
        except RuntimeError as error:
            raise DataError(
                f"DALI does not start: {str(error).splitlines()[0]}; use data.backend=webdataset"
            ) from error
        return pipeline

    def _result(self, output: Any) -> "torch.Tensor | list[Pixels]":
        if self.size is None:
            regions = output if self.device_id is None else output.as_cpu()
            return [np.asarray(regions[row]) for row in range(len(regions))]
        with on_stream(self.stream):
            images = torch.from_dlpack(output.as_tensor()).clone()
        return for_training(images)


def _raise_unless_of_an_image(error: Exception, stream: torch.cuda.Stream | None) -> None:
    """Raise RuntimeError unless DALI's error is about an image: the next batch would fail in the same way."""
    # Before that DALI quotes where in which file the operator was made.
    met = str(error).rpartition("encountered:")[2]
    lines = [line for line in met.splitlines() if _GPU_FAILURE.search(line)]
    reason = lines[0].strip() if lines else None
    if reason is None and stream is not None:
        try:
            stream.synchronize()  # an error of CUDA stays, and every later call says it
        except RuntimeError as failed:
            reason = str(failed).splitlines()[0]
    if reason is not None:
        raise RuntimeError(f"DALI failed on the GPU, not for a bad image: {reason}") from error


def open_dali(spec: ImageSpec) -> BatchDecodingBackend:
    """Open shards for DALI. Raises RecipeError if DALI is not installed, and DataError if the shards are not right.

    Batches that the CPU augments are decoded there too: the pixels would only travel to the GPU and back.
    """
    try:
        importlib.import_module(EXTRAS["dali"].module)
    except (ImportError, OSError) as error:
        raise RecipeError(f"data.backend = dali needs DALI ({one_line(error)}); {how_to_install('dali')}") from error
    gpu = gpu_of(spec)
    stream = None if gpu is None else torch.cuda.Stream(gpu)
    threads, interpolation = max(1, spec.data.workers), spec.augment.interpolation

    def make_decoder(only_flips: bool) -> DaliDecoder:
        if only_flips and gpu is not None:
            return DaliDecoder(threads, interpolation, gpu, spec.image_size, stream)
        return DaliDecoder(threads, interpolation)

    return BatchDecodingBackend(open_shards(spec), spec, make_decoder, stream)


# The last word of the libraries' messages is nvJPEG's status: 2, 3, 4 and 9 are said of an image that it cannot decode.
_OF_AN_IMAGE = re.compile(r": [2349]\b|chroma subsampling")


def open_nvjpeg(spec: ImageSpec) -> BatchDecodingBackend:
    """Open shards for nvJPEG.

    Raises:
        RecipeError: the run uses no GPU, the CPU would augment, or no library decodes on the GPU.
        DataError: the shards are not right.
    """
    if not spec.augment.workers_only_flip:
        raise RecipeError(
            "data.backend = nvjpeg makes its batches on the GPU, but augment.run_on = workers augments on the CPU; set "
            "augment.run_on=device"
        )
    gpu = gpu_of(spec)
    if gpu is None:
        raise RecipeError(
            "data.backend = nvjpeg decodes on a CUDA GPU, and this run uses none; set run.device=cuda, or "
            "data.backend=webdataset"
        )
    stream = torch.cuda.Stream(gpu)
    try:
        decode = find_jpeg_decoder(torch.device("cuda", gpu))
    except RecipeError as error:
        raise RecipeError(f"data.backend = nvjpeg: {error}, or use data.backend=webdataset") from error
    decoder = NvjpegDecoder(decode, spec.image_size, spec.augment.interpolation, stream)
    return BatchDecodingBackend(open_shards(spec), spec, lambda _: decoder, stream)


@dataclass(frozen=True)
class NvjpegDecoder:
    """Decodes whole images on a device, and crops, resizes and flips them there. See BatchDecoder.

    With the CPU as its device, libjpeg-turbo decodes; all else is the same.
    """

    decode: JpegDecoder
    size: int
    interpolation: str
    stream: torch.cuda.Stream | None = None
    _alone: threading.Lock = field(default_factory=threading.Lock)

    def decoded(self, requests: Iterable[Request]) -> Generator[torch.Tensor | None, None, None]:
        """Yield the finished views of each request, uint8 [b, 3, size, size]; see BatchDecoder."""
        for request in requests:
            # Training and evaluation have a thread each. A thread keeps the lock until the device is done: a decoder
            # works on a stream of its own, and would write to memory that a resize of the other still reads.
            with self._alone:
                views = self._decoded(request)
            yield views

    def _decoded(self, request: Request) -> torch.Tensor | None:
        try:
            with on_stream(self.stream):
                images = self._views(request)
        except RuntimeError as error:
            if self.stream is not None:
                self.stream.synchronize()  # raises an error of CUDA again, which stays
            if self.decode.device.type == "cuda" and not _is_of_an_image(error):
                raise  # the next batch would fail in the same way
            return None
        return None if images is None else for_training(images)

    def _views(self, request: Request) -> torch.Tensor | None:
        """Return the views; None if the library reads other dimensions than the header has."""
        encoded = [bytearray(data) for data in request.data]
        for data in encoded:
            hide_exif(data)
        images = self.decode(encoded)
        for image, view in zip(images, request.views, strict=True):
            if image.shape[2] < view.region[2] or image.shape[1] < view.region[3]:
                return None
        return resize_views(images, request.views, request.flips, self.size, self.interpolation)


def _is_of_an_image(error: RuntimeError) -> bool:
    """True if nvJPEG could not decode an image: another batch can still be decoded."""
    return _OF_AN_IMAGE.search(str(error).splitlines()[0]) is not None
