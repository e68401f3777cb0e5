"""Convert images to FFCV's betons, for data.backend=ffcv and for FFCV's own Loader.

    python data_prep/make_ffcv.py --src DIR --out DIR

The source is a directory of shards made by make_webdataset.py, or any source of that script. Each split becomes one
beton with a JSON file and an index beside it (karat_scale/data/shards/beton.py). Sample ids are those of the shards
that the same options make. JPEGs are copied byte for byte, unless --write-mode or --max-resolution re-encodes them.

The same source and options give the same bytes. Run on a finished output, the script checks every byte and makes
damaged betons again. A run that was killed leaves a hidden file, or a record without its beton; the next run starts
that beton again and says so. The script needs FFCV: in the clone, pip install -e '.[ffcv]'.

Images are read, checked and packed in parallel, and one process writes them in order. They are packed so that every
reader gets the same pixels as from the shards. A JPEG that FFCV's decoder reads is stored byte for byte. An image it
cannot read (PNG, CMYK, ...) is stored as raw RGB pixels or, if these exceed a page (at least 8 MiB), as a JPEG with a
loss. A file that nothing reads is stored unchanged, and every reader of this project then treats it as a bad sample.
"""

import argparse
import functools
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from karat_scale.data.decoders.decode import UndecodableImageError, decode_rgb
from karat_scale.data.decoders.jpeg_header import read_frame, to_jpeg
from karat_scale.data.prepare import making
from karat_scale.data.prepare.images import Preparation
from karat_scale.data.prepare.sources import Source
from karat_scale.data.prepare.sources.tars import has_shards, open_shards
from karat_scale.data.shards import shard_format
from karat_scale.data.shards.beton import MAX_SIDE, BetonWriter, StoredImage, index_bytes, page_bytes
from karat_scale.foundation.arguments import count
from karat_scale.foundation.console import progress
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import commit_file, file_sha256, flush_to_disk, write_atomically

if TYPE_CHECKING:
    from karat_scale.data.decoders.libraries import FfcvJpegs

FIX = "use --max-resolution, or remove the image"


