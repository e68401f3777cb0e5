"""`karat bench data`: images a second and core from each backend, beside whole decodes and the loaders of others.

A core's second is a second of processor time, of this process and its workers, so neighbours on the machine do not
count. Contenders run in turn over the same images; 1.0 is a whole decode by libjpeg-turbo, with no crop, resize or
batch.
"""

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from karat_scale import tables
from karat_scale.bench import data_peers as peers
from karat_scale.bench import library_loaders as libraries
from karat_scale.bench.interleave import interleaved_seconds, median_ratio, processor_seconds
from karat_scale.bench.sample_images import CLASSES, SampleImages, prepare_images
from karat_scale.data.backends import Backend, ImageSpec, open_backend
from karat_scale.data.formats.beton import beton_path, read_record
from karat_scale.data.formats.shards import ShardSplit
from karat_scale.data.plan import TrainPlan
from karat_scale.errors import UserError
from karat_scale.files import write_atomically
from karat_scale.machine import usable_cores
from karat_scale.recipe import AugmentConfig, DataConfig
from karat_scale.tables import Files

BACKENDS = tuple(tables.BACKENDS)
# Under each backend's name, the decoders to run it with.
DECODERS = {"webdataset": tuple(tables.DECODERS)}
SIZE, BATCH = 224, 64
# How often a loader goes over the images in one go: training starts its workers once, not for each few hundred images.
PASSES = 4
# The same where two workers are compared with one: seconds of decoding beside the tenth of a second that a start takes.
SCALING_PASSES, SCALING_ROUNDS = 20, 2
FFCV, DALI = "FFCV's Loader, uint8", "DALI's pipeline, CPU, uint8"
AUGMENTS = {
    # What every peer has too, as torchvision's reference recipe draws it.
    "crop": AugmentConfig(ratio=(3 / 4, 4 / 3), color_jitter=0, randaugment="", interpolation="bilinear"),
    "paper": AugmentConfig(color_jitter=0.4),
}
TWO_WORKERS, ONE_WORKER = "2 workers", "1 worker"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    shards: a directory of shards, or tar: a tar of JPEGs; without either photo-like images are made. ffcv: a
    directory made by data_prep/make_ffcv.py, for the backend of that name. backends: which to measure, all by
    default. augment: "crop" for random resized crop and flip, or "paper" for the paper's whole augmentation. workers:
    of each loader, 0 for none. images: how many at most.
    """

    shards: str | None = None
    tar: str | None = None
    ffcv: str | None = None
    backends: Sequence[str] | None = None
    augment: str = "crop"
    workers: int = 1
    images: int = 512
    rounds: int = 7


def bench_data(plan: Plan, json_file: str | None) -> int:
    """Measure, print a table, and write `json_file`; returns 0. Raises UserError for what cannot be measured."""
    backends = list(plan.backends or BACKENDS)
    for name in backends:
        if name not in BACKENDS:
            raise UserError(f"--backend {name}: no such backend; choose from {', '.join(BACKENDS)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="karat-bench-") as scratch:
        images = prepare_images(Path(scratch), plan.images, plan.shards, plan.tar)
        bench = _Bench(images, AUGMENTS[plan.augment], plan.workers, plan.ffcv)
        contenders, missing = bench.contenders(backends)
        seconds = interleaved_seconds(contenders, plan.rounds, processor_seconds)
        scaling = _scaling(bench, min(plan.rounds, SCALING_ROUNDS)) if "webdataset" in backends else None
    base = next(iter(contenders))
    used = {name: bench.images_of(name) for name in contenders}
    result = {
        "source": images.source,
        "images": len(images.encoded),
        "mean_kb": round(1e3 * images.megabytes / len(images.encoded), 1),
        "augment": plan.augment,
        "workers": plan.workers,
        "rounds": plan.rounds,
        "cores": usable_cores(),
        "base": base,
        "rows": [
            {
                "contender": name,
                "images_per_core_second": round(used[name] / statistics.median(seconds[name]), 1),
                "ratio": round(used[name] / used[base] / median_ratio(seconds, name, base), 3),
            }
            for name in contenders
        ],
        "not_measured": missing,
        "two_workers_over_one": scaling,
    }
    _print(result)
    if json_file:
        write_atomically(Path(json_file), json.dumps(result, indent=2) + "\n")
    return 0


class _Bench:
    """The contenders over one set of images."""

    def __init__(self, images: SampleImages, augment: AugmentConfig, workers: int, ffcv: str | None) -> None:
        self._images, self._augment, self._workers, self._ffcv = images, augment, workers, ffcv
        self._batch = min(BATCH, len(images.encoded))
        # Loaders drop the last incomplete batch.
        whole_batches = len(images.encoded) // self._batch * self._batch
        self._load = peers.Load(SIZE, self._batch, workers, PASSES * whole_batches)
        self._whole: set[str] = set()

    def images_of(self, name: str) -> int:
        """How many images a contender goes over."""
        return len(self._images.encoded) if name in self._whole else self._load.images

    def contenders(self, backends: list[str]) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
        """What can run, by name, the base of all ratios first; and why others cannot."""
        images, augment, load = self._images, self._augment, self._load
        found: dict[str, Callable[[], object]] = {}
        missing: dict[str, str] = {}
        if simple := peers.decode_whole_by_simplejpeg(images.encoded):
            found["whole decode, simplejpeg"] = simple
        else:
            missing["whole decode, simplejpeg"] = "pip install simplejpeg"
        found["whole decode, torchvision"] = peers.decode_whole_by_torchvision(images.encoded)
        found["reading bytes alone"] = self._read_bytes
        self._whole = set(found)
        found["Pillow ImageFolder, float32"] = peers.image_folder(images.folder, augment, load)
        if not augment.randaugment:
            found["torchvision decode and crop, uint8"] = peers.torchvision_uint8(images.encoded, augment, load)
            found |= self._library_loaders(backends)
        for backend in backends:
            for decoder in DECODERS.get(backend, ("auto",)):
                name = f"karat {backend}" + ("" if decoder == "auto" else f", {decoder}")
                reason = self._lacks(backend)
                try:
                    if not reason:
                        found[name] = self.passes(backend, decoder, self._workers)
                except UserError as error:
                    reason = str(error)
                if reason:
                    missing[name] = reason
        return found, missing

    def _library_loaders(self, backends: list[str]) -> dict[str, Callable[[], object]]:
        """Of those backends that can run."""
        found: dict[str, Callable[[], object]] = {}
        if "ffcv" in backends and not self._lacks("ffcv"):
            beton = beton_path(Path(self._ffcv or ""), "train")
            samples = min(len(self._images.encoded), read_record(beton).samples)
            found[FFCV] = libraries.ffcv_loader(beton, samples, self._augment, self._load)
        if "dali" in backends and not self._lacks("dali"):
            found[DALI] = libraries.dali_loader(self._images.folder, self._augment, self._load)
        return found

    def passes(self, backend: str, decoder: str, workers: int, times: int = PASSES) -> Callable[[], object]:
        """Goes over the images by our backend, `times` over. Raises UserError where it cannot be opened."""
        by_files: dict[Files | None, Path] = {Files.IMAGES: self._images.folder, Files.BETONS: Path(self._ffcv or "")}
        path = by_files.get(tables.BACKENDS[backend].files, self._images.shards)
        config = DataConfig.model_validate(
            {
                "backend": backend,
                "path": str(path),
                "decoder": decoder,
                "workers": workers,
                "on_bad_sample": "skip",
                "synthetic_samples": len(self._images.encoded),
            }
        )
        return self._passes_of(open_backend(ImageSpec(config, self._augment, SIZE, CLASSES, 0)), times)

    def _passes_of(self, backend: Backend, times: int = PASSES) -> Callable[[], object]:
        plan = TrainPlan(0, min(backend.num_train, len(self._images.encoded)), self._batch, self._batch, 0, 1)

        def run() -> None:
            for _ in backend.train_batches(plan.slices(0, times * plan.steps_per_epoch)):
                pass

        return run

    def _lacks(self, backend: str) -> str:
        if lacking := libraries.lacking(backend):
            return lacking
        if backend == "ffcv" and not self._ffcv:
            return "name a directory made by data_prep/make_ffcv.py with --ffcv"
        return ""

    def _read_bytes(self) -> None:
        split = ShardSplit(self._images.shards, "train", CLASSES)
        for sample_id in range(len(split)):
            split.read(sample_id)
        split.close()


def _scaling(bench: _Bench, rounds: int) -> dict[str, float]:
    """Wall time and processor time of one worker over those of two. Wall time needs two idle cores."""
    contenders = {
        ONE_WORKER: bench.passes("webdataset", "auto", 1, SCALING_PASSES),
        TWO_WORKERS: bench.passes("webdataset", "auto", 2, SCALING_PASSES),
    }
    wall = interleaved_seconds(contenders, rounds)
    processor = interleaved_seconds(contenders, rounds, processor_seconds)
    return {
        "wall": round(median_ratio(wall, ONE_WORKER, TWO_WORKERS), 2),
        "processor": round(median_ratio(processor, ONE_WORKER, TWO_WORKERS), 2),
    }


def _print(result: dict[str, Any]) -> None:
    what = "random resized crop and flip" if result["augment"] == "crop" else "the paper's augmentation"
    title = f"{result['images']} images of {result['mean_kb']:.0f} KB ({Path(result['source']).name}), {what}, "
    table = Table(title=title + f"workers: {result['workers']}")
    for column in ("contender", "images/s and core", "over whole decode"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for row in result["rows"]:
        table.add_row(row["contender"], f"{row['images_per_core_second']:.0f}", f"{row['ratio']:.2f}")
    console = Console()
    console.print(table)
    for name, reason in result["not_measured"].items():
        console.print(f"not measured: {name}: {reason}", markup=False)
    if scaling := result["two_workers_over_one"]:
        console.print(
            f"two workers over one: {scaling['wall']:.2f} times as fast by the clock (on {result['cores']} cores, "
            f"if idle), {scaling['processor']:.2f} of the images a core's second"
        )
