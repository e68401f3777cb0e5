"""`karat bench data`: images per second and core from each backend and decoder, next to whole decodes.

A core's second is a second of processor time, of this process and its workers, so other processes on the machine do not
count. Contenders run in turn over the same images: some of yours, or photo-like ones made here, in each backend's
layout. 1.0 is a whole decode by libjpeg-turbo, with no crop, resize or batch. `python -m benchmarks.data_peers` adds
the loaders of other libraries.
"""

import io
import itertools
import statistics
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from karat_scale.commands.bench.measuring import interleaved_seconds, median_ratio, processor_seconds
from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.decoders.decode import UndecodableImageError, decode_rgb
from karat_scale.data.decoders.jpeg_header import read_frame
from karat_scale.data.decoders.pillow import JpegDecoder, find_jpeg_decoder
from karat_scale.data.plan import TrainPlan
from karat_scale.data.shards.shard_format import DatasetRecord, SplitRecord, write_dataset_record
from karat_scale.data.shards.shard_writer import EncodedSample, shard_name, write_shard
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.foundation import tables
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import DataError, RecipeError, UserError
from karat_scale.foundation.machine import usable_cores
from karat_scale.recipe import AugmentConfig, DataConfig

CLASSES, PER_SHARD = 10, 100
# As ImageNet's files are: a median of 500 x 375 pixels, and about 110 KB.
LONG_SIDE, SHORT_SIDE, QUALITY = 500, 375, 93
OCTAVES, NOISE = 7, 12.0
JPEG_ENDINGS = (".jpg", ".jpeg")


@dataclass(frozen=True)
class SampleImages:
    """Encoded images in memory, as shards, and as an ImageFolder. Each split holds the same images."""

    encoded: tuple[bytes, ...]
    shards: Path
    folder: Path
    source: str

    @property
    def megabytes(self) -> float:
        return sum(len(data) for data in self.encoded) / 1e6


def prepare_images(scratch: Path, count: int, shards: str | None, tar: str | None) -> SampleImages:
    """Up to `count` images of a directory of shards, of a tar, or made here, laid out under `scratch`.

    Only grey and colour JPEGs that are whole, which every contender can read. Raises DataError where there are none.
    """
    if shards:
        found, source = _from_shards(shards), shards
    elif tar:
        found, source = _from_tar(tar), tar
    else:
        found, source = (photo_like(seed) for seed in itertools.count()), "made here"
    encoded = list(itertools.islice(filter(_is_ordinary, found), count))
    if not encoded:
        raise DataError(f"{source} holds no JPEG; name another by --path or --tar")
    _write_shards(scratch / "shards", encoded)
    _write_folder(scratch / "folder", encoded)
    return SampleImages(tuple(encoded), scratch / "shards", scratch / "folder", source)


def photo_like(seed: int) -> bytes:
    """A JPEG with detail at every scale, as photographs have; the same for the same seed."""
    rng = np.random.default_rng(seed)
    size = (LONG_SIDE, SHORT_SIDE) if seed % 4 else (SHORT_SIDE, LONG_SIDE)
    pixels = np.full((size[1], size[0], 3), 128.0)
    for octave in range(1, OCTAVES + 1):
        cells = rng.uniform(-1, 1, (2**octave, 2**octave, 3))
        # Brightness varies more than colour.
        cells = 0.7 * cells.mean(axis=2, keepdims=True) + 0.3 * cells
        as_image = Image.fromarray((127.5 + 127.5 * cells).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        pixels += (np.asarray(as_image) - 127.5) * 2.6 / 1.45**octave
    pixels += rng.normal(0, NOISE, pixels.shape[:2])[..., None]
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _is_ordinary(data: bytes) -> bool:
    frame = read_frame(data)
    if frame is None or not frame.is_grey_or_colour:
        return False
    try:
        decode_rgb(data)
    except UndecodableImageError:
        return False
    return True


def _from_shards(directory: str) -> Iterator[bytes]:
    split = ShardSplit(directory, "train", num_classes=1 << 30)
    try:
        yield from map(split.read, range(len(split)))
    finally:
        split.close()


def _from_tar(path: str) -> Iterator[bytes]:
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.lower().endswith(JPEG_ENDINGS) and (file := tar.extractfile(member)):
                    yield file.read()
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"--tar {path} cannot be read: {error}") from error


