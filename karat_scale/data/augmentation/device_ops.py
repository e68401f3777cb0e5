"""Pillow's operations on batches of uint8 images on any device: what RandAugment and jitter are made of.

All integers are Pillow's, and its floats are float32 or better, so that results differ by a level here and there.
"""

from collections.abc import Callable

import torch

from karat_scale.data.augmentation.device_program import Kind

# uint8 [n, 3, H, W] and one float32 argument of each to the images' successors.
Batched = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LEVELS = 256


def transformed(
    images: torch.Tensor, matrices: torch.Tensor, fill: tuple[int, ...], cubic: bool, cut: int = 64
) -> torch.Tensor:
    """Image.transform by AFFINE: uint8 [n, 3, H, W] and float64 [n, 6] to uint8 [n, 3, H, W].

    A matrix (a, b, c, d, e, f) says that output (x, y) looks at input (a x + b y + c, d x + e y + f). Pillow's cubic
    is Keys' with -1. Of `cut` images at a time, for what it works in is many times their size.
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
    """The pixels that places look at, int64, and how far they are beyond the middle one; along one axis."""
    before = torch.floor(at - 0.5)
    taps = [(before.long() + i).clamp(0, length - 1) for i in ((-1, 0, 1, 2) if cubic else (0, 1))]
    return taps, (at - 0.5 - before).float()[:, None]


def _between(values: list[torch.Tensor], part: torch.Tensor) -> torch.Tensor:
    """In Pillow's order of operations, in which a flat colour stays what it is."""
    if len(values) == 2:
        return values[0] + part * (values[1] - values[0])
    one, two, three, four = values
    return two + part * (three - one + part * (2 * (one - two) + three - four + part * (two - one + four - three)))


def _blended(plain: torch.Tensor, images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """ImageEnhance: from what lacks a property, int or [n, 1 or 3, ...], to the images and beyond."""
    plain = plain.float()
    return (plain + factors.view(-1, 1, 1, 1) * (images.float() - plain)).clamp_(0, 255).to(torch.uint8)


def _grey(images: torch.Tensor) -> torch.Tensor:
    """Pillow's luma, int32 [n, 1, H, W]."""
    red, green, blue = images.int().split(1, dim=1)
    grey: torch.Tensor = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return grey


def _mean_grey(images: torch.Tensor) -> torch.Tensor:
    pixels = images.shape[-1] * images.shape[-2]
    total = _grey(images).sum((1, 2, 3), dtype=torch.int64)
    return ((2 * total + pixels) // (2 * pixels)).view(-1, 1, 1, 1)


def _smooth(images: torch.Tensor) -> torch.Tensor:
    """ImageFilter.SMOOTH, int32 [n, 3, H, W]: a mean of 3 x 3 with the centre five times; the border stays."""
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
    """Each pixel's entry in the table of its image and channel, [n, 1 or 3, 256]."""
    at = images.flatten(2).long()
    return tables.to(torch.uint8).expand(-1, 3, -1).gather(2, at).view_as(images)


def _levels(arguments: torch.Tensor) -> torch.Tensor:
    return torch.arange(LEVELS, device=arguments.device).expand(len(arguments), 1, -1)


def _by_level(table: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Batched:
    """An operation from its table of levels, int64 [n, 1, 256], and arguments, int64 [n, 1, 1]."""
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
