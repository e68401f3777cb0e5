"""RandAugment, colour jitter and erasing of a whole batch on its device, from the draws that came with it.

What a sample gets is drawn with its crop, so it is what the workers would do to it, to within a grey level here and
there: each operation is done to all images at once that get it at the same turn. The noise of erased boxes alone is
the device's own.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest

import torch

from karat_scale.data.augmentation.device_ops import BATCHED, MATRICES, Matrix, transformed
from karat_scale.data.augmentation.draw import Draw, Operation
from karat_scale.data.augmentation.randaugment import RandAugment
from karat_scale.errors import RecipeError
from karat_scale.recipe import AugmentConfig

JITTERS = {"brightness": "Brightness", "contrast": "Contrast", "saturation": "Color"}


class DeviceAugment:
    """Does what `augment.run_on = device` leaves to it; nothing where that is `workers`.

    Raises RecipeError for an operation that only Pillow does.
    """

    def __init__(self, augment: AugmentConfig, image_size: int) -> None:
        self._active = augment.run_on == "device"
        self._cubic = augment.interpolation == "bicubic"
        self._mean, self._std = augment.mean, augment.std
        policy = RandAugment(augment, image_size) if augment.randaugment else None
        self._fill = policy.fill if policy else (0, 0, 0)
        if self._active and policy and (lacking := [n for n in policy.names if n not in MATRICES | BATCHED]):
            raise RecipeError(
                f"augment.randaugment = {augment.randaugment!r} may use {lacking[0]}, which no device does here; "
                "set augment.run_on=workers"
            )

    def __call__(self, images: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
        """uint8 [b, 3, H, W], cropped and flipped, to the same with the rest of the draws done to it.

        Images without draws, of a backend that augments nothing, come back as they are.
        """
        if not self._active or not draws:
            return images
        images = images.clone()
        for turn in zip_longest(*(draw.ops + _jitter_operations(draw) for draw in draws)):
            self._take_turn(images, turn)
        for image, draw in zip(images, draws, strict=True):
            if draw.erase is not None:
                self._erase(image, draw.erase)
        return images

    def _take_turn(self, images: torch.Tensor, operations: Sequence[Operation | None]) -> None:
        moved: dict[int, Matrix] = {}
        others: defaultdict[str, dict[int, float]] = defaultdict(dict)
        for row, operation in enumerate(operations):
            if operation is None:
                continue
            name, arguments = operation
            if name in MATRICES:
                moved[row] = MATRICES[name](arguments[0], *images.shape[:1:-1])
            else:
                others[name][row] = arguments[0] if arguments else 0.0
        if moved:
            rows = _on_device(list(moved), torch.int64, images)
            matrices = _on_device(list(moved.values()), torch.float64, images)
            images[rows] = transformed(images[rows], matrices, self._fill, self._cubic)
        for name, found in others.items():
            rows = _on_device(list(found), torch.int64, images)
            images[rows] = BATCHED[name](images[rows], _on_device(list(found.values()), torch.float32, images))

    def _erase(self, image: torch.Tensor, erase: tuple[int, int, int, int, int]) -> None:
        left, top, width, height, seed = erase
        generator = torch.Generator(image.device).manual_seed(seed)
        noise = torch.randn(3, height, width, generator=generator, device=image.device)
        for channel, (mean, std) in enumerate(zip(self._mean, self._std, strict=True)):
            noise[channel].mul_(255 * std).add_(255 * mean)
        image[:, top : top + height, left : left + width] = noise.clamp_(0, 255).to(torch.uint8)


def _jitter_operations(draw: Draw) -> tuple[Operation, ...]:
    return tuple((JITTERS[name], (factor,)) for name, factor in draw.jitter)


def _on_device(values: list[object], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)
