"""The part of an image that a decoder returns, and its size."""

import math
from dataclasses import dataclass

# Pixels on either side that a bicubic filter for downscaling may use, per step of the output.
FILTER_REACH = 2


@dataclass(frozen=True)
class View:
    """A box of an image, resized.

    box: left, top, right, bottom in source pixels, resized to `size` (width, height). region: the whole pixels the
    filter may use, as integers; for a crop that is resized by itself, it is the box.
    """

    region: tuple[int, int, int, int]
    box: tuple[float, float, float, float]
    size: tuple[int, int]

    @property
    def box_in_region(self) -> tuple[float, float, float, float]:
        """The box relative to the region's corner."""
        left, top = self.region[:2]
        return self.box[0] - left, self.box[1] - top, self.box[2] - left, self.box[3] - top


def crop_view(box: tuple[int, int, int, int], size: int) -> View:
    """Return a crop (left, top, width, height) resized to size x size, as cropping and then resizing does."""
    left, top, width, height = box
    edges = (left, top, left + width, top + height)
    return View(edges, edges, (size, size))


def centre_view(width: int, height: int, short_side: int, size: int) -> View:
    """Return the centre size x size of the image resized to this short side, as torchvision resizes and crops.

    The resized image is never smaller than the crop, since short_side >= size.
    """
    scaled_width, scaled_height = short_side, short_side
    if width < height:
        scaled_height = int(short_side * height / width)
    else:
        scaled_width = int(short_side * width / height)
    left, right, first, last = _centre(width, scaled_width, size)
    top, bottom, highest, lowest = _centre(height, scaled_height, size)
    return View((first, highest, last, lowest), (left, top, right, bottom), (size, size))


def _centre(length: int, scaled: int, size: int) -> tuple[float, float, int, int]:
    """Along one axis: the box's ends, and those of the pixels that the filter uses."""
    step = length / scaled
    start = round((scaled - size) / 2.0)
    low, high = start * step, (start + size) * step
    reach = FILTER_REACH * max(step, 1.0) + 1
    return low, high, max(0, math.floor(low - reach)), min(length, math.ceil(high + reach))
