"""Images a second from JPEGs to the device, by our backends and by the decoders that torch's users have."""

import statistics
from collections.abc import Callable, Generator
from contextlib import closing
from importlib import import_module
from typing import Any

import torch

from karat_scale.commands.bench.gpu.worker import Task, one_line
from karat_scale.commands.measure import loading
from karat_scale.data.augmentation.device_augment import DeviceAugment
from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.plan import TrainPlan
from karat_scale.engine.distributed import wait_for
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import RecipeError
from karat_scale.foundation.machine import usable_cores
from karat_scale.recipe import AugmentConfig, DataConfig

# Yields the number of images after each batch that is on the device.
Loader = Callable[[], Generator[int, None, None]]
IMAGES, BATCH, TOY_IMAGES, TOY_BATCH = 256, 64, 8, 4
ROUNDS, SECONDS, WARM_UP = 3, 1.5, 12
MANY = 10**6


def measure(task: Task) -> None:
    """Report a row for each loader. Loaders run one after another, since each takes all cores."""
    images = loading.prepare_images(task.scratch, TOY_IMAGES if task.toy else IMAGES, None, None)
    ours, first = our_loaders(task, images), None
    rounds, seconds, warm_up = (1, 0.0, 1) if task.toy else (ROUNDS, SECONDS, WARM_UP)
    for name, loader in {**ours, **whole_decoders(task, images)}.items():
        if not task.budget.left:
            task.channel.late(name)
            continue
        task.channel.send("begin", name)
        rates = []
        try:
            for _ in range(rounds):
                with closing(loader()) as batches:
                    rates.append(loading.rate(batches, seconds, warm_up))
        except RecipeError as error:  # a library is missing
            task.channel.left_out(name, str(error))
            continue
        except Exception as error:
            report = task.channel.failed if name in ours else task.channel.left_out
            report(name, one_line(error))
            continue
        found = statistics.median(rates)
        first = first or found
        task.channel.row(loader=name, images_per_second=round(found, 1), ratio=round(found / first, 3))


def our_loaders(task: Task, images: loading.SampleImages) -> dict[str, Loader]:
    """Return our backends: DALI's only if it is installed, and nvJPEG's only on a GPU."""
    count, batch = 1 if task.toy else usable_cores(), TOY_BATCH if task.toy else BATCH

    def loader(name: str, augment: AugmentConfig) -> Loader:
        def batches() -> Generator[int, None, None]:
            data = DataConfig(backend=name, path=str(images.shards), workers=count)
            on_device = DeviceAugment(augment, loading.SIZE)
            with closing(open_backend(ImageSpec(data, augment, loading.SIZE, loading.CLASSES, 0))) as backend:
                plan = TrainPlan(0, backend.num_train, batch, batch, 0, 1)
                for made in backend.train_batches(plan.slices(0, MANY)):
                    on_device(made.to(task.device).images, made.draws)
                    wait_for(task.device)
                    yield len(made.images)

        return batches

    labels = {"webdataset": f"webdataset, {plural(count, 'worker')}"}
    if not task.toy:
        labels["nvjpeg"] = "nvjpeg"
    if lack := loading.lacking_library("dali"):
        task.channel.left_out("DALI", lack)
    else:
        labels["dali"] = f"dali {'on the CPU' if task.toy else 'by nvJPEG'}"
    loaders = {}
    for backend, label in labels.items():
        where, augment = ("", "paper") if backend == "webdataset" else (" on the device", "device")
        loaders[f"{label}, crop and flip"] = loader(backend, loading.AUGMENTS["crop"])
        loaders[f"{label}, the paper's augmentation{where}"] = loader(backend, loading.AUGMENTS[augment])
    return loaders


def whole_decoders(task: Task, images: loading.SampleImages) -> dict[str, Loader]:
    """Return the decoders of whole images."""
    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in images.encoded]
    options: dict[str, Any] = {"mode": "RGB", "device": task.device}
    batch = TOY_BATCH if task.toy else BATCH

    def loader(decode: Callable[..., list[torch.Tensor]]) -> Loader:
        def batches() -> Generator[int, None, None]:
            while True:
                for start in range(0, len(encoded), batch):
                    decoded = decode(encoded[start : start + batch], **options)
                    wait_for(task.device)
                    yield len(decoded)

        return batches

    loaders: dict[str, Loader] = {}
    for name, module in (("torchvision", "torchvision.io"), ("torchcodec", "torchcodec.decoders")):
        try:
            loaders[f"{name}, whole images, on {task.device}"] = loader(import_module(module).decode_jpeg)
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            task.channel.left_out(f"{name}'s decoder", one_line(error))
    return loaders
