"""The interface of all decoders, the view of an image that they return, and decoding to RGB with Pillow.

As in torchvision's ImageFolder, EXIF orientation is ignored and alpha is dropped. Unlike there, 16-bit grey
is scaled to 8 bits instead of clipped, and grey of no certain range is refused instead of black or white.
"""

import functools
import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT

from karat_scale.foundation.errors import one_line

# Pillow's warning of corrupt EXIF data names a line of Pillow's, and not the image, which is whole.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
# Pillow knows more, and starts Ghostscript for an EPS file, whatever its name.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF", "AVIF", "JPEG2000")


class UndecodableImageError(Exception):
    """The bytes are not a complete image; the message is the reason. done: what cannot be done with the sample."""

    done = "decoded"


def open_image(data: bytes) -> Image.Image:
    """Open an image of one of `FORMATS` and read its header. Raises what Pillow raises."""
    return Image.open(io.BytesIO(data), formats=_available_formats())


@functools.cache
def _available_formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """Open an image whose header is read. Any error of Pillow inside becomes UndecodableImageError."""
    try:
        with open_image(data) as image:
            yield image
    except (MemoryError, UndecodableImageError):
        raise
    except Exception as error:  # damaged files make Pillow raise nearly any error
        unknown = "not an image in a supported format" if data else "the file is empty"
        reason = unknown if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise UndecodableImageError(reason) from error


def decode_rgb(data: bytes, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Return a loaded RGB image of any format, mode or bit depth that Pillow reads. Raises UndecodableImageError.

    at_least: a sufficient (width, height), so that a JPEG may be scaled by 1/2, 1/4 or 1/8 while it is decoded.
    """
    with opened(data) as image:
        if at_least is not None:
            image.draft(None, at_least)
        return to_rgb(image)


_UNSIGNED = 1  # TIFF's number for whole numbers without a sign


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the whole of an opened image as RGB; raises Pillow's errors."""
    if image.mode == "RGB":
        image.load()
        return image.copy() if image.readonly else image
    if image.mode.startswith("I"):
        tags = getattr(image, "tag_v2", {})  # of a TIFF; other formats have 16 bits, or Pillow scales them to 16
        (bits, *_), (sample_format, *_) = tags.get(BITSPERSAMPLE, (16,)), tags.get(SAMPLEFORMAT, (_UNSIGNED,))
        if bits > 16 or sample_format != _UNSIGNED:
            raise ValueError("its pixels are signed or 32-bit numbers of no certain range; store it with 8 or 16 bits")
        return Image.fromarray((np.asarray(image, dtype=np.int64) >> (bits - 8)).astype(np.uint8)).convert("RGB")
    if image.mode == "F":  # Pillow would make all of it black where white is 1
        raise ValueError("its pixels are floating-point numbers of no certain range; store it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def blank_jpeg(side: int) -> bytes:
    """Return a black JPEG of `side` x `side` pixels, to try a decoder with."""
    encoded = io.BytesIO()
    Image.new("RGB", (side, side)).save(encoded, "JPEG")
    return encoded.getvalue()


# Pixels on either side that a bicubic filter for downscaling may use, per step of the output.
FILTER_REACH = 2


@dataclass(frozen=True)
class View:
    """A box of an image, resized.

    box: left, top, right, bottom in source pixels, resized to `size` (width, height). region: the whole pixels the
    filter may use, as integers; for a crop that is resized by itself, it is the box.
    """

    region: tuple[int, int, int, int]
    box: tuple[float, float, float, float]
    size: tuple[int, int]

    @property
    def box_in_region(self) -> tuple[float, float, float, float]:
        """The box relative to the region's corner."""
        left, top = self.region[:2]
        return self.box[0] - left, self.box[1] - top, self.box[2] - left, self.box[3] - top


def crop_view(box: tuple[int, int, int, int], size: int) -> View:
    """Return a crop (left, top, width, height) resized to size x size, as cropping and then resizing does."""
    left, top, width, height = box
    edges = (left, top, left + width, top + height)
    return View(edges, edges, (size, size))


def centre_view(width: int, height: int, short_side: int, size: int) -> View:
    """Return the centre size x size of the image resized to this short side, as torchvision resizes and crops.

    The resized image is never smaller than the crop, since short_side >= size.
    """
    scaled_width, scaled_height = short_side, short_side
    if width < height:
        scaled_height = int(short_side * height / width)
    else:
        scaled_width = int(short_side * width / height)
    left, right, first, last = _centre(width, scaled_width, size)
    top, bottom, highest, lowest = _centre(height, scaled_height, size)
    return View((first, highest, last, lowest), (left, top, right, bottom), (size, size))


def _centre(length: int, scaled: int, size: int) -> tuple[float, float, int, int]:
    """Return, along one axis, the ends of the box, and those of the pixels that the filter uses."""
    step = length / scaled
    start = round((scaled - size) / 2.0)
    low, high = start * step, min((start + size) * step, length)  # rounding must not take it beyond the image
    reach = FILTER_REACH * max(step, 1.0) + 1
    return low, high, max(0, math.floor(low - reach)), min(length, math.ceil(high + reach))


ChooseView = Callable[[int, int], View]
Drawn = TypeVar("Drawn")


class Decoder(Protocol):
    """Decodes the pixels of a part of an encoded image. Used by one thread at a time."""

    @property
    def name(self) -> str:
        """The decoder's name in `data.decoder`."""

    def read(self, data: bytes, choose: ChooseView) -> npt.NDArray[np.uint8]:
        """Return the view that `choose(width, height)` asks for, uint8 [height, width, 3], RGB.

        Raises UndecodableImageError for damaged bytes and for more pixels than `data.max_pixels`.
        """


def read_chosen(
    decoder: Decoder, data: bytes, choose: Callable[[int, int], tuple[View, Drawn]]
) -> tuple[npt.NDArray[np.uint8], View, Drawn]:
    """Return the pixels of the view that `choose(width, height)` asks for, and what `choose` returned.

    Raises UndecodableImageError.
    """
    chosen: list[tuple[View, Drawn]] = []

    def note(width: int, height: int) -> View:
        chosen.append(choose(width, height))
        return chosen[-1][0]

    return decoder.read(data, note), *chosen[-1]


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse an image of more than `max_pixels`. Raises UndecodableImageError."""
    if width * height > max_pixels:
        raise UndecodableImageError(f"it has {width} x {height} pixels, more than data.max_pixels = {max_pixels}")


def result_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Return width and height with a short side of at most this many pixels, in proportion."""
    scale = short_side / min(width, height)
    if scale >= 1:
        return width, height
    return max(short_side, round(width * scale)), max(short_side, round(height * scale))
