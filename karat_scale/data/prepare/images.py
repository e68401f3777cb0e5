"""Inspect one image file, and shrink it to a JPEG.

The header shows what is unusual about a file: the reasons why decoders disagree or fail. The native recoder shrinks
ordinary images if it runs; Pillow shrinks the others.
"""

import functools
import warnings
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from karat_scale.data.decoders.decode import UndecodableImageError, decode_rgb, open_image, undecodable_reason
from karat_scale.data.decoders.native import NativeRecoder, result_size
from karat_scale.data.decoders.orientation import (
    TRANSPOSES,
    UPRIGHT,
    image_orientation,
    jpeg_orientation,
    scan_jpeg,
    to_jpeg,
)
from karat_scale.data.prepare.sources.base import UnreadableSampleError
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.native_build import PACKAGES, LoadError

# The same as Pillow's limit against decompression bombs.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
# The second image in these files is not a second sample.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg"}
JPEG_ENDINGS = (".jpg", ".jpeg", ".jpe")
# What a viewer does to the stored picture, by EXIF orientation.
TURNS = {
    2: "mirrored left to right",
    3: "turned by 180 degrees",
    4: "mirrored top to bottom",
    5: "mirrored along a diagonal",
    6: "turned by 90 degrees clockwise",
    7: "mirrored along a diagonal",
    8: "turned by 90 degrees counterclockwise",
}
END_OF_IMAGE = b"\xff\xd9"


@dataclass(frozen=True)
class ImageFacts:
    """An image file's suffix by content, and what is odd about it.

    orientation: EXIF's, from 2 if viewers turn or mirror the picture; corrupt_exif: no orientation can be read;
    odd: other oddities; undecodable: why it has no complete pixels.
    """

    extension: str
    grey: bool = False
    orientation: int = UPRIGHT
    corrupt_exif: bool = False
    odd: tuple[str, ...] = ()
    undecodable: str = ""


def without_exif(data: bytes) -> bytes:
    """Return a JPEG without its EXIF segments; the pixels do not change."""
    header = scan_jpeg(data)
    for start, end in reversed(header.exif if header else ()):
        data = data[:start] + data[end:]
    return data


def inspect_image(data: bytes, name: str) -> ImageFacts:
    """Examine an image's header. Raises UnreadableSampleError if there is none, or for a decompression bomb."""
    if not data:
        raise UnreadableSampleError("the file is empty")
    header = scan_jpeg(data)
    if header is None:
        return _inspect_by_pillow(data, name)
    if header.width * header.height > MAX_PIXELS:
        raise UnreadableSampleError(f"{header.width} x {header.height} pixels are over the limit of {MAX_PIXELS}")
    # Not every JPEG without its last marker has missing pixels, so those few are decoded.
    complete = data.rfind(END_OF_IMAGE, header.scan) >= 0
    orientation = jpeg_orientation(data, header)
    return ImageFacts(
        extension="jpg",
        grey=header.components == 1,
        orientation=orientation or UPRIGHT,
        corrupt_exif=orientation is None,
        odd=("CMYK",) if header.components == 4 else (),
        undecodable="" if complete else decoding_failure(data),
    )


def decoding_failure(data: bytes) -> str:
    """Return why an image cannot be decoded; empty if it can."""
    try:
        decode_rgb(data)
    except UndecodableImageError as error:
        return str(error)
    return ""


def _inspect_by_pillow(data: bytes, name: str) -> ImageFacts:
    try:
        with warnings.catch_warnings(), open_image(data) as image:
            warnings.simplefilter("ignore")
            size, kind, mode = image.size, image.format, image.mode
            orientation = image_orientation(image)
    except Exception as error:  # damaged files make Pillow raise nearly any error
        raise UnreadableSampleError(undecodable_reason(error)) from error
    if min(size) < 1 or kind is None:
        raise UnreadableSampleError("the image has no pixels")
    odd = ["CMYK"] if mode == "CMYK" else []
    extension = EXTENSIONS.get(kind, kind.lower())
    if extension == "jpg":
        odd.append("junk in the header")
    elif name.lower().endswith(JPEG_ENDINGS):
        odd.append(f"{kind} named JPEG")
    grey = mode in ("1", "L", "LA", "I", "I;16")
    return ImageFacts(extension, grey, orientation, odd=tuple(odd), undecodable=decoding_failure(data) if odd else "")


Encoder = Literal["native", "pillow"]
# A JPEG that is scaled while decoding stays larger than its result by this factor, so that the resize is good.
DRAFT_MARGIN = 2


def choose_encoder(asked: Literal["auto", "native", "pillow"]) -> Encoder:
    """Return the encoder to use. Call it before workers are forked. Raises DataError if native cannot run."""
    if asked == "pillow":
        return "pillow"
    try:
        native_recoder()
    except LoadError as error:
        if asked == "native":
            fix = f"run `apt-get install {PACKAGES}`, or use --encoder pillow"
            raise DataError(f"--encoder native cannot run: {error}; {fix}") from error
        return "pillow"
    return "native"


@functools.cache
def native_recoder() -> NativeRecoder:
    """Return the recoder of this process. Raises LoadError if it cannot be compiled."""
    return NativeRecoder()


def resized_jpeg(
    data: bytes, short_side: int, quality: int, encoder: Encoder = "pillow", orientation: int | None = None
) -> bytes:
    """Return the image as RGB JPEG with at most this short side. Raises UndecodableImageError.

    orientation: turn it as this EXIF orientation asks, which the native recoder cannot.
    """
    if encoder == "native" and orientation is None:
        encoded = native_recoder().shrink(data, short_side, quality, DRAFT_MARGIN)
        if encoded is not None:
            return encoded
    enough = DRAFT_MARGIN * short_side
    image = decode_rgb(data, at_least=(enough, enough))
    if orientation is not None:
        image = image.transpose(TRANSPOSES[orientation])
    size = result_size(*image.size, short_side)
    return to_jpeg(image if size == image.size else image.resize(size, Image.Resampling.BICUBIC), quality)
