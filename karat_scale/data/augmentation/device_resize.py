"""Resize a part of an image on its device, as Pillow does: antialiased, with a box whose ends may lie within pixels."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from karat_scale.data.augmentation import device_fused
from karat_scale.data.decoders.view import View

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
    """Return weights @ levels, whole levels, as exactly as in float32 if products are rounded to TF32 (11 bits)."""
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
