"""Other libraries' loaders next to the contenders of `karat bench data`: `python -m benchmarks.data_peers`.

Takes the options of `karat bench data`. ImageFolder and torchvision's transforms; FFCV's and DALI's own loaders as
their documentation shows them. Each crops at random, resizes and mirrors; only ours keeps our order and draws.
"""

from collections.abc import Callable
from importlib import import_module

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from karat_scale.commands.bench.commands import add_data_options
from karat_scale.commands.bench.data import Contender, Contenders, bench_data, decode_whole
from karat_scale.commands.measure.data import SIZE
from karat_scale.data.shards.shard_format import beton_path, read_record
from karat_scale.foundation.arguments import OneLineParser
from karat_scale.foundation.errors import run_script
from karat_scale.recipe import AugmentConfig

# Of torchvision's 31 levels.
RANDAUGMENT_MAGNITUDE = 15


def main(arguments: list[str] | None = None) -> int:
    """Measure our backends and the peers, print a table, and write the file of `--json`."""
    parser = OneLineParser(prog="python -m benchmarks.data_peers", description=__doc__)
    add_data_options(parser)
    return bench_data(parser.parse_args(arguments), peers)


def peers(ours: Contenders) -> dict[str, Contender]:
    """Return the peers that can run."""
    found = {"Pillow ImageFolder, float32": image_folder(ours)}
    if not ours.augment.randaugment:
        found["torchvision decode and crop, uint8"] = torchvision_uint8(ours)
        if "ffcv" in ours.requested and not ours.lacks("ffcv"):
            found["FFCV's Loader, uint8"] = ffcv_loader(ours)
        if "dali" in ours.requested and not ours.lacks("dali"):
            found["DALI's pipeline, CPU, uint8"] = dali_loader(ours)
    return found


def image_folder(ours: Contenders) -> Contender:
    """Return passes by ImageFolder and Pillow to float32 batches, with torchvision's transforms."""
    transform = v2.Compose(
        [
            *_crop_and_flip(ours.augment),
            *_colours(ours.augment),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(ours.augment.mean, ours.augment.std),
        ]
    )
    return _loads(ImageFolder(str(ours.images.folder / "train"), transform), ours)


def torchvision_uint8(ours: Contenders) -> Contender:
    """Return passes by the decoder of torchcodec or torchvision, and torchvision's uint8 transforms."""
    return _loads(_Decoded(ours.images.encoded, v2.Compose(_crop_and_flip(ours.augment))), ours)


class _Decoded(Dataset[torch.Tensor]):
    def __init__(self, encoded: tuple[bytes, ...], transform: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._encoded, self._transform = encoded, transform

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._transform(decode_whole(self._encoded[index]))


def _crop_and_flip(augment: AugmentConfig) -> list[v2.Transform]:
    interpolation = InterpolationMode(augment.interpolation)
    crop = v2.RandomResizedCrop(SIZE, augment.scale, augment.ratio, interpolation=interpolation, antialias=True)
    return [crop, v2.RandomHorizontalFlip(augment.hflip)]


def _colours(augment: AugmentConfig) -> list[v2.Transform]:
    """Return two operations of RandAugment at about the recipe's strength, then its jitter."""
    colours: list[v2.Transform] = []
    if augment.randaugment:
        colours.append(v2.RandAugment(2, RANDAUGMENT_MAGNITUDE, interpolation=InterpolationMode(augment.interpolation)))
    if augment.color_jitter:
        colours.append(v2.ColorJitter(*3 * [augment.color_jitter]))
    return colours


def _loads(dataset: ImageFolder | _Decoded, ours: Contenders) -> Contender:
    def run() -> None:
        torch.manual_seed(0)
        sampler = RandomSampler(dataset, num_samples=ours.loader_images)
        for _ in DataLoader(dataset, ours.batch, sampler=sampler, num_workers=ours.workers):
            pass

    return run


def ffcv_loader(ours: Contenders) -> Contender:
    """Return passes by FFCV's Loader over the first samples of a beton, on as many threads as workers, at least one."""
    beton = beton_path(ours.ffcv, "train")
    samples = min(len(ours.images.encoded), read_record(beton).samples)
    loader, image, basic = (import_module(f"ffcv.{name}") for name in ("loader", "fields.rgb_image", "fields.basics"))
    transforms = import_module("ffcv.transforms")
    size = (SIZE, SIZE)
    crop = image.RandomResizedCropRGBImageDecoder(size, scale=ours.augment.scale, ratio=ours.augment.ratio)
    flip = transforms.RandomHorizontalFlip(ours.augment.hflip)
    batches = loader.Loader(
        str(beton),
        ours.batch,
        num_workers=max(1, ours.workers),
        order=loader.OrderOption.RANDOM,
        os_cache=True,
        indices=np.arange(samples),
        drop_last=True,
        pipelines={
            "image": [crop, flip, transforms.ToTensor(), transforms.ToTorchImage()],
            "label": [basic.IntDecoder(), transforms.ToTensor(), transforms.Squeeze()],
        },
    )

    def run() -> None:
        for _ in range(ours.loader_images // (samples // ours.batch * ours.batch)):
            for _ in batches:
                pass

    return run


def dali_loader(ours: Contenders) -> Contender:
    """Return passes by DALI's pipeline from files on the CPU, on as many threads as workers, at least one."""
    dali, fn, types = (import_module(f"nvidia.dali{name}") for name in ("", ".fn", ".types"))
    interpolation = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[ours.augment.interpolation]
    pipeline = dali.Pipeline(batch_size=ours.batch, num_threads=max(1, ours.workers), device_id=None, seed=0)
    with pipeline:
        encoded, labels = fn.readers.file(file_root=str(ours.images.folder / "train"), random_shuffle=True)
        cropped = fn.decoders.image_random_crop(
            encoded, random_area=list(ours.augment.scale), random_aspect_ratio=list(ours.augment.ratio)
        )
        small = fn.resize(cropped, size=(SIZE, SIZE), interp_type=interpolation)
        pipeline.set_outputs(fn.flip(small, horizontal=fn.random.coin_flip(probability=ours.augment.hflip)), labels)
    pipeline.build()

    def run() -> None:
        for _ in range(ours.loader_images // ours.batch):
            images, _ = pipeline.run()
            images.as_array()

    return run


if __name__ == "__main__":
    run_script(main)
