"""The shards of the `webdataset` backend, decoded by nvJPEG on the GPU, through torchcodec or torchvision, not DALI."""

import re
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import torch

from karat_scale.data.augmentation.device_augment import resize_views
from karat_scale.data.backends.images import (
    BatchDecodingBackend,
    Request,
    for_training,
    gpu_in_use,
    on_stream,
    open_shards,
)
from karat_scale.data.decoders.jpeg_header import hide_exif
from karat_scale.data.decoders.pillow import JpegDecoder, find_jpeg_decoder
from karat_scale.data.loading.assemble import ImageSpec
from karat_scale.foundation.errors import RecipeError

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

    def decoded(self, requests: Iterable[Request]) -> Generator[torch.Tensor | None, None, None]:
        """Yield the finished views of each request, uint8 [b, 3, size, size]; see BatchDecoder."""
        for request in requests:
            try:
                # The block ends when the device is done. So a decoder that has a stream of its own never writes to
                # memory that a resize still reads.
                with on_stream(self.stream):
                    images = self._views(request)
            except RuntimeError as error:
                if self.stream is not None:
                    self.stream.synchronize()  # raises an error of CUDA again, which stays
                if self.decode.device.type == "cuda" and not _is_of_an_image(error):
                    raise  # the next batch would fail in the same way
                yield None
            else:
                yield None if images is None else for_training(images)

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
