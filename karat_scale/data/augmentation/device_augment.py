"""The work of a device on a whole batch of images: resize, RandAugment, jitter, erasing, and the model's input.

A sample's operations are drawn with its crop, so they are those that workers would apply, though some pixels differ by
a grey level. Where Triton runs, a turn is at most two kernels for all images (`device_fused`). Elsewhere each operation
is done at once to all images that get it at the same turn. Only the noise of erased boxes differs from the workers'.

The operations are Pillow's, on batches of uint8 images. All integers are Pillow's, and floats are float32 or better.
The resize of a part of an image is Pillow's too: antialiased, with a box whose ends may lie within pixels. At the
end bytes are normalised, mixed, and given the dtype that the model computes in.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from karat_scale.data.augmentation import device_fused
from karat_scale.data.augmentation.augment import RandAugment
from karat_scale.data.augmentation.device_program import KINDS, Kind, Turn, pack, turns
from karat_scale.data.augmentation.mixing import MixParams, mixed
from karat_scale.data.batch import Draw, Operation
from karat_scale.data.decoders.decode import View
from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe import AugmentConfig

# Takes images, uint8 [n, 3, H, W], and one float32 argument for each; returns the new images.
Batched = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LEVELS = 256


def transformed(
    images: torch.Tensor, matrices: torch.Tensor, fill: tuple[int, ...], cubic: bool, cut: int = 64
) -> torch.Tensor:
    """Return images, uint8 [n, 3, H, W], after Image.transform by AFFINE matrices, float64 [n, 6].

    A matrix (a, b, c, d, e, f) says that output (x, y) reads input (a x + b y + c, d x + e y + f). Pillow's cubic
    is Keys' with -1. It does `cut` images at a time, since its temporary tensors are many times their size.
    """
    if len(images) > cut:
        parts = zip(images.split(cut), matrices.split(cut), strict=True)
        return torch.cat([transformed(some, theirs, fill, cubic) for some, theirs in parts])
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device, dtype=torch.float64) + 0.5
    y = torch.arange(height, device=images.device, dtype=torch.float64)[:, None] + 0.5
    a, b, c, d, e, f = matrices[..., None, None].unbind(1)
    across, down = a * x + b * y + c, d * x + e * y + f
    outside = (across < 0) | (across >= width) | (down < 0) | (down >= height)
    columns, column_part = _taps(across, width, cubic)
    rows, row_part = _taps(down, height, cubic)
    pixels = images.flatten(2).float()

    def pixel(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        at = (row * width + column).flatten(1)[:, None].expand(-1, 3, -1)
        return pixels.gather(2, at).view_as(images)

    lines = [_between([pixel(row, column) for column in columns], column_part) for row in rows]
    # Pillow cuts off, too.
    result = _between(lines, row_part).clamp_(0, 255).to(torch.uint8)
    colour = torch.tensor(fill, dtype=torch.uint8, device=images.device).view(1, 3, 1, 1)
    return torch.where(outside[:, None], colour, result)


def _taps(at: torch.Tensor, length: int, cubic: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return, along one axis, the pixels that each place reads, int64, and its distance from the pixel before it."""
    before = torch.floor(at - 0.5)
    taps = [(before.long() + i).clamp(0, length - 1) for i in ((-1, 0, 1, 2) if cubic else (0, 1))]
    return taps, (at - 0.5 - before).float()[:, None]


def _between(values: list[torch.Tensor], part: torch.Tensor) -> torch.Tensor:
    """Interpolate in Pillow's order of operations, which does not change a flat colour."""
    if len(values) == 2:
        return values[0] + part * (values[1] - values[0])
    one, two, three, four = values
    return two + part * (three - one + part * (2 * (one - two) + three - four + part * (two - one + four - three)))