def _write_shards(directory: Path, encoded: list[bytes]) -> None:
    directory.mkdir()
    record = DatasetRecord(classes=[_class_name(label) for label in range(min(CLASSES, len(encoded)))])
    samples = [EncodedSample(f"{i:06d}", "jpg", data, i % CLASSES) for i, data in enumerate(encoded)]
    for split in ("train", "val"):
        written = [
            write_shard(directory, shard_name(split, number), samples[start : start + PER_SHARD])
            for number, start in enumerate(range(0, len(samples), PER_SHARD))
        ]
        record.splits[split] = SplitRecord(
            samples=len(samples), bytes=sum(shard.bytes for shard in written), shards=written
        )
    write_dataset_record(directory, record)


def _write_folder(directory: Path, encoded: list[bytes]) -> None:
    for split in ("train", "val"):
        for label in range(min(CLASSES, len(encoded))):
            (directory / split / _class_name(label)).mkdir(parents=True)
        for number, data in enumerate(encoded):
            (directory / split / _class_name(number % CLASSES) / f"{number:06d}.jpg").write_bytes(data)


def _class_name(label: int) -> str:
    return f"class-{label:02d}"


BACKENDS = tuple(tables.BACKENDS)
# Under each backend's name, the decoders to run it with.
DECODERS = {"webdataset": tuple(tables.DECODERS)}
SIZE, BATCH = 224, 64
# How often a loader goes over the images in one go: training starts its workers once, not for each few hundred images.
PASSES = 4
# The same where two workers are compared with one: seconds of decoding beside the tenth of a second that a start takes.
SCALING_PASSES, SCALING_ROUNDS = 20, 2
AUGMENTS = {
    # What every peer has too, as torchvision's reference recipe draws it.
    "crop": AugmentConfig(ratio=(3 / 4, 4 / 3), color_jitter=0, randaugment="", interpolation="bilinear"),
    "paper": AugmentConfig(),
    "device": AugmentConfig(run_on="device"),
}
DESCRIPTIONS = {
    "crop": "random resized crop and flip",
    "paper": "the paper's augmentation",
    "device": "the workers' part of augment.run_on=device",
}
TWO_WORKERS, ONE_WORKER = "2 workers", "1 worker"

Contender = Callable[[], object]


@dataclass(frozen=True)
class Plan:
    """The images and contenders to measure.

    shards: a directory of shards, or tar: a tar of JPEGs; without either, photo-like images are made. ffcv: a
    directory made by data_prep/make_ffcv.py, for the backend of that name. backends: which to measure, all by
    default. augment: "crop" for random resized crop and flip, "paper" for the paper's whole augmentation, or "device"
    for what the workers do of it if the device does the rest. workers: of each loader, 0 for none. images: how many at
    most.
    """

    shards: str | None = None
    tar: str | None = None
    ffcv: str | None = None
    backends: Sequence[str] | None = None
    augment: str = "crop"
    workers: int = 1
    images: int = 512
    rounds: int = 7


def bench_data(
    plan: Plan, json_file: str | None, more: "Callable[[Contenders], dict[str, Contender]]" = lambda _: {}
) -> int:
    """Measure, print a table, and write `json_file`; returns 0. Raises UserError for what cannot be measured.

    `more` returns further contenders, each of which goes over `Contenders.loader_images` images.
    """
    backends = list(plan.backends or BACKENDS)
    for name in backends:
        if name not in BACKENDS:
            raise UserError(f"--backend {name}: no such backend; choose from {', '.join(BACKENDS)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="karat-bench-") as scratch:
        images = prepare_images(Path(scratch), plan.images, plan.shards, plan.tar)
        ours = Contenders(images, plan, backends)
        whole = ours.whole()
        loaders = {**ours.backends(), **more(ours)}
        seconds = interleaved_seconds({**whole, **loaders}, plan.rounds, processor_seconds)
        has_webdataset = "webdataset" in backends
        scaling = _scaling(ours, min(plan.rounds, SCALING_ROUNDS)) if has_webdataset else None
        device = _device_over_crop(ours, plan.rounds) if has_webdataset and plan.augment == "device" else None
    base = next(iter(whole))
    used = {**dict.fromkeys(whole, len(images.encoded)), **dict.fromkeys(loaders, ours.loader_images)}
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
            for name in used
        ],
        "not_measured": ours.missing,
        "two_workers_over_one": scaling,
        "device_over_crop": device,
    }
    _print(result)
    write_json(json_file, result)
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