@dataclass(frozen=True)
class Packing:
    """The storage of images.

    mode: `jpg`; `raw`, decoded; `proportion`, a share `jpeg_share` of the samples, drawn by `seed`, as JPEG and the
    rest raw; `smart`, as JPEG if the pixels take more than `raw_below` bytes. max_resolution: the most pixels of the
    longer side. quality: the quality of JPEGs that are encoded here. page: the most bytes of a stored image; larger raw
    ones become JPEGs.
    """

    mode: str
    max_resolution: int | None
    quality: int
    jpeg_share: float
    raw_below: int
    seed: int
    page: int

    def pack(self, data: bytes, index: int, name: str) -> tuple[StoredImage, str]:
        """Return the image to store, and the reason if it cannot be decoded.

        Raises DataError if FFCV's format cannot hold it.
        """
        frame, limit = read_frame(data), self.max_resolution or sys.maxsize
        if frame and decoder()(data, frame) is None:
            frame = None
        if frame and max(frame.width, frame.height) <= limit and self._as_jpeg(index, frame.width, frame.height):
            return self._checked(StoredImage("jpg", frame.width, frame.height, data), name), ""
        try:
            image = decode_rgb(data)
        except UndecodableImageError as error:
            return self._checked(StoredImage("jpg", 1, 1, data), name), str(error)
        resized = max(image.size) > limit
        if resized:
            width, height = (max(1, round(side * limit / max(image.size))) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        if max(image.size) > MAX_SIDE:
            raise DataError(f"{name}: {image.width} x {image.height} pixels do not fit FFCV's format; {FIX}")
        # Pixels are encoded with a loss only if they are resized anyway or exceed a page.
        small = 3 * image.width * image.height <= self.page
        if small and not (resized and self._as_jpeg(index, *image.size)):
            return StoredImage("raw", *image.size, image.tobytes()), ""
        encoded = data if frame and not resized else to_jpeg(image, self.quality)
        return self._checked(StoredImage("jpg", *image.size, encoded), name), ""

    def _as_jpeg(self, index: int, width: int, height: int) -> bool:
        if self.mode == "smart":
            return 3 * width * height > self.raw_below
        if self.mode == "proportion":
            return random.Random(f"{self.seed} {index}").random() < self.jpeg_share
        return self.mode == "jpg"

    def _checked(self, image: StoredImage, name: str) -> StoredImage:
        if len(image.data) > self.page:
            raise DataError(f"{name}: {len(image.data)} bytes are more than a page of {self.page}; {FIX}")
        return image


CHUNK = 8


@dataclass(frozen=True)
class BetonJob(making.Job):
    """One split to make: its samples in their order, and how they are stored."""

    order: npt.NDArray[np.int64]
    packing: Packing
    names: list[str]

    @property
    def path(self) -> Path:
        """The path of the beton."""
        return shard_format.beton_path(self.out, self.split)

    @property
    def unfinished(self) -> Path:
        """The beton's name until it is complete."""
        return self.out / f".{self.path.name}.unfinished"


@functools.cache
def decoder() -> "FfcvJpegs":
    """Return FFCV's decoder, one in each process."""
    from karat_scale.data.decoders.libraries import FfcvJpegs

    return FfcvJpegs()


def pack_images(job: BetonJob, indices: list[int]) -> tuple[list[tuple[int, StoredImage]], making.Notes]:
    """Prepare and pack some images of a job; returns them with their samples' indices, and the notes about all."""
    notes, images = making.Notes(), []
    for index in indices:
        prepared = job.prepare(index, notes)
        if prepared is not None:
            path = job.source.name(index)
            image, undecodable = job.packing.pack(prepared.data, index, path)
            notes.stored(path, prepared, int(job.source.labels[index]), prepared.odd or undecodable)
            images.append((index, image))
    return images, notes


def write_beton(job: BetonJob, workers: int) -> shard_format.BetonRecord:
    """Write a beton, after its index and its record. Raises DataError if no image is left or a process dies.

    The beton gets its name last: a run that is killed before leaves a record without its beton, which readers refuse
    and the next run makes again.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    chunks = [job.order[start : start + CHUNK].tolist() for start in range(0, len(job.order), CHUNK)]
    keys: list[str] = []
    modes: Counter[str] = Counter()
    notes = making.Notes()
    try:
        with (
            progress(f"{job.split}: writing", len(job.order), "images") as advance,
            BetonWriter(job.unfinished, len(job.order), job.packing.page) as writer,
        ):
            packed = making.run_in_processes(functools.partial(pack_images, job), chunks, workers)
            for chunk, (images, found) in zip(chunks, packed, strict=True):
                for index, image in images:
                    writer.add(image, int(job.source.labels[index]))
                    keys.append(job.source.key(index))
                    modes[image.mode] += 1
                notes.add(found)
                advance(len(chunk))
            fields = job.record_fields(notes)
            index_content = index_bytes(writer.finish(), keys)
        flush_to_disk(job.unfinished)  # which may take minutes
        record = shard_format.BetonRecord(
            name=job.path.name,
            bytes=job.unfinished.stat().st_size,
            sha256=file_sha256(job.unfinished),
            samples=len(keys),
            index=shard_format.file_record(shard_format.index_path(job.path).name, index_content),
            split=job.split,
            classes=job.source.classes,
            names=job.names,
            modes=dict(sorted(modes.items())),
            **fields,
        )
        write_atomically(job.out / record.index.name, index_content)
        write_atomically(shard_format.record_path(job.path), record.model_dump_json(indent=1) + "\n")
        commit_file(job.unfinished, job.path)
    except BaseException:
        job.unfinished.unlink(missing_ok=True)
        raise
    return record


# The options that say how images are stored.
SETTINGS = ("write_mode", "max_resolution", "quality", "compress_probability", "smart_threshold")
# FFCV's own defaults.
QUALITY, JPEG_SHARE = 90, 0.5
# A page has room for this much where only the mean size of images is known.
ROOM_BYTES = 64 << 20


def plan_job(split: str, source: Source, names: list[str], options: argparse.Namespace) -> BetonJob:
    """Return the job of one split, from the command line."""
    beton = shard_format.beton_path(options.out, split)
    found = shard_format.read_record(beton).made if shard_format.record_path(beton).exists() else {}
    from_shards = has_shards(options.src)
    order = np.arange(len(source)) if from_shards else making.shuffled(source, options.seed, options.subset)
    check = making.check_of(options, source, found)
    preparation = None if from_shards else Preparation(check, options.on_odd, exif=options.exif)
    settings = {name: getattr(options, name) for name in SETTINGS}
    made = making.made_by("make_ffcv.py", source, options, preparation, from_shards=from_shards, **settings)
    packing = Packing(
        options.write_mode,
        options.max_resolution,
        options.quality,
        JPEG_SHARE if options.compress_probability is None else options.compress_probability,
        options.smart_threshold or 0,
        options.seed,
        page_bytes(max(int(source.sizes.max()), 0 if source.exact_sizes else ROOM_BYTES)),
    )
    return BetonJob(split, source, options.out, preparation, made, order, packing, names)


def check_split(job: BetonJob, found: shard_format.BetonRecord, workers: int) -> None:
    """Check a finished beton byte for byte; make it again if it is damaged. Raises DataError for other settings."""
    job.check_settings(found.made, f"{job.path} was", f"{shard_format.record_path(job.path)} and {job.path}")
    if damage := shard_format.damage_of(job.out, found, shard_format.BETON_WORDING):
        print(f"{damage}; making it again")
        again = write_beton(job, workers)
        if again.sha256 != found.sha256:
            print(f"{job.split}: the result differs from before, so its record is new too")
    print(f"{job.split}: {found.samples} samples in {job.path.name} are complete and correct")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line. Raises DataError for options that exclude each other."""
    parser = making.source_parser("Convert shards, an ImageFolder, or a data set's official files, to FFCV's betons.")
    parser.add_argument(
        "--write-mode",
        choices=("jpg", "raw", "proportion", "smart"),
        default="jpg",
        help="JPEG, raw pixels, a share as JPEG (--compress-probability), or large ones (--smart-threshold)",
    )
    parser.add_argument("--max-resolution", type=count, metavar="S", help="resize: longer side of at most S pixels")
    parser.add_argument(
        "--quality", type=count, default=QUALITY, metavar="Q", help=f"quality of resized JPEGs (default {QUALITY})"
    )
    parser.add_argument(
        "--compress-probability", type=float, metavar="P", help=f"share of JPEGs in proportion (default {JPEG_SHARE})"
    )
    parser.add_argument("--smart-threshold", type=count, metavar="BYTES", help="smart: JPEG if pixels take more")
    options = parser.parse_args(arguments)
    making.check_source_options(options)
    if options.quality > 100:
        raise DataError(f"--quality {options.quality} is more than 100; use 90, for example")
    for mode, name in (("smart", "smart_threshold"), ("proportion", "compress_probability")):
        if getattr(options, name) is not None and options.write_mode != mode:
            raise DataError(f"--{name.replace('_', '-')} needs --write-mode {mode}")
    # FFCV itself would then store everything raw.
    if options.write_mode == "smart" and options.smart_threshold is None:
        raise DataError("--write-mode smart needs --smart-threshold BYTES, such as 150528 for 224 x 224 pixels")
    if options.compress_probability is not None and not 0 <= options.compress_probability <= 1:
        raise DataError(
            f"--compress-probability {options.compress_probability} is not between 0 and 1; use 0.5, for example"
        )
    if has_shards(options.src):
        heeded = {"src", "out", "dry_run", "split", "workers"}
        if options.write_mode == "proportion":  # which also draws by the seed
            heeded.add("seed")
        for name, default in vars(making.source_parser("").parse_args(["--src", "", "--out", ""])).items():
            if name not in heeded and getattr(options, name) != default:
                raise DataError(f"--{name.replace('_', '-')} applies only when shards are made; remove it")
    return options


def open_source(options: argparse.Namespace) -> tuple[dict[str, Source], list[str]]:
    """Return the requested splits, and the classes' readable names. Raises DataError."""
    if has_shards(options.src):
        shards, names = open_shards(options.src, options.split)
        return dict(shards), names
    there = sorted(options.out.glob("*.beton.json"))
    classes = shard_format.read_record(there[0].with_suffix("")).classes if there else None
    sources = making.open_chosen(options, classes)
    return sources, making.class_names(options, next(iter(sources.values())).classes)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    from karat_scale.data.decoders.libraries import require_ffcv  # imports torch, for which no mistake should wait

    require_ffcv()
    sources, names = open_source(options)
    making.settle(options, sources)
    jobs = [plan_job(split, source, names, options) for split, source in sources.items()]
    for job in jobs:
        if options.dry_run:
            job.print_plan(job.order, str(job.path))
            continue
        options.out.mkdir(parents=True, exist_ok=True)
        with making.alone_in(options.out / f".{job.split}.making", made=True):
            if shard_format.record_path(job.path).exists():
                check_split(job, shard_format.read_record(job.path), options.workers)
                continue
            if job.path.exists():
                raise DataError(
                    f"{job.path} exists and was not finished by this script; delete it or use another --out"
                )
            if job.unfinished.exists():
                print(f"{job.split}: an earlier run did not finish; starting again")
            record = write_beton(job, options.workers)
            modes = ", ".join(f"{count} {mode}" for mode, count in record.modes.items())
            job.print_result(record, f"({modes}) in {record.name}", shard_format.record_path(job.path).name)