def _blended(plain: torch.Tensor, images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return ImageEnhance's blend: from `plain`, which lacks a property, to the images and beyond."""
    plain = plain.float()
    return (plain + factors.view(-1, 1, 1, 1) * (images.float() - plain)).clamp_(0, 255).to(torch.uint8)


def _grey(images: torch.Tensor) -> torch.Tensor:
    """Return Pillow's luma, int32 [n, 1, H, W]."""
    red, green, blue = images.int().split(1, dim=1)
    grey: torch.Tensor = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return grey


def _mean_grey(images: torch.Tensor) -> torch.Tensor:
    pixels = images.shape[-1] * images.shape[-2]
    total = _grey(images).sum((1, 2, 3), dtype=torch.int64)
    return ((2 * total + pixels) // (2 * pixels)).view(-1, 1, 1, 1)


def _smooth(images: torch.Tensor) -> torch.Tensor:
    """Return ImageFilter.SMOOTH, int32 [n, 3, H, W]: a mean of 3 x 3 with the centre five times; the border stays."""
    result = images.int()
    height, width = images.shape[-2:]
    if min(height, width) < 3:
        return result
    shifted = [result[..., y : height - 2 + y, x : width - 2 + x] for y in range(3) for x in range(3)]
    total = torch.stack(shifted).sum(0, dtype=torch.int32) + 4 * shifted[4]
    result = result.clone()
    result[..., 1:-1, 1:-1] = (2 * total + 13) // 26
    return result


def _looked_up(images: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Return each pixel's entry in the table of its image and channel, [n, 1 or 3, 256]."""
    at = images.flatten(2).long()
    return tables.to(torch.uint8).expand(-1, 3, -1).gather(2, at).view_as(images)


def _levels(arguments: torch.Tensor) -> torch.Tensor:
    return torch.arange(LEVELS, device=arguments.device).expand(len(arguments), 1, -1)


def _by_level(table: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Batched:
    """Return the operation whose table `table` makes from levels, int64 [n, 1, 256], and arguments, int64 [n, 1, 1]."""
    return lambda images, arguments: _looked_up(images, table(_levels(arguments), arguments.long().view(-1, 1, 1)))


def _posterized(levels: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    return (levels >> (8 - bits.clamp(0, 8))) << (8 - bits.clamp(0, 8))


def _equalized(images: torch.Tensor, arguments: torch.Tensor) -> torch.Tensor:
    levels = _levels(arguments).expand(-1, 3, -1)
    pixels = images.flatten(2).long()
    counts = torch.zeros_like(levels).scatter_add_(2, pixels, torch.ones_like(pixels))
    last = counts.gather(2, pixels.amax(2, keepdim=True))
    step = (pixels.shape[2] - last) // (LEVELS - 1)
    before = counts.cumsum(2) - counts
    spread = ((step // 2 + before) // step.clamp(min=1)).clamp(max=LEVELS - 1)
    return _looked_up(images, torch.where(step > 0, spread, levels))


def _autocontrasted(images: torch.Tensor, arguments: torch.Tensor) -> torch.Tensor:
    levels = _levels(arguments).expand(-1, 3, -1)
    low, high = (bound.long()[..., None] for bound in torch.aminmax(images.flatten(2), dim=2))
    span = (high - low).clamp(min=1).double()
    # Not a number over a tensor: torch multiplies it by the reciprocal, and Pillow does not.
    scale = torch.full_like(span, LEVELS - 1) / span
    stretched = (levels * scale - low * scale).clamp(0, LEVELS - 1).long()
    return _looked_up(images, torch.where(high > low, stretched, levels))


BATCHED: dict[Kind, Batched] = {
    Kind.BRIGHTNESS: lambda images, factors: _blended(torch.zeros((), device=images.device), images, factors),
    Kind.CONTRAST: lambda images, factors: _blended(_mean_grey(images), images, factors),
    Kind.COLOR: lambda images, factors: _blended(_grey(images), images, factors),
    Kind.SHARPNESS: lambda images, factors: _blended(_smooth(images), images, factors),
    Kind.DESATURATE: lambda images, factors: _blended(_grey(images), images, (1 - factors).clamp(0, 1)),
    Kind.POSTERIZE: _by_level(_posterized),
    Kind.SOLARIZE: _by_level(lambda levels, threshold: torch.where(levels < threshold, levels, LEVELS - 1 - levels)),
    Kind.SOLARIZE_ADD: _by_level(lambda levels, add: torch.where(levels < 128, (levels + add).clamp(max=255), levels)),
    Kind.INVERT: _by_level(lambda levels, _: LEVELS - 1 - levels),
    Kind.AUTO_CONTRAST: _autocontrasted,
    Kind.EQUALIZE: _equalized,
}


class DeviceAugment:
    """Does the part of the augmentation that `augment.run_on = device` leaves to a device; nothing with `workers`.

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
                f"augment.randaugment = {augment.randaugment!r} may use {lacking[0]}, which has no form for a "
                "device; set augment.run_on=workers"
            )

    def __call__(self, images: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
        """Return cropped and flipped images, uint8 [b, 3, H, W], after the rest of their draws.

        Images without draws, from a backend that augments nothing, come back as they are.
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
        """Do a turn in PyTorch, on any device. numbers: the turn's part of the program, on the images' device."""
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


# How far each filter reaches, in pixels of the larger image.
_REACH = {"bilinear": 1.0, "bicubic": 2.0}


def resize_views(
    images: Sequence[Tensor], views: Sequence[View], flips: Sequence[bool], size: int, interpolation: str
) -> Tensor:
    """Return the views of whole images, uint8 [3, h, w] each, mirrored where `flips` says so: uint8 [b, 3, size, size].

    Where Triton runs, one kernel does it all. Elsewhere each image is resized by itself, and a level may be rounded in
    another way.
    """
    device = images[0].device
    if device_fused.can_run(device):
        return device_fused.resized_views(images, views, flips, size, interpolation == "bicubic")
    result = torch.empty(len(images), 3, size, size, dtype=torch.uint8, device=device)
    for number, (pixels, view, flip) in enumerate(zip(images, views, flips, strict=True)):
        left, top, right, bottom = view.region
        resized = resize_on_device(pixels[:, top:bottom, left:right], view, interpolation)
        result[number] = resized.flip(-1) if flip else resized
    return result


def resize_on_device(region: Tensor, view: View, interpolation: str) -> Tensor:
    """Return the view, uint8 [3, height, width], from its region, uint8 [3, h, w], on the region's device.

    First the rows and then the columns are resized and rounded, as in Pillow. torch resizes a whole region with few
    kernels. It cannot resize a box whose ends are within pixels, so that is done by two matrices of filter weights.
    """
    width, height = view.size
    if view.box == view.region:
        resize = partial(functional.interpolate, mode=interpolation, antialias=True)
        narrowed = _whole_levels(resize(region.float()[None], (region.shape[1], width)))
        resized = resize(narrowed, (height, width))[0]
    else:
        left, top, right, bottom = view.box_in_region
        rows, columns = region.shape[1:]
        across = _filter_weights(left, right, columns, width, interpolation, region.device)
        down = _filter_weights(top, bottom, rows, height, interpolation, region.device)
        narrowed = _whole_levels(_weighted(across, region.float().mT).mT)
        resized = _weighted(down, narrowed)
    return _whole_levels(resized).to(torch.uint8)


def _filter_weights(
    start: float, stop: float, length: int, size: int, interpolation: str, device: torch.device
) -> Tensor:
    """Return the weight of each of `length` pixels in each of `size` pixels of the box: float32 [size, length]."""
    scale = (stop - start) / size
    stretch = max(scale, 1.0)
    centres = start + (torch.arange(size, device=device)[:, None] + 0.5) * scale
    pixels = torch.arange(length, device=device) + 0.5
    distances = (pixels - centres).abs() / stretch
    weights = _triangle(distances) if interpolation == "bilinear" else _cubic(distances)
    weights = weights * (distances < _REACH[interpolation])
    return weights / weights.sum(dim=1, keepdim=True)


def _weighted(weights: Tensor, levels: Tensor) -> Tensor:
    """Return weights @ levels, for whole levels, as exact as in float32 even if torch multiplies in TF32 (11 bits)."""
    coarse = (weights * 1024).round() / 1024
    return coarse @ levels + (weights - coarse) @ levels


def _triangle(distances: Tensor) -> Tensor:
    return 1 - distances


def _cubic(distances: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -0.5, as Pillow and torch use it."""
    near = (1.5 * distances - 2.5) * distances**2 + 1
    far = ((-0.5 * distances + 2.5) * distances - 4) * distances + 2
    return torch.where(distances < 1, near, far)


def _whole_levels(pixels: Tensor) -> Tensor:
    return pixels.round().clamp(0, 255)


class Normalize:
    """Turns uint8 [b, 3, H, W] into (images / 255 - mean) / std in `dtype`; mean and std are fractions of 1.

    Where Triton runs, one kernel reads the bytes and writes the result. Elsewhere torch computes it in passes. Both
    compute in float32, with the same operations in the same order, and round once to `dtype`: the bits are the same.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32) -> None:
        mean_, std_ = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self._scale = (1 / (255 * std_)).float().view(-1, 1, 1)
        self._shift = (-mean_ / std_).float().view(-1, 1, 1)
        self._numbers = self._scale.flatten().tolist(), self._shift.flatten().tolist()
        self._dtype = dtype

    def __call__(self, images: torch.Tensor, mix: MixParams | None = None) -> torch.Tensor:
        """Normalise images, and mix their pairs as `mix` says. Raises ValueError for an odd number of images to mix."""
        mix = mix or MixParams("none")
        if mix.kind != "none" and len(images) % 2:
            raise ValueError(f"cannot mix pairs of an odd batch of {len(images)}")
        if device_fused.can_run(images.device):
            return device_fused.model_input(images, *self._numbers, mix, self._dtype)
        if self._scale.device != images.device:
            self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        return mixed(images.float().mul_(self._scale).add_(self._shift), mix).to(self._dtype)
