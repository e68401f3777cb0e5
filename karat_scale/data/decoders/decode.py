"""Decode an image to RGB with Pillow.

As in torchvision's ImageFolder, EXIF orientation is ignored and alpha is dropped. Unlike there, 16-bit grey
is scaled to 8 bits instead of clipped.
"""

import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

# Pillow knows more, and starts Ghostscript for an EPS file, whatever its name.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF", "AVIF", "JPEG2000")


class UndecodableImageError(Exception):
    """The bytes are not a complete image; the message is the reason."""


def open_image(data: bytes) -> Image.Image:
    """An image of one of `FORMATS`, its header read. Raises what Pillow raises."""
    return Image.open(io.BytesIO(data), formats=_available_formats())


@functools.cache
def _available_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
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
        raise UndecodableImageError(undecodable_reason(error)) from error


def decode_rgb(data: bytes, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Return a loaded RGB image of any format, mode or bit depth that Pillow reads. Raises UndecodableImageError.

    at_least: a sufficient (width, height), so that a JPEG may be scaled by 1/2, 1/4 or 1/8 while it is decoded.
    """
    with opened(data) as image:
        if at_least is not None:
            image.draft(None, at_least)
        return to_rgb(image)


def undecodable_reason(error: Exception) -> str:
    """Return the reason why Pillow refused an image, on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a supported format"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the whole of an opened image as RGB; raises Pillow's errors."""
    if image.mode == "RGB":
        image.load()
        return image.copy() if image.readonly else image
    if image.mode.startswith("I"):
        high_byte = np.clip(np.asarray(image, dtype=np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(high_byte).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def blank_jpeg(side: int) -> bytes:
    """Return a black JPEG of `side` x `side` pixels, to try a decoder with."""
    encoded = io.BytesIO()
    Image.new("RGB", (side, side)).save(encoded, "JPEG")
    return encoded.getvalue()