def lacking_library(backend: str) -> str:
    """Return what to type to install a backend's library; empty if it is installed or none is needed."""
    extra = tables.BACKENDS[backend].extra
    return "" if not extra or tables.is_installed(tables.EXTRAS[extra].module) else tables.how_to_install(extra)


class Contenders:
    """The contenders over one set of images. `missing`: the reasons why some cannot run, by name."""

    def __init__(self, images: SampleImages, plan: Plan, backends: Sequence[str]) -> None:
        self.images, self.augment, self.requested = images, AUGMENTS[plan.augment], backends
        self.ffcv, self.workers = Path(plan.ffcv or ""), plan.workers
        self.batch = min(BATCH, len(images.encoded))
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
        found["reading bytes alone"] = self._read_bytes
        return found

    def backends(self) -> dict[str, Contender]:
        """Return the passes of each requested backend that can run, by each of its decoders."""
        found: dict[str, Contender] = {}
        for backend in self.requested:
            for decoder in DECODERS.get(backend, ("auto",)):
                name = f"karat {backend}" + ("" if decoder == "auto" else f", {decoder}")
                reason = self.lacks(backend)
                try:
                    if not reason:
                        found[name] = self.passes(backend, decoder, self.workers)
                except UserError as error:
                    reason = str(error)
                if reason:
                    self.missing[name] = reason
        return found

    def passes(
        self, backend: str, decoder: str, workers: int, times: int = PASSES, augment: AugmentConfig | None = None
    ) -> Contender:
        """Return `times` passes over the images by our backend. Raises UserError if it cannot be opened."""
        by_files: dict[tables.Files | None, Path] = {
            tables.Files.IMAGES: self.images.folder,
            tables.Files.BETONS: self.ffcv,
        }
        path = by_files.get(tables.BACKENDS[backend].files, self.images.shards)
        config = DataConfig.model_validate(
            {
                "backend": backend,
                "path": str(path),
                "decoder": decoder,
                "workers": workers,
                "on_bad_sample": "skip",
                "synthetic_samples": len(self.images.encoded),
            }
        )
        opened = open_backend(ImageSpec(config, augment or self.augment, SIZE, CLASSES, 0))
        plan = TrainPlan(0, min(opened.num_train, len(self.images.encoded)), self.batch, self.batch, 0, 1)

        def run() -> None:
            for _ in opened.train_batches(plan.slices(0, times * plan.steps_per_epoch)):
                pass

        return run

    def lacks(self, backend: str) -> str:
        """Return why a backend cannot run; empty if it can."""
        if lacking := lacking_library(backend):
            return lacking
        if backend == "ffcv" and self.ffcv == Path():
            return "name a directory made by data_prep/make_ffcv.py with --ffcv"
        return ""

    def _read_bytes(self) -> None:
        split = ShardSplit(self.images.shards, "train", CLASSES)
        for sample_id in range(len(split)):
            split.read(sample_id)
        split.close()


def _scaling(ours: Contenders, rounds: int) -> dict[str, float]:
    """Return wall and processor time of one worker over those of two. Wall time needs two idle cores."""
    contenders = {
        ONE_WORKER: ours.passes("webdataset", "auto", 1, SCALING_PASSES),
        TWO_WORKERS: ours.passes("webdataset", "auto", 2, SCALING_PASSES),
    }
    wall = interleaved_seconds(contenders, rounds)
    processor = interleaved_seconds(contenders, rounds, processor_seconds)
    return {
        "wall": round(median_ratio(wall, ONE_WORKER, TWO_WORKERS), 2),
        "processor": round(median_ratio(processor, ONE_WORKER, TWO_WORKERS), 2),
    }


def _device_over_crop(ours: Contenders, rounds: int) -> float:
    """Return the processor time of the workers' part of augment.run_on=device over that of the same crop and flip."""
    crop = ours.augment.changed(randaugment="", color_jitter=0.0, erasing=0.0)
    contenders = {
        name: ours.passes("webdataset", "auto", ours.workers, augment=augment)
        for name, augment in (("device", ours.augment), ("crop", crop))
    }
    seconds = interleaved_seconds(contenders, rounds, processor_seconds)
    return round(median_ratio(seconds, "device", "crop"), 3)


def _print(result: dict[str, Any]) -> None:
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
