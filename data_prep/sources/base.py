"""What a source of images offers to the scripts that write shards, betons or indexes."""

import io
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from karat_scale.data.decode import undecodable_reason
from karat_scale.data.shard_writer import EncodedSample

# The second image in these files is no second sample.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg"}


class UnreadableSampleError(Exception):
    """A source image that cannot be used; the message is the reason."""


class Source(Protocol):
    """One split of a source, in a fixed order. Samples that can be told to be no image beforehand are in `skipped`."""

    classes: list[str]
    skipped: list[tuple[str, str]]

    def __len__(self) -> int: ...

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Bytes of each sample, or about that."""

    def name(self, index: int) -> str:
        """Where sample `index` is in the source, for reports."""

    def read(self, index: int) -> EncodedSample:
        """Sample `index`. Raises UnreadableSampleError."""

    def fingerprint(self) -> str:
        """A hash that changes when the source does."""


def image_extension(data: bytes) -> str:
    """The ending for an image by its content: jpg, png, ... Raises UnreadableSampleError for a broken header."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if min(image.size) < 1 or image.format is None:
                raise UnreadableSampleError("the image has no pixels")
            return EXTENSIONS.get(image.format, image.format.lower())
    except UnreadableSampleError:
        raise
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise UnreadableSampleError(undecodable_reason(error)) from error
