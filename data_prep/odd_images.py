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
UPRIGHT = 1
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

    orientation: EXIF's, from 2 if viewers turn or mirror the picture; corrupt_exif: no orientation can be read;
    odd: other oddities; undecodable: why it has no complete pixels.
    """

    extension: str
    grey: bool = False
    orientation: int = UPRIGHT
    corrupt_exif: bool = False
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
    orientation = _jpeg_orientation(data, header.exif[0]) if header.exif else UPRIGHT
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
            # Pillow itself turns a TIFF when it decodes.
            orientation = UPRIGHT if kind == "TIFF" else _orientation(image)
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


def _jpeg_orientation(data: bytes, segment: tuple[int, int]) -> int | None:
    """Return the orientation of an EXIF segment; None if the segment is corrupt."""
    if data[segment[0] + 10 : segment[0] + 14] not in (b"II*\0", b"MM\0*"):
        return None
    try:
        with warnings.catch_warnings(), open_image(data) as image:
            warnings.simplefilter("error")
            exif = image.getexif()
            list(exif.items())
            exif.get_ifd(EXIF_TAG)
            return _orientation(image)
    except Exception:  # any error of Pillow
        return None


def _orientation(image: Image.Image) -> int:
    orientation = image.getexif().get(ORIENTATION_TAG)
    return orientation if orientation in TURNS else UPRIGHT
