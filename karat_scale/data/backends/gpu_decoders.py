"""The shards of the `webdataset` backend, decoded by DALI, or by nvJPEG on the GPU through torchcodec or torchvision.

Whole batches of JPEGs go through DALI in the order they are given, except those that it cannot decode. DALI's readers
keep no exact order, its random crops draw from a stream of their own, and its epochs vary in length. So it only
decodes.

The code works round three properties of DALI. A JPEG that cannot be decoded invalidates DALI's pipeline, and what was
under way in it is lost; an error of the GPU does the same, with the same type. EXIF orientation is applied unless it
is switched off. Outputs are views of DALI's memory.
"""

import importlib
import re
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from karat_scale.data.augmentation.device_augment import resize_views
from karat_scale.data.backends.batch_decoding import (
    BatchDecodingBackend,
    Request,
    for_training,
    gpu_in_use,
    on_stream,
)
from karat_scale.data.backends.images import open_shards
from karat_scale.data.decoders.jpeg_header import hide_exif
from karat_scale.data.decoders.libraries import JpegDecoder, find_jpeg_decoder
from karat_scale.data.loading.assemble import ImageSpec, Pixels
from karat_scale.foundation.errors import DataError, RecipeError, one_line
from karat_scale.foundation.tables import EXTRAS, how_to_install

# Batches that DALI works on at a time: one is decoded while the next is read.
QUEUE_DEPTH = 2
INTERPOLATIONS = {"bilinear": "INTERP_LINEAR", "bicubic": "INTERP_CUBIC"}

# What DALI says where CUDA or an allocation failed. nvImageCodec's failures are 3 and 4 for a bad image; 5 to 7 are an
# allocation, an execution, and a GPU that is not supported.
_GPU_FAILURE = re.compile(r"CUDA|\bcuda[A-Z]|[Cc]an't allocate|out of memory|nvImageCodec failure: '#[567]'")


def require_dali() -> None:
    """Raise RecipeError, with what to install, where DALI is not there."""
    try:
        importlib.import_module(EXTRAS["dali"].module)
    except (ImportError, OSError) as error:
        raise RecipeError(f"data.backend = dali needs DALI ({one_line(error)}); {how_to_install('dali')}") from error


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
        """For each request, in order: uint8 [b, 3, size, size] where there is a size, on the GPU where there is one;
        else the regions, uint8 [h, w, 3] each; None where DALI cannot decode one of the images.

        The regions are DALI's memory, and lent until the next is asked for. Raises DataError where DALI does not start,
        and RuntimeError where it fails for another reason than an image.
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
        """One pipeline's life: until the requests end, one is larger than the first, or a batch fails.

        What was fed and not decoded is put back into `waiting`.
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
    """Raise RuntimeError where DALI's error is not one of an image: the next batch would fail in the same way."""
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
    require_dali()
    gpu = gpu_in_use()
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
    gpu = gpu_in_use()
    if gpu is None:
        raise RecipeError(
            "data.backend = nvjpeg decodes on a CUDA GPU, and this run uses none; use data.backend=webdataset"
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
            # Training and evaluation have a thread each. Whoever has the lock leaves with the device done: a decoder
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
        """None if the library reads other dimensions than the header has."""
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
