"""Convert an image file to its form in a beton, so that every reader gets the same pixels as from the shards.

A JPEG that FFCV's decoder reads is stored byte for byte. An image it cannot read (PNG, CMYK, ...) is stored as raw RGB
pixels. A file that nothing reads is stored unchanged, and every reader of this project then treats it as a bad sample.
"""

import random
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from karat_scale.data.decoders.decode import UndecodableImageError, decode_rgb
from karat_scale.data.decoders.ffcv import JpegDecoder
from karat_scale.data.decoders.jpeg_header import read_frame
from karat_scale.data.decoders.orientation import to_jpeg
from karat_scale.data.shards.beton_writer import MAX_SIDE, StoredImage
from karat_scale.foundation.errors import DataError

WriteMode = Literal["jpg", "raw", "proportion", "smart"]
FIX = "use --max-resolution, or remove it"


@dataclass(frozen=True)
class Packing:
    """The storage of images.

    mode: `jpg`; `raw`, decoded; `proportion`, a share `jpeg_share` of the samples, drawn by `seed`, as JPEG and the
    rest raw; `smart`, as JPEG if the pixels take more than `raw_below` bytes. max_resolution: longer side limited
    to this many pixels. quality: of the JPEGs that are re-encoded, the resized ones. page: the most bytes of a stored
    image; larger raw ones become JPEGs.
    """

    mode: WriteMode
    max_resolution: int | None
    quality: int
    jpeg_share: float
    raw_below: int
    seed: int
    page: int


class Packer:
    """Packs images, in one process."""

    def __init__(self, packing: Packing) -> None:
        self._packing = packing
        self._decode = JpegDecoder()

    def pack(self, data: bytes, index: int, name: str) -> tuple[StoredImage, str]:
        """Return what to store of an image, and, if it cannot be decoded, the reason.

        Raises DataError if FFCV's format cannot hold it.
        """
        frame = read_frame(data)
        if frame and not (frame.is_grey_or_colour and self._decode(data, frame) is not None):
            frame = None
        if frame and self._keeps_size(frame.width, frame.height) and self._as_jpeg(index, frame.width, frame.height):
            return self._checked(StoredImage("jpg", frame.width, frame.height, data), name), ""
        try:
            image = decode_rgb(data)
        except UndecodableImageError as error:
            return self._checked(StoredImage("jpg", 1, 1, data), name), str(error)
        resized = not self._keeps_size(*image.size)
        if resized:
            image = self._resized(image)
        if max(image.size) > MAX_SIDE:
            raise DataError(f"{name}: {image.width} x {image.height} pixels do not fit FFCV's format; {FIX}")
        # Only pixels that come from a JPEG, or are resized anyway, may be encoded with a loss.
        small = 3 * image.width * image.height <= self._packing.page
        if small and not (resized and self._as_jpeg(index, *image.size)):
            return StoredImage("raw", *image.size, image.tobytes()), ""
        encoded = data if frame and not resized else to_jpeg(image, self._packing.quality)
        return self._checked(StoredImage("jpg", *image.size, encoded), name), ""

    def _keeps_size(self, width: int, height: int) -> bool:
        limit = self._packing.max_resolution
        return limit is None or max(width, height) <= limit

    def _resized(self, image: Image.Image) -> Image.Image:
        limit = self._packing.max_resolution or max(image.size)
        width, height = (max(1, round(side * limit / max(image.size))) for side in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def _as_jpeg(self, index: int, width: int, height: int) -> bool:
        packing = self._packing
        if packing.mode == "smart":
            return 3 * width * height > packing.raw_below
        if packing.mode == "proportion":
            return random.Random(f"{packing.seed} {index}").random() < packing.jpeg_share
        return packing.mode == "jpg"

    def _checked(self, image: StoredImage, name: str) -> StoredImage:
        if len(image.data) > self._packing.page:
            raise DataError(f"{name}: {len(image.data)} bytes are more than a page of {self._packing.page}; {FIX}")
        return image
