"""Images to smaller JPEGs: by the native recoder where it runs and the image is ordinary, else by Pillow."""

import functools
import io
from typing import Literal

from PIL import Image

from karat_scale.attention.kernels.build import LoadError
from karat_scale.data.decode import decode_rgb
from karat_scale.data.decoders.recoder import NativeRecoder, result_size
from karat_scale.errors import DataError

Encoder = Literal["native", "pillow"]
# A JPEG scaled while decoding stays this many times larger than its result, so that the rest is resized well.
DRAFT_MARGIN = 2


def choose_encoder(asked: Literal["auto", "native", "pillow"]) -> Encoder:
    """What re-encodes here. Call it before workers are forked. Raises DataError where native is asked for in vain."""
    if asked == "pillow":
        return "pillow"
    try:
        native_recoder()
    except LoadError as error:
        if asked == "native":
            fix = "run `apt-get install g++ libjpeg-dev`, or give --encoder pillow"
            raise DataError(f"--encoder native cannot run: {error}; {fix}") from error
        return "pillow"
    return "native"


@functools.cache
def native_recoder() -> NativeRecoder:
    """The recoder of this process. Raises LoadError where it cannot be built."""
    return NativeRecoder()


def resized_jpeg(data: bytes, short_side: int, quality: int, encoder: Encoder = "pillow") -> bytes:
    """The image as RGB JPEG with this short side, or its own where that is less. Raises UndecodableImageError."""
    if encoder == "native":
        encoded = native_recoder().shrink(data, short_side, quality, DRAFT_MARGIN)
        if encoded is not None:
            return encoded
    enough = DRAFT_MARGIN * short_side
    image = decode_rgb(data, at_least=(enough, enough))
    size = result_size(*image.size, short_side)
    return to_jpeg(image if size == image.size else image.resize(size, Image.Resampling.BICUBIC), quality)


def to_jpeg(image: Image.Image, quality: int) -> bytes:
    """Pillow's encoding."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
