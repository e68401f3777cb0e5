"""Images a second from JPEGs to the device, by our backends and by the decoders that torch's users have."""

import statistics
import time
from collections.abc import Callable, Generator
from contextlib import closing
from importlib import import_module
from typing import Any

import torch

from karat_scale.commands.bench.data import AUGMENTS, CLASSES, SIZE, SampleImages, lacking_library, prepare_images
from karat_scale.commands.bench.gpu.process import one_line
from karat_scale.commands.bench.gpu.worker import Task
from karat_scale.data.augmentation.device_augment import DeviceAugment
from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.plan import TrainPlan
from karat_scale.engine.devices import wait_for
from karat_scale.foundation.console import plural
from karat_scale.foundation.machine import usable_cores
from karat_scale.recipe import AugmentConfig, DataConfig

# Yields the number of images after each batch that is on the device.
Loader = Callable[[], Generator[int, None, None]]
IMAGES, BATCH, TOY_IMAGES, TOY_BATCH = 256, 64, 8, 4
ROUNDS, SECONDS, WARM_UP = 3, 1.5, 12
MANY = 10**6
ON_THE_DEVICE = AugmentConfig(run_on="device")


class _Section:
    """The images and what loads them."""

    def __init__(self, task: Task, images: SampleImages) -> None:
        self._task, self._images = task, images
        self._batch = TOY_BATCH if task.toy else BATCH
        self.workers = 1 if task.toy else usable_cores()

    def ours(self) -> dict[str, Loader]:
        """Return our backends: DALI's only if it is installed, and nvJPEG's only on a GPU."""
        crop, paper, workers = AUGMENTS["crop"], AUGMENTS["paper"], plural(self.workers, "worker")
        loaders = {
            f"webdataset, {workers}, crop and flip": self._backend("webdataset", crop),
            f"webdataset, {workers}, the paper's augmentation": self._backend("webdataset", paper),
        }
        if not self._task.toy:
            loaders["nvjpeg, crop and flip"] = self._backend("nvjpeg", crop)
            loaders["nvjpeg, the paper's augmentation on the device"] = self._backend("nvjpeg", ON_THE_DEVICE)
        if lack := lacking_library("dali"):
            self._task.channel.left_out("DALI", lack)
            return loaders
        where = "on the CPU" if self._task.toy else "by nvJPEG"
        loaders[f"dali {where}, crop and flip"] = self._backend("dali", crop)
        loaders[f"dali {where}, the paper's augmentation on the device"] = self._backend("dali", ON_THE_DEVICE)
        return loaders

    def peers(self) -> dict[str, Loader]:
        """Decoders of whole images."""
        loaders: dict[str, Loader] = {}
        for name, module in (("torchvision", "torchvision.io"), ("torchcodec", "torchcodec.decoders")):
            try:
                decode = import_module(module).decode_jpeg
            except (ImportError, AttributeError, OSError, RuntimeError) as error:
                self._task.channel.left_out(f"{name}'s decoder", one_line(error))
            else:
                loaders[f"{name}, whole images, on {self._task.device}"] = self._decoder(decode)
        return loaders

    def rate(self, loader: Loader) -> float:
        """Images a second, once the loader runs."""
        seconds, warm_up = (0.0, 1) if self._task.toy else (SECONDS, WARM_UP)
        with closing(loader()) as batches:
            for _ in range(warm_up):
                next(batches)
            images, begun = 0, time.perf_counter()
            while images == 0 or time.perf_counter() - begun < seconds:
                images += next(batches)
            return images / (time.perf_counter() - begun)

    def _backend(self, name: str, augment: AugmentConfig) -> Loader:
        def batches() -> Generator[int, None, None]:
            data = DataConfig(backend=name, path=str(self._images.shards), workers=self.workers)
            backend = open_backend(ImageSpec(data, augment, SIZE, CLASSES, 0))
            on_device = DeviceAugment(augment, SIZE)
            try:
                plan = TrainPlan(0, backend.num_train, self._batch, self._batch, 0, 1)
                for batch in backend.train_batches(plan.slices(0, MANY)):
                    on_device(batch.to(self._task.device).images, batch.draws)
                    wait_for(self._task.device)
                    yield len(batch.images)
            finally:
                backend.close()

        return batches

    def _decoder(self, decode: Callable[..., list[torch.Tensor]]) -> Loader:
        encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in self._images.encoded]
        options: dict[str, Any] = {"mode": "RGB", "device": self._task.device}

        def batches() -> Generator[int, None, None]:
            while True:
                for start in range(0, len(encoded), self._batch):
                    decoded = decode(encoded[start : start + self._batch], **options)
                    wait_for(self._task.device)
                    yield len(decoded)

        return batches


def measure(task: Task) -> None:
    """A row for each loader. They run one after another, since each takes all cores."""
    section = _Section(task, prepare_images(task.scratch, TOY_IMAGES if task.toy else IMAGES, None, None))
    ours, peers = section.ours(), section.peers()
    first = None
    for name, loader in {**ours, **peers}.items():
        if not task.budget.left:
            task.channel.late(name)
            continue
        task.channel.begin(name)
        try:
            rate = statistics.median(section.rate(loader) for _ in range(1 if task.toy else ROUNDS))
        except Exception as error:
            report = task.channel.failed if name in ours else task.channel.left_out
            report(name, one_line(error))
            continue
        first = first or rate
        task.channel.row(loader=name, images_per_second=round(rate, 1), ratio=round(rate / first, 3))
