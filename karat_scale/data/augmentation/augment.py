"""Training and evaluation transforms: what is drawn for a sample, which view of the image, what is done to it.

A training transform first draws what it will do, then does it. The record of draws is what two backends must
agree on. Every draw comes from the sample's own seed, through `random.Random`, whose stream Python keeps
stable.
"""

import math
import random

import numpy as np
import numpy.typing as npt
from PIL import Image
from torchvision.transforms import functional

from karat_scale.data.augmentation.draw import Draw
from karat_scale.data.augmentation.randaugment import RandAugment
from karat_scale.data.decoders.view import View, centre_view, crop_view
from karat_scale.recipe import AugmentConfig

JITTERS = {
    "brightness": functional.adjust_brightness,
    "contrast": functional.adjust_contrast,
    "saturation": functional.adjust_saturation,
}
CROP_TRIES, TENSORFLOW_CROP_TRIES = 10, 100
# Random erasing, arXiv 1708.04896 with timm's settings: share of the area, and height over width.
ERASE_AREA, ERASE_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


class TrainTransform:
    """Random resized crop, flip, RandAugment, colour jitter, erasing, in timm's order.

    Both RandAugment and jitter act when both are set, as the recipe says; timm itself lets RandAugment
    silence the jitter. Raises RecipeError for a RandAugment string timm cannot read.
    """

    def __init__(self, augment: AugmentConfig, image_size: int) -> None:
        self._augment = augment
        self._size = image_size
        self._only_flips = augment.workers_only_flip
        self._fixed_crop = augment.scale == (1.0, 1.0) and augment.ratio == (1.0, 1.0)
        self._randaugment = RandAugment(augment, image_size) if augment.randaugment else None
        self._mean = 255 * np.array(augment.mean, dtype=np.float32)
        self._std = 255 * np.array(augment.std, dtype=np.float32)

    def draw(self, seed: int, width: int, height: int) -> Draw:
        """What happens to a sample of this seed and these source dimensions in pixels."""
        rng = random.Random(seed)
        augment = self._augment
        box = self._draw_box(rng, width, height)
        flip = augment.hflip > 0 and rng.random() < augment.hflip
        ops = self._randaugment.draw(rng) if self._randaugment else ()
        jitter: list[tuple[str, float]] = []
        if augment.color_jitter > 0:
            low, high = max(0.0, 1 - augment.color_jitter), 1 + augment.color_jitter
            jitter = [(name, low + (high - low) * rng.random()) for name in JITTERS]
            ranks = [rng.random() for _ in jitter]
            jitter = [jitter[i] for i in sorted(range(len(jitter)), key=ranks.__getitem__)]
        erase = self._draw_erase(rng) if augment.erasing > 0 and rng.random() < augment.erasing else None
        return Draw(box, flip, ops, tuple(jitter), erase)

    def _draw_box(self, rng: random.Random, width: int, height: int) -> tuple[int, int, int, int]:
        # The method of the Inception paper as torchvision has it: ten tries, then the largest centred crop.
        augment = self._augment
        if augment.crop == "big_vision":
            return _draw_tensorflow_box(rng, width, height, augment.scale, augment.ratio)
        if not self._fixed_crop:
            for _ in range(CROP_TRIES):
                w, h = _draw_sides(rng, width * height, augment.scale, augment.ratio)
                if 0 < w <= width and 0 < h <= height:
                    return int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1)), w, h
        ratio = min(max(width / height, augment.ratio[0]), augment.ratio[1])
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        return (width - w) // 2, (height - h) // 2, w, h

    def _draw_erase(self, rng: random.Random) -> tuple[int, int, int, int, int] | None:
        size = self._size
        for _ in range(CROP_TRIES):
            w, h = _draw_sides(rng, size * size, ERASE_AREA, ERASE_RATIO)
            if 0 < w < size and 0 < h < size:
                left, top = int(rng.random() * (size - w + 1)), int(rng.random() * (size - h + 1))
                return left, top, w, h, rng.getrandbits(32)
        return None

    def view(self, draw: Draw) -> View:
        """The part of the image that the draw asks for."""
        return crop_view(draw.box, self._size)

    def finish(self, pixels: npt.NDArray[np.uint8], draw: Draw) -> npt.NDArray[np.uint8]:
        """Do to the view, uint8 [size, size, 3], what workers do of the draw; returns uint8 [3, size, size].

        The view is left as it is.
        """
        if draw.flip:
            pixels = pixels[:, ::-1]
        if not self._only_flips and (draw.ops or draw.jitter):
            image = Image.fromarray(np.ascontiguousarray(pixels))
            for operation in draw.ops:
                assert self._randaugment is not None
                image = self._randaugment.apply(image, operation)
            for name, factor in draw.jitter:
                image = JITTERS[name](image, factor)
            pixels = np.asarray(image)
        if not self._only_flips and draw.erase is not None:
            pixels = self._erased(pixels, draw.erase)
        planes: npt.NDArray[np.uint8] = pixels.transpose(2, 0, 1)
        return planes

    def _erased(self, pixels: npt.NDArray[np.uint8], erase: tuple[int, int, int, int, int]) -> npt.NDArray[np.uint8]:
        left, top, width, height, seed = erase
        # RandomState is the numpy generator whose stream is frozen for good.
        noise = np.random.RandomState(seed).standard_normal((height, width, 3)).astype(np.float32)
        erased: npt.NDArray[np.uint8] = pixels.copy()
        erased[top : top + height, left : left + width] = np.clip(noise * self._std + self._mean, 0, 255)
        return erased


class EvalTransform:
    """Resize the short side to image_size / eval_crop, then crop the centre."""

    def __init__(self, augment: AugmentConfig, image_size: int) -> None:
        self._size = image_size
        self._short_side = math.floor(image_size / augment.eval_crop)

    def view(self, width: int, height: int) -> View:
        """The part of an image of these dimensions that is evaluated."""
        return centre_view(width, height, self._short_side, self._size)


def _draw_sides(
    rng: random.Random, area: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int]:
    """Width and height of a box: a share of the area within `scale`, width over height within `ratio`."""
    share = area * (scale[0] + (scale[1] - scale[0]) * rng.random())
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = math.exp(low + (high - low) * rng.random())
    return round(math.sqrt(share * aspect)), round(math.sqrt(share / aspect))


def _draw_tensorflow_box(
    rng: random.Random, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw left, top, width and height as TensorFlow's sample_distorted_bounding_box does, which big_vision uses.

    Uniform are the aspect ratio, not its logarithm, and the height, not the area, so there are more small crops than in
    torchvision. The last column and the last row belong to no crop narrower or lower than the image. After 100 tries
    without a box, it is the whole image, of whatever ratio.
    """
    least, most = (share * width * height for share in scale)
    for _ in range(TENSORFLOW_CROP_TRIES):
        aspect = ratio[0] + (ratio[1] - ratio[0]) * rng.random()
        highest = min(height, round(math.sqrt(most / aspect)), int((width + 0.5 - 1e-7) / aspect))
        h = min(round(math.sqrt(least / aspect)), highest)
        h += int(rng.random() * (highest - h + 1))
        h += h * round(h * aspect) < least  # by rounding
        h -= h * round(h * aspect) > most
        w = round(h * aspect)
        if least <= w * h <= most and 0 < w <= width and 0 < h <= height:
            return int(rng.random() * (width - w)), int(rng.random() * (height - h)), w, h
    return 0, 0, width, height
