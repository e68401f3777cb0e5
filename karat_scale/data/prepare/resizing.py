"""Shrink images to JPEGs: with the native recoder if it runs and the image is ordinary, else with Pillow."""

import functools
from typing import Literal

from PIL import Image

from karat_scale.data.decoders.decode import decode_rgb
from karat_scale.data.decoders.orientation import TRANSPOSES, to_jpeg
from karat_scale.data.decoders.recoder import NativeRecoder, result_size
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.native_build import PACKAGES, LoadError

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
