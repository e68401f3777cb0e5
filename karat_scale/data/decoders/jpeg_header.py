"""The header of an image: its dimensions, how viewers turn it by EXIF, and the file turned upright.

The dimensions of an ordinary JPEG are read from its first few hundred bytes, without a library.
"""

import io
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, JpegImagePlugin

from karat_scale.data.decoders.decode import UndecodableImageError, open_image, opened, to_rgb

# Start of frame, Huffman-coded with 8 bits: baseline, extended sequential, progressive.
FRAMES = (0xC0, 0xC1, 0xC2)
# Every start of frame: the markers from C0 to CF except DHT, JPG and DAC.
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
LONE_MARKERS = frozenset(range(0xD0, 0xD8)) | {0x01}
START_OF_SCAN, FILL = 0xDA, 0xFF
# The segment of EXIF and XMP, and one that means nothing to a decoder.
APP1, APP15 = 0xE1, 0xEF

ORIENTATION_TAG, EXIF_TAG = 0x0112, 0x8769
UPRIGHT = 1
# What a viewer does to the stored picture, by EXIF orientation.
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Odd files are few, so their pixels may take some bytes.
CONVERT_QUALITY = 95
WNID = re.compile(r"n\d{8}")
"""The WordNet id of a class."""


def _segments(data: bytes | bytearray) -> Iterator[tuple[int, int, int]]:
    """Yield the marker of each segment of a JPEG with its start and end, until junk between segments."""
    at = 2 if data[:2] == b"\xff\xd8" else len(data)
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == FILL or marker in LONE_MARKERS:
            end = at + 1 if marker == FILL else at + 2
        else:
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, at, end
        at = end


def _dimensions(data: bytes, at: int) -> tuple[int, int, int]:
    """Return width, height and number of colour components in the frame that starts at `at`."""
    height, width, components = struct.unpack_from(">HHB", data, at + 5)
    return width, height, components


@dataclass(frozen=True)
class Frame:
    """Width and height in pixels and the number of colour components."""

    width: int
    height: int
    components: int


def read_frame(data: bytes) -> Frame | None:
    """Return the frame of a grey or colour JPEG, which all decoders read equally; None for other data.

    Other data includes more than 8 bits per sample, CMYK, YCCK, and junk between segments.
    """
    for marker, at, end in _segments(data):
        if marker in FRAMES and at + 10 <= len(data):
            frame = Frame(*_dimensions(data, at))
            is_usual = data[at + 4] == 8 and frame.components in (1, 3)
            return frame if is_usual and frame.width and frame.height else None
        # Arithmetic, lossless and hierarchical frames, a scan before any frame, and what no ordinary file has.
        if marker in FRAME_MARKERS or marker in (START_OF_SCAN, FILL) or marker < 0xC0 or end < at + 4:
            return None
    return None


def hide_exif(data: bytearray) -> bool:
    """Rename the segments that hold EXIF, so that no decoder turns the image; its pixels do not change.

    Returns False if junk before the pixels hides where the segments are.
    """
    for marker, at, _ in _segments(data):
        if marker == START_OF_SCAN:
            return True
        if marker == APP1:
            data[at + 1] = APP15
    return False


@dataclass(frozen=True)
class JpegHeader(Frame):
    """A JPEG's frame, the start of its pixels, and the (start, end) of its EXIF segments."""

    scan: int
    exif: tuple[tuple[int, int], ...]


def scan_jpeg(data: bytes) -> JpegHeader | None:
    """Return the header of an ordinary JPEG; None for anything else, including a JPEG with junk between segments."""
    frame: tuple[int, int, int] | None = None
    exif: list[tuple[int, int]] = []
    for marker, at, end in _segments(data):
        if marker in FRAME_MARKERS and end - at >= 10:
            frame = _dimensions(data.ljust(at + 10, b"\0"), at)
        elif marker == APP1 and data[at + 4 : at + 10] == b"Exif\0\0":
            exif.append((at, end))
        elif marker == START_OF_SCAN:
            whole = frame is not None and min(frame) > 0 and end < len(data)
            return JpegHeader(*frame, end, tuple(exif)) if whole and frame else None
    return None


def jpeg_orientation(data: bytes, header: JpegHeader) -> int | None:
    """Return the orientation of an ordinary JPEG; None if its EXIF segment is corrupt."""
    if not header.exif:
        return UPRIGHT
    start = header.exif[0][0]
    if data[start + 10 : start + 14] not in (b"II*\0", b"MM\0*"):
        return None
    try:
        with warnings.catch_warnings(), open_image(data) as image:
            warnings.simplefilter("error")
            exif = image.getexif()
            list(exif.items())
            exif.get_ifd(EXIF_TAG)
            return _noted(image)
    except Exception:  # any error of Pillow
        return None


def image_orientation(image: Image.Image) -> int:
    """Return the orientation of an opened image of any other kind. Raises Pillow's errors."""
    # Pillow itself turns a TIFF when it decodes.
    return UPRIGHT if image.format == "TIFF" else _noted(image)


def _noted(image: Image.Image) -> int:
    orientation = image.getexif().get(ORIENTATION_TAG)
    return orientation if orientation in TRANSPOSES else UPRIGHT


def upright(data: bytes) -> bytes:
    """Return an image file as viewers show it: a turned JPEG, or the same bytes if there is nothing to turn.

    A picture that has an orientation and cannot be decoded raises UndecodableImageError.
    """
    if (header := scan_jpeg(data)) is not None:
        orientation = jpeg_orientation(data, header) or UPRIGHT
    else:
        try:
            with warnings.catch_warnings(), open_image(data) as image:
                warnings.simplefilter("ignore")
                orientation = image_orientation(image)
        except Exception:  # any error of Pillow; the decoder will say what is wrong
            return data
    return data if orientation == UPRIGHT else upright_jpeg(data, orientation)


def upright_jpeg(data: bytes, orientation: int) -> bytes:
    """Return the image turned as its EXIF orientation asks, as a JPEG with its own subsampling, grey if it was.

    Raises UndecodableImageError.
    """
    with opened(data) as image:
        subsampling = JpegImagePlugin.get_sampling(image) if isinstance(image, JpegImagePlugin.JpegImageFile) else 0
        grey = image.mode == "L"
        pixels = to_rgb(image).transpose(TRANSPOSES[orientation])
        return to_jpeg(pixels.convert("L") if grey else pixels, CONVERT_QUALITY, max(subsampling, 0))


def to_jpeg(image: Image.Image, quality: int, subsampling: int = -1) -> bytes:
    """Return an image encoded by Pillow, by default with Pillow's subsampling. Raises UndecodableImageError."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    except OSError as error:  # a side of more than 65,500 pixels
        raise UndecodableImageError(f"no JPEG can hold {image.width} x {image.height} pixels") from error
    return buffer.getvalue()


def turned_by_default(classes: Sequence[str]) -> bool:
    """Return whether pictures of these classes are turned by default; published results on ImageNet are without it."""
    # Parquet files have the hub's names of ImageNet's classes.
    return not all(map(WNID.fullmatch, classes)) and classes[0] != "tench, Tinca tinca"
