"""Large-scale jitter (Ghiasi et al., arXiv 2012.07177), as in ViTDet: drawn first, then applied in one resize."""

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from karat_scale.training.tasks.detection.recipe import JitterConfig

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Jitter:
    """The jitter of one sample: `box` (left, top, right, bottom) of the image becomes `size` (width, height)."""

    box: Box
    size: tuple[int, int]
    flip: bool


def draw_jitter(seed: int, width: int, height: int, image_size: int, config: JitterConfig) -> Jitter:
    """Draw a scale, relative to that at which the longer side fits `image_size`, a place for the crop, and a flip.

    The result has sides of at most `image_size`.
    """
    rng = random.Random(seed)
    scale = rng.uniform(*config.scale) * image_size / max(width, height)
    size = [min(max(round(side * scale), 1), image_size) for side in (width, height)]
    taken = [min(part / scale, side) for part, side in zip(size, (width, height), strict=True)]
    left, top = ((side - part) * rng.random() for part, side in zip(taken, (width, height), strict=True))
    return Jitter((left, top, left + taken[0], top + taken[1]), (size[0], size[1]), rng.random() < config.hflip)


def jitter_image(image: Image.Image, jitter: Jitter) -> npt.NDArray[np.uint8]:
    """Return the pixels [3, h, w] of an image, jittered; bilinear, averaged when it shrinks."""
    pixels = np.asarray(image.resize(jitter.size, Image.Resampling.BILINEAR, box=jitter.box))
    return np.ascontiguousarray(_flipped(pixels, jitter, axis=1).transpose(2, 0, 1))


def jitter_masks(masks: npt.NDArray[np.uint8], jitter: Jitter) -> npt.NDArray[np.uint8]:
    """Return masks [n, H, W] as [n, h, w], jittered like their image, with the nearest pixel."""
    width, height = jitter.size
    resized = [
        np.asarray(Image.fromarray(mask).resize(jitter.size, Image.Resampling.NEAREST, box=jitter.box))
        for mask in masks
    ]
    return _flipped(np.stack(resized) if resized else np.zeros((0, height, width), np.uint8), jitter, axis=2)


def boxes_of(masks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return the tight boxes [n, 4] (left, top, right, bottom) of masks [n, h, w], none of them empty."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def _flipped(array: npt.NDArray[np.uint8], jitter: Jitter, axis: int) -> npt.NDArray[np.uint8]:
    return np.flip(array, axis).copy() if jitter.flip else array
