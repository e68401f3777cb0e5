"""Resize a decoded region, equally for every decoder that returns whole pixels."""

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional

from karat_scale.data.decoders.pillow import RESAMPLE
from karat_scale.data.view import View


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
