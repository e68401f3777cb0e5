"""RandAugment, colour jitter and erasing of a whole batch on its device, from the draws that came with it.

What a sample gets is drawn with its crop, so it is what the workers would do to it, to within a grey level here and
there. Where Triton runs, a turn is at most two kernels for all images (`device_fused`). Elsewhere each operation is
done to all images at once that get it at the same turn. Only the noise of erased boxes is the device's own.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch

from karat_scale.data.augmentation import device_fused
from karat_scale.data.augmentation.device_ops import BATCHED, transformed
from karat_scale.data.augmentation.device_program import KINDS, Kind, Turn, pack, turns
from karat_scale.data.augmentation.draw import Draw, Operation
from karat_scale.data.augmentation.randaugment import RandAugment
from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe import AugmentConfig


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
        if self._active and policy and (lacking := [name for name in policy.names if name not in KINDS]):
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
        todo = turns(draws)
        program, by_table = pack(todo, images.shape[3], images.shape[2])
        if device_fused.can_run(images.device):
            return device_fused.augment(images, program, by_table, self._fill, self._mean, self._std, self._cubic)
        images = images.clone()
        for turn, numbers in zip(todo, program.to(images.device), strict=True):
            self._take_turn(images, turn, numbers)
        return images

    def _take_turn(self, images: torch.Tensor, turn: Turn, numbers: torch.Tensor) -> None:
        """By `device_ops`, which run on any device. numbers: the turn's part of the program, on the images' device."""
        found: defaultdict[Kind, list[int]] = defaultdict(list)
        for row, operation in enumerate(turn):
            if operation is not None:
                found[KINDS[operation[0]]].append(row)
        order = torch.tensor([row for some in found.values() for row in some]).to(images.device)
        for kind, rows in zip(found, order.split([len(some) for some in found.values()]), strict=True):
            if kind == Kind.ERASE:
                for row in found[kind]:
                    self._erase(images[row], turn[row])
            elif kind == Kind.AFFINE:
                images[rows] = transformed(images[rows], numbers[rows, 1:7], self._fill, self._cubic)
            else:
                images[rows] = BATCHED[kind](images[rows], numbers[rows, 1].float())

    def _erase(self, image: torch.Tensor, operation: Operation | None) -> None:
        assert operation is not None
        left, top, width, height, seed = map(int, operation[1])
        generator = torch.Generator(image.device).manual_seed(seed)
        noise = torch.randn(3, height, width, generator=generator, device=image.device)
        for channel, (mean, std) in enumerate(zip(self._mean, self._std, strict=True)):
            noise[channel].mul_(255 * std).add_(255 * mean)
        image[:, top : top + height, left : left + width] = noise.clamp_(0, 255).to(torch.uint8)
