"""`karat bench data`: images per second and core from each backend and decoder, next to whole decodes.

A core's second is a second of processor time, of this process and its workers, so other processes on the machine do not
count. Contenders run in turn over the same images: some of yours, or photo-like ones made here, in each backend's
layout. A ratio of 1.0 is a whole decode by libjpeg-turbo, with no crop, resize or batch. `python -m benchmarks.loaders`
measures the loaders of other libraries.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from karat_scale.commands.measure import loading
from karat_scale.commands.measure.interleaved import interleaved_seconds, processor_seconds
from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.decoders.decode import decode_rgb
from karat_scale.data.decoders.libraries import JpegDecoder, find_jpeg_decoder
from karat_scale.data.plan import TrainPlan
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import RecipeError, UserError
from karat_scale.foundation.machine import usable_cores
from karat_scale.foundation.tables import BACKENDS, DECODERS, Files
from karat_scale.recipe import AugmentConfig, DataConfig

# Passes of a loader over the images in one measurement: training starts its workers once, not every few hundred images.
PASSES = 4
# The same for two workers against one: they decode for seconds, and starting a worker takes a tenth of a second.
SCALING_PASSES, SCALING_ROUNDS = 20, 2
DESCRIPTIONS = {
    "crop": "random resized crop and flip",
    "paper": "the paper's augmentation",
    "device": "the workers' part of augment.run_on=device",
}
CROP_ALONE: dict[str, Any] = {"randaugment": "", "color_jitter": 0.0, "erasing": 0.0}


Contender = Callable[[], object]


def bench_data(options: argparse.Namespace) -> int:
    """Measure, print a table, and write the file of `--json`; returns 0. Raises UserError if it cannot measure."""
    backends = list(options.backend or BACKENDS)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="karat-bench-") as scratch:
        images = loading.prepare_images(Path(scratch), options.images, options.path, options.tar)
        ours = Contenders(images, options, backends)
        whole = ours.whole()
        loaders = ours.backends()
        seconds = interleaved_seconds({**whole, **loaders}, options.rounds, processor_seconds)
        scaling = device = None
        if "webdataset" in backends:
            workers = {f"{count}": ours.passes("webdataset", "auto", count, SCALING_PASSES) for count in (1, 2)}
            rounds = min(options.rounds, SCALING_ROUNDS)
            clocks = {"wall": time.perf_counter, "processor": processor_seconds}  # wall time needs two idle cores
            scaling = {
                name: round(interleaved_seconds(workers, rounds, clock).ratio("1", "2"), 2)
                for name, clock in clocks.items()
            }
            if options.augment == "device":
                augments = {"device": ours.augment, "crop": ours.augment.changed(**CROP_ALONE)}
                parts = {
                    name: ours.passes("webdataset", "auto", options.workers, augment=augment)
                    for name, augment in augments.items()
                }
                device = interleaved_seconds(parts, options.rounds, processor_seconds)
    base = next(iter(whole))
    used = {**dict.fromkeys(whole, len(images.encoded)), **dict.fromkeys(loaders, ours.loader_images)}
    result = {
        "source": images.source,
        "images": len(images.encoded),
        "mean_kb": images.mean_kb,
        "augment": options.augment,
        "workers": options.workers,
        "rounds": options.rounds,
        "cores": usable_cores(),
        "base": base,
        "rows": [
            {
                "contender": name,
                "images_per_core_second": round(used[name] / seconds.median(name), 1),
                "ratio": round(used[name] / used[base] / seconds.ratio(name, base), 3),
            }
            for name in used
        ],
        "not_measured": ours.missing,
        "two_workers_over_one": scaling,
        "device_over_crop": device and round(device.ratio("device", "crop"), 3),
    }
    what = DESCRIPTIONS[result["augment"]]
    title = f"{result['images']} images of {result['mean_kb']:.0f} KB ({Path(result['source']).name}), {what}, "
    title += f"workers: {result['workers']}"
    rows = [(row["contender"], f"{row['images_per_core_second']:.0f}", f"{row['ratio']:.2f}") for row in result["rows"]]
    print_table(title, ("contender", "images/s and core", "over whole decode"), rows)
    for name, reason in result["not_measured"].items():
        print(f"not measured: {name}: {reason}")
    if scaling := result["two_workers_over_one"]:
        print(
            f"two workers over one: {scaling['wall']:.2f} times as fast by the clock (on {result['cores']} cores, "
            f"if idle), {scaling['processor']:.2f} of the images a core's second"
        )
    if result["device_over_crop"] is not None:
        print(f"an image takes {result['device_over_crop']:.3f} of the processor time of crop and flip alone")
    write_json(options.json, result)
    return 0


def decode_whole_by_simplejpeg(encoded: tuple[bytes, ...]) -> Contender | None:
    """Return a pass over the images; None if simplejpeg is not installed."""
    if find_spec("simplejpeg") is None:
        return None
    return each_of(encoded, partial(import_module("simplejpeg").decode_jpeg, strict=False))


def each_of(encoded: tuple[bytes, ...], decode: Callable[[bytes], object]) -> Contender:
    """Return a pass over the images."""

    def run() -> None:
        for data in encoded:
            decode(data)

    return run


@cache
def torchs_decoder() -> JpegDecoder | None:
    """Return torchcodec's or torchvision's decoder; None if neither is there."""
    try:
        return find_jpeg_decoder(torch.device("cpu"))
    except RecipeError:
        return None


def decode_whole(data: bytes) -> torch.Tensor:
    """Return the image, uint8 [3, H, W], by `torchs_decoder`, or else by Pillow."""
    if decoder := torchs_decoder():
        return decoder([bytearray(data)])[0]
    return torch.from_numpy(np.array(decode_rgb(data))).permute(2, 0, 1)


class Contenders:
    """The contenders over one set of images. `missing`: the reasons why some cannot run, by name."""

    def __init__(self, images: loading.SampleImages, options: argparse.Namespace, backends: Sequence[str]) -> None:
        self.images, self.augment, self.requested = images, loading.AUGMENTS[options.augment], backends
        self.ffcv, self.workers = options.ffcv, options.workers
        self.batch = min(loading.BATCH, len(images.encoded))
        # Loaders drop the last incomplete batch.
        self.loader_images = PASSES * (len(images.encoded) // self.batch * self.batch)
        self.missing: dict[str, str] = {}

    def whole(self) -> dict[str, Contender]:
        """Return passes over the images without a loader, first the base of all ratios."""
        encoded = self.images.encoded
        found: dict[str, Contender] = {}
        if simple := decode_whole_by_simplejpeg(encoded):
            found["whole decode, simplejpeg"] = simple
        else:
            self.missing["whole decode, simplejpeg"] = "pip install simplejpeg"
        decoder = torchs_decoder()
        found[f"whole decode, {decoder.library if decoder else 'Pillow'}"] = each_of(encoded, decode_whole)

        def read_bytes() -> None:
            for _ in loading.encoded_images(str(self.images.shards), None):
                pass

        return {**found, "reading bytes alone": read_bytes}

    def backends(self) -> dict[str, Contender]:
        """Return the passes of each requested backend that can run, by each of its decoders."""
        found: dict[str, Contender] = {}
        for backend in self.requested:
            for decoder in DECODERS if backend == "webdataset" else ("auto",):
                name = f"karat {backend}" + ("" if decoder == "auto" else f", {decoder}")
                try:
                    found[name] = self.passes(backend, decoder, self.workers)
                except UserError as error:
                    self.missing[name] = str(error)
        return found

    def passes(
        self, backend: str, decoder: str, workers: int, times: int = PASSES, augment: AugmentConfig | None = None
    ) -> Contender:
        """Return `times` passes over the images by our backend. Raises UserError if it cannot run here."""
        count, files = len(self.images.encoded), BACKENDS[backend].files
        if lack := loading.lacking_library(backend):
            raise UserError(lack)
        if files is Files.BETONS and not self.ffcv:
            raise UserError("name a directory made by karat prepare ffcv with --ffcv")
        by_files: dict[Files | None, Any] = {Files.IMAGES: self.images.folder, Files.BETONS: self.ffcv}
        path = str(by_files.get(files, self.images.shards))
        chosen = {"backend": backend, "path": path, "decoder": decoder, "workers": workers}
        config = DataConfig.model_validate({**chosen, "on_bad_sample": "skip", "synthetic_samples": count})
        opened = open_backend(ImageSpec(config, augment or self.augment, loading.SIZE, loading.CLASSES, 0))
        if opened.num_train < count:
            raise UserError(f"{path} has {opened.num_train} images, fewer than --images {count}; set --images lower")
        plan = TrainPlan(0, count, self.batch, self.batch, 0, 1)

        def run() -> None:
            for _ in opened.train_batches(plan.slices(0, times * plan.steps_per_epoch)):
                pass

        return run
