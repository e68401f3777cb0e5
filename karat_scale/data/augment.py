"""Training and evaluation transforms: RGB image to uint8 [3, H, W].

A training transform first draws what it will do, then does it. The record of draws is what two backends must
agree on. Every draw comes from the sample's own seed, through `random.Random`, whose stream Python keeps
stable.
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from timm.data.auto_augment import AugmentOp, rand_augment_transform
from torchvision.transforms import functional

from karat_scale.errors import RecipeError
from karat_scale.recipe import AugmentConfig

RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
INTERPOLATION = {
    "bilinear": functional.InterpolationMode.BILINEAR,
    "bicubic": functional.InterpolationMode.BICUBIC,
}
JITTERS = {
    "brightness": functional.adjust_brightness,
    "contrast": functional.adjust_contrast,
    "saturation": functional.adjust_saturation,
}


@dataclass(frozen=True)
class Draw:
    """What one sample's augmentation does.

    box: left, top, width, height in source pixels. ops: RandAugment operations by name; each then decides by
    `op_seed` whether and how strongly it acts. jitter: (name, factor) in the order applied.
    """

    box: tuple[int, int, int, int]
    flip: bool
    ops: tuple[str, ...]
    op_seed: int
    jitter: tuple[tuple[str, float], ...]


class TrainTransform:
    """Random resized crop, flip, RandAugment, colour jitter, in timm's order.

    Both RandAugment and jitter act when both are set, as the recipe says; timm itself lets RandAugment
    silence the jitter. Raises RecipeError for a RandAugment string timm cannot read.
    """

    def __init__(self, augment: AugmentConfig, image_size: int) -> None:
        self._augment = augment
        self._size = (image_size, image_size)
        self._resample = RESAMPLE[augment.interpolation]
        self._fixed_crop = augment.scale == (1.0, 1.0) and augment.ratio == (1.0, 1.0)
        self._log_ratio = (math.log(augment.ratio[0]), math.log(augment.ratio[1]))
        self._num_ops = 0
        self._ops: dict[str, AugmentOp] = {}
        self._op_weights: list[float] | None = None
        if augment.randaugment:
            self._read_randaugment(image_size)

    def _read_randaugment(self, image_size: int) -> None:
        augment = self._augment
        hparams = {
            "translate_const": int(image_size * 0.45),
            "img_mean": tuple(min(255, round(255 * value)) for value in augment.mean),
            "interpolation": self._resample,
        }
        try:
            policy = rand_augment_transform(augment.randaugment, hparams)
        except (AssertionError, ValueError, KeyError) as error:
            raise RecipeError(
                f"augment.randaugment = {augment.randaugment!r} is not a policy timm reads; "
                "use one such as rand-m9-mstd0.5-inc1, or an empty string"
            ) from error
        for op in policy.ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize
        self._num_ops = policy.num_layers
        self._ops = {op.name: op for op in policy.ops}
        self._op_weights = None if policy.choice_weights is None else list(policy.choice_weights)

    def draw(self, seed: int, width: int, height: int) -> Draw:
        """What happens to a sample of this seed and these source dimensions in pixels."""
        rng = random.Random(seed)
        augment = self._augment
        box = self._draw_box(rng, width, height)
        flip = augment.hflip > 0 and rng.random() < augment.hflip
        ops: tuple[str, ...] = ()
        op_seed = 0
        if self._ops:
            op_seed = rng.getrandbits(64)
            ops = self._draw_ops(rng)
        jitter: list[tuple[str, float]] = []
        if augment.color_jitter > 0:
            low, high = max(0.0, 1 - augment.color_jitter), 1 + augment.color_jitter
            jitter = [(name, low + (high - low) * rng.random()) for name in JITTERS]
            ranks = [rng.random() for _ in jitter]
            jitter = [jitter[i] for i in sorted(range(len(jitter)), key=ranks.__getitem__)]
        return Draw(box, flip, ops, op_seed, tuple(jitter))

    def _draw_box(self, rng: random.Random, width: int, height: int) -> tuple[int, int, int, int]:
        # The method of the Inception paper as torchvision has it: ten tries, then the largest centred crop.
        low, high = self._augment.scale
        if not self._fixed_crop:
            for _ in range(10):
                area = width * height * (low + (high - low) * rng.random())
                ratio = math.exp(self._log_ratio[0] + (self._log_ratio[1] - self._log_ratio[0]) * rng.random())
                w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
                if 0 < w <= width and 0 < h <= height:
                    return int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1)), w, h
        ratio = min(max(width / height, self._augment.ratio[0]), self._augment.ratio[1])
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        return (width - w) // 2, (height - h) // 2, w, h

    def _draw_ops(self, rng: random.Random) -> tuple[str, ...]:
        # timm's own choice uses numpy's global generator; a weighted choice never takes an operation twice.
        names = list(self._ops)
        if self._op_weights is None:
            return tuple(names[int(rng.random() * len(names))] for _ in range(self._num_ops))
        keys = [rng.random() ** (1 / w) if w > 0 else -1.0 for w in self._op_weights]
        best = sorted(range(len(names)), key=keys.__getitem__, reverse=True)[: self._num_ops]
        return tuple(names[i] for i in best)

    def apply(self, image: Image.Image, draw: Draw) -> npt.NDArray[np.uint8]:
        """Do what was drawn to an RGB image; returns uint8 [3, size, size]."""
        left, top, width, height = draw.box
        if (width, height) != image.size:
            image = image.crop((left, top, left + width, top + height))
        if image.size != self._size:
            image = image.resize(self._size, self._resample)
        if draw.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if draw.ops:
            with seeded_global_random(draw.op_seed):
                for name in draw.ops:
                    image = self._ops[name](image)
        for name, factor in draw.jitter:
            image = JITTERS[name](image, factor)
        return to_channels_first(image)

    def __call__(self, image: Image.Image, seed: int) -> npt.NDArray[np.uint8]:
        return self.apply(image, self.draw(seed, *image.size))


class EvalTransform:
    """Resize the short side to image_size / eval_crop, then crop the centre; uint8 [3, size, size]."""

    def __init__(self, augment: AugmentConfig, image_size: int) -> None:
        self._size = image_size
        self._short_side = math.floor(image_size / augment.eval_crop)
        self._interpolation = INTERPOLATION[augment.interpolation]

    def __call__(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        if min(image.size) != self._short_side:
            image = functional.resize(image, self._short_side, self._interpolation)
        if image.size != (self._size, self._size):
            image = functional.center_crop(image, [self._size, self._size])
        return to_channels_first(image)


def to_channels_first(image: Image.Image) -> npt.NDArray[np.uint8]:
    """An RGB image as a view, uint8 [3, height, width]."""
    return np.asarray(image).transpose(2, 0, 1)


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    # At full magnitude timm keeps no bits. Pillow 13 refuses that; before, the image came out black.
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, bits_to_keep)


@contextmanager
def seeded_global_random(seed: int) -> Iterator[None]:
    """Python's global generator under `seed`, put back afterwards: timm's operations draw from it."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
