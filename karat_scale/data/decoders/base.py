"""The interface of all decoders: the pixels of a view of an encoded image."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from karat_scale.data.decoders.decode import UndecodableImageError
from karat_scale.data.decoders.view import View

ChooseView = Callable[[int, int], View]


class Decoder(Protocol):
    """Decodes the pixels of a part of an encoded image. Used by one thread at a time."""

    @property
    def name(self) -> str:
        """Its name in `data.decoder`."""

    def read(self, data: bytes, choose: ChooseView) -> npt.NDArray[np.uint8]:
        """Return the view that `choose(width, height)` asks for, uint8 [height, width, 3], RGB.

        Raises UndecodableImageError for damaged bytes and for more pixels than `data.max_pixels`.
        """


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse an image of more than `max_pixels`. Raises UndecodableImageError."""
    if width * height > max_pixels:
        raise UndecodableImageError(f"it has {width} x {height} pixels, more than data.max_pixels = {max_pixels}")
