"""Convert a source's image file to its form in a shard: checks, the policy for odd files, and re-encoding."""

from dataclasses import dataclass
from typing import Literal

from odd_images import ImageFacts, decoding_failure, inspect_image, without_exif
from resizing import Encoder, resized_jpeg, to_jpeg
from sources import UnreadableSampleError

from karat_scale.data.decode import UndecodableImageError, decode_rgb
from karat_scale.errors import DataError

Check = Literal["header", "decode"]
OnOdd = Literal["convert", "keep", "skip", "stop"]
DEFAULT_QUALITY = 90
# Odd files are few, so their pixels may take some bytes.
CONVERT_QUALITY = 95


@dataclass(frozen=True)
class Prepared:
    """An image in a shard. `odd` is empty for an ordinary one; else `done` is what was done with it."""

    data: bytes
    extension: str
    grey: bool
    odd: str = ""
    done: Literal["kept", "converted"] = "kept"


class OddImageSkippedError(UnreadableSampleError):
    """An odd image that the policy skips; the message is what is odd."""


@dataclass(frozen=True)
class Preparation:
    """The processing of images.

    check: read only headers, or decode everything. on_odd: what to do with images that are CMYK, in another
    format than their name says, rotated by EXIF, with corrupt EXIF, junk in the header, or truncated. `convert` makes
    RGB JPEGs, and removes an EXIF block without changing the pixels, so that every decoder sees what torchvision's
    ImageFolder sees; an image that cannot be decoded is skipped. `keep` keeps the bytes, `skip` leaves the image out,
    `stop` ends the run. resize, quality: re-encode every image as RGB JPEG with at most this short side in pixels.
    encoder: the encoder for that.
    """

    check: Check = "header"
    on_odd: OnOdd = "keep"
    resize: int | None = None
    quality: int = DEFAULT_QUALITY
    encoder: Encoder = "pillow"

    def prepare(self, data: bytes, name: str) -> Prepared:
        """Return the image to store. Raises UnreadableSampleError to leave it out, DataError to stop."""
        try:
            facts = inspect_image(data, name)
        except UnreadableSampleError as error:
            if self.on_odd == "stop":
                raise DataError(f"{name}: {error}; remove it, or choose another --on-odd than stop") from error
            raise
        failure = facts.undecodable
        if not failure and self.check == "decode" and self.resize is None:
            failure = decoding_failure(data)
        if not failure and self.resize is not None:
            try:
                pixels = resized_jpeg(data, self.resize, self.quality, self.encoder)
            except UndecodableImageError as error:
                failure = str(error)
        odd = "; ".join([*facts.odd, *facts.exif_odd, *([failure] if failure else [])])
        if odd and self.on_odd in ("stop", "skip"):
            self._refuse(name, odd)
        if self.resize is not None:
            if failure:
                raise OddImageSkippedError(odd)
            return Prepared(pixels, "jpg", facts.grey, odd, "converted")
        if odd and self.on_odd == "convert":
            return _convert(data, facts, failure, odd)
        return Prepared(data, facts.extension, facts.grey, odd)

    def _refuse(self, name: str, odd: str) -> None:
        if self.on_odd == "stop":
            raise DataError(f"{name}: {odd}; choose --on-odd convert, keep or skip")
        raise OddImageSkippedError(odd)


def _convert(data: bytes, facts: ImageFacts, failure: str, odd: str) -> Prepared:
    if failure:
        raise OddImageSkippedError(odd)
    if not facts.odd:
        return Prepared(without_exif(data), facts.extension, facts.grey, odd, "converted")
    try:
        image = decode_rgb(data)
    except UndecodableImageError as error:
        raise OddImageSkippedError(f"{odd}; {error}") from error
    return Prepared(to_jpeg(image, CONVERT_QUALITY), "jpg", facts.grey, odd, "converted")
