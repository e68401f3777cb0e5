"""The loaders of FFCV and DALI as their documentation has them, beside our backends of those names.

Each crops at random, resizes to uint8 and mirrors, like the others; neither keeps an order or a draw of ours.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from karat_scale.bench.data_peers import Contender, Load
from karat_scale.recipe import AugmentConfig
from karat_scale.tables import BACKENDS, EXTRAS, how_to_install


def lacking(backend: str) -> str:
    """What to type to install a backend's library; empty where it is there or none is needed."""
    extra = BACKENDS[backend].extra
    try:
        there = not extra or find_spec(EXTRAS[extra].module) is not None
    except ModuleNotFoundError:
        there = False
    return "" if there else how_to_install(extra)


def ffcv_loader(beton: Path, samples: int, augment: AugmentConfig, load: Load) -> Contender:
    """FFCV's Loader over the first samples of a beton, on as many threads as there are workers, at least one."""
    loader, image, basic = (import_module(f"ffcv.{name}") for name in ("loader", "fields.rgb_image", "fields.basics"))
    transforms = import_module("ffcv.transforms")
    size = (load.size, load.size)
    crop = image.RandomResizedCropRGBImageDecoder(size, scale=augment.scale, ratio=augment.ratio)
    flip = transforms.RandomHorizontalFlip(augment.hflip)
    batches = loader.Loader(
        str(beton),
        load.batch,
        num_workers=max(1, load.workers),
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
        for _ in range(load.images // (samples // load.batch * load.batch)):
            for _ in batches:
                pass

    return run


def dali_loader(folder: Path, augment: AugmentConfig, load: Load) -> Contender:
    """DALI's pipeline from files on the CPU, on as many threads as there are workers, at least one."""
    dali, fn, types = (import_module(f"nvidia.dali{name}") for name in ("", ".fn", ".types"))
    interpolation = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[augment.interpolation]
    pipeline = dali.Pipeline(batch_size=load.batch, num_threads=max(1, load.workers), device_id=None, seed=0)
    with pipeline:
        encoded, labels = fn.readers.file(file_root=str(folder / "train"), random_shuffle=True)
        cropped = fn.decoders.image_random_crop(
            encoded, random_area=list(augment.scale), random_aspect_ratio=list(augment.ratio)
        )
        small = fn.resize(cropped, size=(load.size, load.size), interp_type=interpolation)
        pipeline.set_outputs(fn.flip(small, horizontal=fn.random.coin_flip(probability=augment.hflip)), labels)
    pipeline.build()

    def run() -> None:
        for _ in range(load.images // load.batch):
            images, _ = pipeline.run()
            images.as_array()

    return run
