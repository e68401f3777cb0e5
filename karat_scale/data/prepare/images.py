"""Convert a source's image file to its form in a shard: checks, the policy for odd files, and re-encoding.

The header shows what is unusual about a file: the reasons why decoders disagree or fail. The native recoder shrinks
ordinary images if it runs; Pillow shrinks the others.
"""

import functools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from PIL import Image

from karat_scale.data.decoders.decode import UndecodableImageError, decode_rgb, opened, result_size
from karat_scale.data.decoders.jpeg_header import (
    CONVERT_QUALITY,
    TRANSPOSES,
    UPRIGHT,
    image_orientation,
    jpeg_orientation,
    scan_jpeg,
    to_jpeg,
    upright_jpeg,
)
from karat_scale.data.prepare.sources.base import UnreadableSampleError
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.native_build import PACKAGES, LoadError
from karat_scale.recipe import DataConfig

if TYPE_CHECKING:
    from karat_scale.data.decoders.native import NativeRecoder

# The same as Pillow's limit against decompression bombs.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
# A recipe's limit, unless it says another.
_MOST_IN_TRAINING: int = DataConfig.model_fields["max_pixels"].default
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

    orientation: the EXIF orientation, above 1 if viewers turn or mirror the picture; corrupt_exif: whether no
    orientation can be read; odd: other oddities; undecodable: why it has no complete pixels.
    """

    extension: str
    pixels: int
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
        pixels=header.width * header.height,
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
        with warnings.catch_warnings(), opened(data) as image:
            warnings.simplefilter("ignore")
            size, kind, mode, corrupt_exif = image.size, image.format, image.mode, False
            try:
                orientation = image_orientation(image)
            except Exception:  # a damaged block makes Pillow raise nearly any error
                orientation, corrupt_exif = UPRIGHT, True
    except (MemoryError, UndecodableImageError) as error:  # a damaged header may ask for any memory
        raise UnreadableSampleError(str(error) or "out of memory") from error
    if min(size) < 1 or kind is None:
        raise UnreadableSampleError("the image has no pixels")
    odd = ["CMYK"] if mode == "CMYK" else []
    extension = EXTENSIONS.get(kind, kind.lower())
    if extension == "jpg":
        odd.append("junk in the header")
    elif name.lower().endswith(JPEG_ENDINGS):
        odd.append(f"{kind} named JPEG")
    grey = mode in ("1", "L", "LA", "I", "I;16")
    undecodable = decoding_failure(data) if odd else ""
    return ImageFacts(extension, size[0] * size[1], grey, orientation, corrupt_exif, tuple(odd), undecodable)


Encoder = Literal["native", "pillow"]
# A JPEG that is scaled while decoding stays larger than its result by this factor, so that the resize is good.
DRAFT_MARGIN = 2


@functools.cache
def native_recoder() -> "NativeRecoder":
    """Return this process's recoder. Raises LoadError if it cannot be compiled."""
    from karat_scale.data.decoders.native import NativeRecoder  # imports torch, which nothing else here needs

    return NativeRecoder()


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


def resized_jpeg(
    data: bytes, short_side: int, quality: int, encoder: Encoder = "pillow", orientation: int | None = None
) -> bytes:
    """Return the image as RGB JPEG with at most this short side. Raises UndecodableImageError.

    orientation: the EXIF orientation by which to turn the image, which the native recoder cannot do.
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


Check = Literal["header", "decode"]
OnOdd = Literal["convert", "keep", "skip", "stop"]
Exif = Literal["turn", "keep"]
DEFAULT_QUALITY = 90


@dataclass(frozen=True)
class Prepared:
    """An image in a shard. `odd` is empty for an ordinary one; else `done` is what was done with it."""

    data: bytes
    extension: str
    grey: bool
    odd: str = ""
    done: Literal["kept", "converted", "turned"] = "kept"


class OddImageSkippedError(UnreadableSampleError):
    """An odd image that the policy skips; the message is what is odd."""


@dataclass(frozen=True)
class Preparation:
    """The processing of images.

    check: read only headers, or decode everything. exif: `turn` stores a picture with an EXIF orientation upright, as
    viewers show it; `keep` makes it an odd image. on_odd: what to do with images that are CMYK, in another format than
    their name says, with corrupt EXIF, or junk in the header. `convert` makes RGB JPEGs, and removes an EXIF block
    without changing the pixels, so that every decoder sees what torchvision's ImageFolder sees. `keep` keeps the
    bytes, `skip` leaves the image out, `stop` ends the run. An image that cannot be decoded, such as a truncated one,
    would stop a training: all but `stop` leave it out. resize, quality: re-encode every image as RGB JPEG with at most
    this short side in pixels. encoder: the encoder for that.
    """

    check: Check = "header"
    on_odd: OnOdd = "keep"
    resize: int | None = None
    quality: int = DEFAULT_QUALITY
    encoder: Encoder = "pillow"
    exif: Exif = "turn"

    def prepare(self, data: bytes, name: str) -> Prepared:
        """Return the image to store. Raises UnreadableSampleError to leave it out, DataError to stop."""
        facts = inspect_image(data, name)
        failure, encoded = facts.undecodable, b""
        orientation = facts.orientation if self.exif == "turn" and facts.orientation in TURNS else None
        if not failure and self.check == "decode" and self.resize is None:
            failure = decoding_failure(data)
        if not failure:
            try:
                if self.resize is not None:
                    encoded = resized_jpeg(data, self.resize, self.quality, self.encoder, orientation)
                elif orientation is not None:
                    encoded = upright_jpeg(data, orientation)
            except UndecodableImageError as error:
                failure = str(error)
        turned = bool(encoded) and orientation is not None
        found = [*facts.odd, "corrupt EXIF"] if facts.corrupt_exif else [*facts.odd]
        if facts.orientation in TURNS and not turned:
            shown = f"viewers show it {TURNS[facts.orientation]}, training does not"
            found.append(f"EXIF orientation {facts.orientation}: {shown}")
        convertible = odd = "; ".join(filter(None, (*found, failure)))
        if self.resize is None and facts.pixels > _MOST_IN_TRAINING:
            large = f"{facts.pixels:,} pixels, at which training stops unless data.max_pixels is higher"
            odd = "; ".join(filter(None, (convertible, large)))
        if odd and self.on_odd == "stop":
            raise DataError(f"{name}: {odd}; choose --on-odd convert, keep or skip")
        if failure or (odd and self.on_odd == "skip"):
            raise OddImageSkippedError(odd)
        if encoded:
            done = f"{TURNS[facts.orientation]}, as its EXIF orientation {facts.orientation} asks" if turned else ""
            what = "; ".join(filter(None, (done, odd)))
            return Prepared(encoded, "jpg", facts.grey, what, "turned" if turned else "converted")
        if convertible and self.on_odd == "convert":
            if not facts.odd:
                bare = without_exif(data)  # of a JPEG; other kinds keep theirs
                return Prepared(bare, facts.extension, facts.grey, odd, "kept" if bare == data else "converted")
            try:
                encoded = to_jpeg(decode_rgb(data), CONVERT_QUALITY)
            except UndecodableImageError as error:
                raise OddImageSkippedError(f"{odd}; {error}") from error
            return Prepared(encoded, "jpg", facts.grey, odd, "converted")
        return Prepared(data, facts.extension, facts.grey, odd)
