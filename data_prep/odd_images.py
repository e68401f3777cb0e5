"""Find what is unusual about an image file, from its header: the reasons why decoders disagree or fail."""

import warnings
from dataclasses import dataclass

from PIL import Image
from sources.base import UnreadableSampleError

from karat_scale.data.decode import UndecodableImageError, decode_rgb, open_image, undecodable_reason

# The same as Pillow's limit against decompression bombs.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
# The second image in these files is not a second sample.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg"}
JPEG_ENDINGS = (".jpg", ".jpeg", ".jpe")
ORIENTATION_TAG, EXIF_TAG = 0x0112, 0x8769
# Start of frame: every marker from C0 to CF except DHT, JPG and DAC.
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
START_OF_SCAN, APP1 = 0xDA, 0xE1
LONE_MARKERS = frozenset(range(0xD0, 0xD8)) | {0x01}
END_OF_IMAGE = b"\xff\xd9"


@dataclass(frozen=True)
class JpegHeader:
    """A JPEG's frame, the start of its pixels, and the (start, end) of its EXIF segments."""

    width: int
    height: int
    components: int
    scan: int
    exif: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ImageFacts:
    """An image file's suffix by content, and what is odd about it.

    exif_odd: oddities that disappear with the EXIF segments; odd: others; undecodable: why it has no complete pixels.
    """

    extension: str
    grey: bool = False
    exif_odd: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()
    undecodable: str = ""


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
    return ImageFacts(
        extension="jpg",
        grey=header.components == 1,
        exif_odd=_exif_oddities(data, header.exif[0]) if header.exif else (),
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
    return ImageFacts(extension, grey, odd=tuple(odd), undecodable=decoding_failure(data) if odd else "")


def _exif_oddities(data: bytes, segment: tuple[int, int]) -> tuple[str, ...]:
    if data[segment[0] + 10 : segment[0] + 14] not in (b"II*\0", b"MM\0*"):
        return ("corrupt EXIF",)
    try:
        with warnings.catch_warnings(), open_image(data) as image:
            warnings.simplefilter("error")
            exif = image.getexif()
            list(exif.items())
            exif.get_ifd(EXIF_TAG)
            orientation = exif.get(ORIENTATION_TAG, 1)
    except Exception:  # any error of Pillow
        return ("corrupt EXIF",)
    return (f"EXIF orientation {orientation}",) if orientation in range(2, 9) else ()
