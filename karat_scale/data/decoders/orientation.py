"""EXIF orientation: how viewers turn a stored picture, and its file as a JPEG that is upright without EXIF."""

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, JpegImagePlugin

from karat_scale.data.decoders.decode import open_image, opened, to_rgb

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
# Start of frame: every marker from C0 to CF except DHT, JPG and DAC.
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
START_OF_SCAN, APP1 = 0xDA, 0xE1
LONE_MARKERS = frozenset(range(0xD0, 0xD8)) | {0x01}
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class JpegHeader:
    """A JPEG's frame, the start of its pixels, and the (start, end) of its EXIF segments."""

    width: int
    height: int
    components: int
    scan: int
    exif: tuple[tuple[int, int], ...]


def scan_jpeg(data: bytes) -> JpegHeader | None:
    """Return the header of an ordinary JPEG; None for anything else, including a JPEG with junk between segments."""
    if data[:2] != b"\xff\xd8":
        return None
    frame: tuple[int, int, int] | None = None
    exif: list[tuple[int, int]] = []
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF or marker in LONE_MARKERS:
            position += 1 if marker == 0xFF else 2
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker in FRAME_MARKERS and end - position >= 10:
            height, width = (int.from_bytes(data[position + at : position + at + 2], "big") for at in (5, 7))
            frame = (width, height, data[position + 9])
        elif marker == APP1 and data[position + 4 : position + 10] == b"Exif\0\0":
            exif.append((position, end))
        elif marker == START_OF_SCAN:
            whole = frame is not None and min(frame) > 0 and end < len(data)
            return JpegHeader(*frame, end, tuple(exif)) if whole and frame else None
        position = end
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
    orientation = _orientation_of(data)
    return data if orientation == UPRIGHT else upright_jpeg(data, orientation)


def _orientation_of(data: bytes) -> int:
    if (header := scan_jpeg(data)) is not None:
        return jpeg_orientation(data, header) or UPRIGHT
    try:
        with warnings.catch_warnings(), open_image(data) as image:
            warnings.simplefilter("ignore")
            return image_orientation(image)
    except Exception:  # any error of Pillow; the decoder will say what is wrong
        return UPRIGHT


def upright_jpeg(data: bytes, orientation: int) -> bytes:
    """Return the image turned as its EXIF orientation asks, as a JPEG with its own subsampling, grey if it is.

    Raises UndecodableImageError.
    """
    with opened(data) as image:
        subsampling = JpegImagePlugin.get_sampling(image) if isinstance(image, JpegImagePlugin.JpegImageFile) else 0
        grey = image.mode == "L"
        pixels = to_rgb(image).transpose(TRANSPOSES[orientation])
        return to_jpeg(pixels.convert("L") if grey else pixels, CONVERT_QUALITY, max(subsampling, 0))


def to_jpeg(image: Image.Image, quality: int, subsampling: int = -1) -> bytes:
    """Encode with Pillow, by default with its own subsampling."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


def turned_by_default(classes: Sequence[str]) -> bool:
    """Return whether pictures of these classes are turned unless the user says; results on ImageNet are without it."""
    # Parquet files have the hub's names of ImageNet's classes.
    return not all(map(_WNID.fullmatch, classes)) and classes[0] != "tench, Tinca tinca"
