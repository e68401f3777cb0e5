"""Decode and resize with Pillow, as ImageFolder does. Its pixels are the reference for the other decoders."""

import numpy as np
import numpy.typing as npt
from PIL import Image

from karat_scale.data.decode import opened, to_rgb
from karat_scale.data.decoders.base import ChooseView, check_pixels
from karat_scale.data.view import View

RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class PillowDecoder:
    """Reads every format that Pillow reads. See Decoder."""

    name = "pillow"

    def __init__(self, interpolation: str, max_pixels: int) -> None:
        self._resample = RESAMPLE[interpolation]
        self._max_pixels = max_pixels

    def read(self, data: bytes, choose: ChooseView) -> npt.NDArray[np.uint8]:
        with opened(data) as image:
            check_pixels(*image.size, self._max_pixels)
            view = choose(*image.size)
            return np.asarray(resized(to_rgb(image), view, self._resample))


def resized(image: Image.Image, view: View, resample: Image.Resampling) -> Image.Image:
    """Return the view of a whole image."""
    if view.region != (0, 0, *image.size):
        image = image.crop(view.region)
    if view.box_in_region == (0, 0, *image.size) and image.size == view.size:
        return image
    return image.resize(view.size, resample, box=view.box_in_region)
