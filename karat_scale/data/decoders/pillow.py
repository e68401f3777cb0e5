"""Decode and resize with Pillow, as ImageFolder does. Its pixels are the reference for the other decoders.

Also the resize of a decoded region, which is the same for every decoder that returns whole pixels.
"""

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional

from karat_scale.data.decoders.base import ChooseView, check_pixels
from karat_scale.data.decoders.decode import opened, to_rgb
from karat_scale.data.decoders.view import View

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


def resize_region(region: npt.NDArray[np.uint8], view: View, interpolation: str) -> npt.NDArray[np.uint8]:
    """Return the view, uint8 [height, width, 3], from its region, uint8 [h, w, 3]; antialiased.

    It uses torch in uint8 for a whole region, and Pillow if the box's ends are within pixels, which torch cannot do.
    """
    width, height = view.size
    if view.box == view.region:
        planes = torch.from_numpy(region).permute(2, 0, 1)[None]
        small = functional.interpolate(planes, (height, width), mode=interpolation, antialias=True)
        result: npt.NDArray[np.uint8] = small[0].permute(1, 2, 0).numpy()
        return result
    image = Image.fromarray(region)
    return np.asarray(image.resize(view.size, RESAMPLE[interpolation], box=view.box_in_region))
