"""What `karat bench data` compares with: whole decodes by libjpeg-turbo, and the loaders a user has without us.

Each function gives a contender that goes over the images: a decoder once, a loader as its Load says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
from torchvision.transforms import InterpolationMode, v2

from karat_scale.recipe import AugmentConfig

Contender = Callable[[], object]
Pixels = npt.NDArray[np.uint8]
# Of torchvision's 31 levels.
RANDAUGMENT_MAGNITUDE = 15


@dataclass(frozen=True)
class Load:
    """What a loader brings: images of `size` x `size` pixels in whole batches, `images` of them in all."""

    size: int
    batch: int
    workers: int
    images: int


def decode_whole_by_simplejpeg(encoded: tuple[bytes, ...]) -> Contender | None:
    """None where it is not installed."""
    if find_spec("simplejpeg") is None:
        return None
    decode = import_module("simplejpeg").decode_jpeg
    return lambda: _each(lambda data: decode(data, strict=False), encoded)


def decode_whole_by_torchvision(encoded: tuple[bytes, ...]) -> Contender:
    return lambda: _each(_decode, encoded)


def recode_by_simplejpeg(encoded: tuple[bytes, ...], results: list[Pixels], quality: int) -> Contender | None:
    """Whole decodes, and encodes of other pixels, [height, width, 3]; None where it is not installed."""
    decode = decode_whole_by_simplejpeg(encoded)
    if decode is None:
        return None
    encode = import_module("simplejpeg").encode_jpeg

    def run() -> None:
        decode()
        for pixels in results:
            encode(pixels, quality=quality, colorspace="RGB", colorsubsampling="420")

    return run


def recode_by_torchvision(encoded: tuple[bytes, ...], results: list[Pixels], quality: int) -> Contender:
    """As recode_by_simplejpeg."""

    def run() -> None:
        _each(_decode, encoded)
        for pixels in results:
            encode_jpeg(torch.from_numpy(pixels).permute(2, 0, 1), quality=quality)

    return run


def _each(decode: Callable[[bytes], object], encoded: tuple[bytes, ...]) -> None:
    for data in encoded:
        decode(data)


def image_folder(folder: Path, augment: AugmentConfig, load: Load) -> Contender:
    """ImageFolder by Pillow to float32 batches, with torchvision's transforms."""
    transform = v2.Compose(
        [
            *_crop_and_flip(augment, load.size),
            *_colours(augment),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(augment.mean, augment.std),
        ]
    )
    return _loads(ImageFolder(str(folder / "train"), transform), load)


def torchvision_uint8(encoded: tuple[bytes, ...], augment: AugmentConfig, load: Load) -> Contender:
    """torchvision's decoder and its uint8 transforms."""
    return _loads(_Decoded(encoded, v2.Compose(_crop_and_flip(augment, load.size))), load)


class _Decoded(Dataset[torch.Tensor]):
    def __init__(self, encoded: tuple[bytes, ...], transform: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._encoded, self._transform = encoded, transform

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._transform(_decode(self._encoded[index]))


def _decode(data: bytes) -> torch.Tensor:
    pixels: torch.Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return pixels


def _crop_and_flip(augment: AugmentConfig, size: int) -> list[v2.Transform]:
    interpolation = InterpolationMode(augment.interpolation)
    crop = v2.RandomResizedCrop(size, augment.scale, augment.ratio, interpolation=interpolation, antialias=True)
    return [crop, v2.RandomHorizontalFlip(augment.hflip)]


def _colours(augment: AugmentConfig) -> list[v2.Transform]:
    """Two operations of RandAugment at about the recipe's strength, then its jitter."""
    colours: list[v2.Transform] = []
    if augment.randaugment:
        colours.append(v2.RandAugment(2, RANDAUGMENT_MAGNITUDE, interpolation=InterpolationMode(augment.interpolation)))
    if augment.color_jitter:
        colours.append(v2.ColorJitter(*3 * [augment.color_jitter]))
    return colours


def _loads(dataset: ImageFolder | _Decoded, load: Load) -> Contender:
    def run() -> None:
        torch.manual_seed(0)
        sampler = RandomSampler(dataset, num_samples=load.images)
        for _ in DataLoader(dataset, load.batch, sampler=sampler, num_workers=load.workers):
            pass

    return run
