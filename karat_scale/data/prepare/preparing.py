"""Convert a source's image file to its form in a shard: checks, the policy for odd files, and re-encoding."""

from dataclasses import dataclass
from typing import Literal

from karat_scale.data.decoders.decode import UndecodableImageError, decode_rgb
from karat_scale.data.decoders.orientation import CONVERT_QUALITY, to_jpeg, upright_jpeg
from karat_scale.data.prepare.images import (
    TURNS,
    Encoder,
    ImageFacts,
    decoding_failure,
    inspect_image,
    resized_jpeg,
    without_exif,
)
from karat_scale.data.prepare.sources import UnreadableSampleError
from karat_scale.foundation.errors import DataError

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
        try:
            facts = inspect_image(data, name)
        except UnreadableSampleError as error:
            self.check_left_out(name, error)
            raise
        failure = facts.undecodable
        if not failure and self.check == "decode" and self.resize is None:
            failure = decoding_failure(data)
        encoded = None
        if not failure:
            try:
                encoded = self._encoded(data, facts)
            except UndecodableImageError as error:
                failure = str(error)
        turned = encoded is not None and self._turns(facts)
        odd = _oddities(facts, turned, failure)
        if failure or (odd and self.on_odd in ("stop", "skip")):
            self._refuse(name, odd)
        if encoded is not None:
            done = _turn_of(facts) if turned else ""
            what = "; ".join(filter(None, (done, odd)))
            return Prepared(encoded, "jpg", facts.grey, what, "turned" if turned else "converted")
        if odd and self.on_odd == "convert":
            return _convert(data, facts, odd)
        return Prepared(data, facts.extension, facts.grey, odd)

    def check_left_out(self, name: str, error: UnreadableSampleError) -> None:
        """Raise DataError if the policy is to stop at an image that cannot be used."""
        if self.on_odd == "stop":
            raise DataError(f"{name}: {error}; remove it, or choose another --on-odd than stop") from error

    def _turns(self, facts: ImageFacts) -> bool:
        return self.exif == "turn" and facts.orientation in TURNS

    def _encoded(self, data: bytes, facts: ImageFacts) -> bytes | None:
        """Return the image resized or turned; None if it is neither. Raises UndecodableImageError."""
        orientation = facts.orientation if self._turns(facts) else None
        if self.resize is not None:
            return resized_jpeg(data, self.resize, self.quality, self.encoder, orientation)
        return None if orientation is None else upright_jpeg(data, orientation)

    def _refuse(self, name: str, odd: str) -> None:
        if self.on_odd == "stop":
            raise DataError(f"{name}: {odd}; choose --on-odd convert, keep or skip")
        raise OddImageSkippedError(odd)


def _oddities(facts: ImageFacts, turned: bool, failure: str) -> str:
    found = list(facts.odd)
    if facts.corrupt_exif:
        found.append("corrupt EXIF")
    if facts.orientation in TURNS and not turned:
        found.append(
            f"EXIF orientation {facts.orientation}: viewers show it {TURNS[facts.orientation]}, training does not"
        )
    return "; ".join([*found, failure] if failure else found)


def _turn_of(facts: ImageFacts) -> str:
    return f"{TURNS[facts.orientation]}, as its EXIF orientation {facts.orientation} asks"


def _convert(data: bytes, facts: ImageFacts, odd: str) -> Prepared:
    if not facts.odd:
        return Prepared(without_exif(data), facts.extension, facts.grey, odd, "converted")
    try:
        image = decode_rgb(data)
    except UndecodableImageError as error:
        raise OddImageSkippedError(f"{odd}; {error}") from error
    return Prepared(to_jpeg(image, CONVERT_QUALITY), "jpg", facts.grey, odd, "converted")
