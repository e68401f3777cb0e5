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
cannot read (PNG, CMYK, ...) is stored as raw RGB pixels. A file that nothing reads is stored unchanged, and every
reader of this project then treats it as a bad sample.
"""

import argparse
import functools
import hashlib
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from karat_scale.data.decoders.decode import UndecodableImageError, decode_rgb
from karat_scale.data.decoders.jpeg_header import read_frame, to_jpeg
from karat_scale.data.decoders.libraries import FfcvJpegs, require_ffcv
from karat_scale.data.prepare.images import Preparation
from karat_scale.data.prepare.job import (
    Job,
    Notes,
    add_source_options,
    check_source_options,
    class_names,
    made_by,
    make_parser,
    open_chosen,
    run_in_processes,
    settle_check,
    shuffled,
)
from karat_scale.data.prepare.sources import Source, default_exif
from karat_scale.data.prepare.sources.tars import has_shards, open_shards
from karat_scale.data.shards import shard_format
from karat_scale.data.shards.beton import MAX_SIDE, BetonWriter, StoredImage, index_bytes, page_bytes
from karat_scale.foundation.arguments import OneLineParser, count
from karat_scale.foundation.console import progress
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import commit_file, file_sha256, flush_to_disk, write_atomically

WriteMode = Literal["jpg", "raw", "proportion", "smart"]
FIX = "use --max-resolution, or remove it"


@dataclass(frozen=True)
class Packing:
    """The storage of images.

    mode: `jpg`; `raw`, decoded; `proportion`, a share `jpeg_share` of the samples, drawn by `seed`, as JPEG and the
    rest raw; `smart`, as JPEG if the pixels take more than `raw_below` bytes. max_resolution: longer side limited
    to this many pixels. quality: of the JPEGs that are re-encoded, the resized ones. page: the most bytes of a stored
    image; larger raw ones become JPEGs.
    """

    mode: WriteMode
    max_resolution: int | None
    quality: int
    jpeg_share: float
    raw_below: int
    seed: int
    page: int


class Packer:
    """Packs images, in one process."""

    def __init__(self, packing: Packing) -> None:
        self._packing = packing
        self._decode = FfcvJpegs()

    def pack(self, data: bytes, index: int, name: str) -> tuple[StoredImage, str]:
        """Return what to store of an image, and, if it cannot be decoded, the reason.

        Raises DataError if FFCV's format cannot hold it.
        """
        frame = read_frame(data)
        if frame and not (frame.is_grey_or_colour and self._decode(data, frame) is not None):
            frame = None
        if frame and self._keeps_size(frame.width, frame.height) and self._as_jpeg(index, frame.width, frame.height):
            return self._checked(StoredImage("jpg", frame.width, frame.height, data), name), ""
        try:
            image = decode_rgb(data)
        except UndecodableImageError as error:
            return self._checked(StoredImage("jpg", 1, 1, data), name), str(error)
        resized = not self._keeps_size(*image.size)
        if resized:
            image = self._resized(image)
        if max(image.size) > MAX_SIDE:
            raise DataError(f"{name}: {image.width} x {image.height} pixels do not fit FFCV's format; {FIX}")
        # Only pixels that come from a JPEG, or are resized anyway, may be encoded with a loss.
        small = 3 * image.width * image.height <= self._packing.page
        if small and not (resized and self._as_jpeg(index, *image.size)):
            return StoredImage("raw", *image.size, image.tobytes()), ""
        encoded = data if frame and not resized else to_jpeg(image, self._packing.quality)
        return self._checked(StoredImage("jpg", *image.size, encoded), name), ""

    def _keeps_size(self, width: int, height: int) -> bool:
        limit = self._packing.max_resolution
        return limit is None or max(width, height) <= limit

    def _resized(self, image: Image.Image) -> Image.Image:
        limit = self._packing.max_resolution or max(image.size)
        width, height = (max(1, round(side * limit / max(image.size))) for side in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def _as_jpeg(self, index: int, width: int, height: int) -> bool:
        packing = self._packing
        if packing.mode == "smart":
            return 3 * width * height > packing.raw_below
        if packing.mode == "proportion":
            return random.Random(f"{packing.seed} {index}").random() < packing.jpeg_share
        return packing.mode == "jpg"

    def _checked(self, image: StoredImage, name: str) -> StoredImage:
        if len(image.data) > self._packing.page:
            raise DataError(f"{name}: {len(image.data)} bytes are more than a page of {self._packing.page}; {FIX}")
        return image


CHUNK = 8


@dataclass(frozen=True)
class BetonJob(Job):
    """One split to make: its samples in their order, and how they are stored."""

    order: npt.NDArray[np.int64]
    packing: Packing
    names: list[str]

    @property
    def path(self) -> Path:
        """The beton."""
        return shard_format.beton_path(self.out, self.split)

    @property
    def unfinished(self) -> Path:
        """The beton's name until it is complete."""
        return self.out / f".{self.path.name}.unfinished"


packer_of = functools.cache(Packer)  # one in each process


def pack_images(job: BetonJob, indices: list[int]) -> tuple[list[tuple[int, StoredImage]], Notes]:
    """Prepare and pack some images of a job; returns them with their samples' indices, and the notes about all."""
    notes, images = Notes(), []
    for index in indices:
        prepared = job.prepare(index, notes)
        if prepared is not None:
            path = job.source.name(index)
            image, undecodable = packer_of(job.packing).pack(prepared.data, index, path)
            notes.stored(path, prepared, int(job.source.labels[index]), prepared.odd or undecodable)
            images.append((index, image))
    return images, notes


def write_beton(job: BetonJob, workers: int) -> shard_format.BetonRecord:
    """Write a beton, after its index and its record. Raises DataError if no image is left or a process dies.

    The beton gets its name last: a run that is killed before leaves a record without its beton, which readers refuse
    and the next run makes again.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    try:
        record, index = _write_unfinished(job, workers)
        write_atomically(shard_format.index_path(job.path), index)
        write_atomically(shard_format.record_path(job.path), record.model_dump_json(indent=1) + "\n")
        commit_file(job.unfinished, job.path)
    except BaseException:
        job.unfinished.unlink(missing_ok=True)
        raise
    return record


def _write_unfinished(job: BetonJob, workers: int) -> tuple[shard_format.BetonRecord, bytes]:
    """Write the beton under its unfinished name; returns its record and its index."""
    chunks = [job.order[start : start + CHUNK].tolist() for start in range(0, len(job.order), CHUNK)]
    keys: list[str] = []
    modes: Counter[str] = Counter()
    notes = Notes()
    with (
        progress(f"{job.split}: writing", len(job.order), "images") as advance,
        BetonWriter(job.unfinished, len(job.order), job.packing.page) as writer,
    ):
        packed = run_in_processes(functools.partial(pack_images, job), chunks, workers)
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
    index_hash = hashlib.sha256(index_content).hexdigest()
    record = shard_format.BetonRecord(
        name=job.path.name,
        bytes=job.unfinished.stat().st_size,
        sha256=file_sha256(job.unfinished),
        samples=len(keys),
        index=shard_format.FileRecord(
            name=shard_format.index_path(job.path).name, bytes=len(index_content), sha256=index_hash
        ),
        split=job.split,
        classes=job.source.classes,
        names=job.names,
        modes=dict(sorted(modes.items())),
        **fields,
    )
    return record, index_content


# FFCV's own defaults.
QUALITY, JPEG_SHARE = 90, 0.5
# A page has room for this much where only the mean size of images is known.
ROOM_BYTES = 64 << 20


def plan_job(split: str, source: Source, names: list[str], options: argparse.Namespace) -> BetonJob:
    """Return the job of one split, from the command line."""
    from_shards = has_shards(options.src)
    order = np.arange(len(source)) if from_shards else shuffled(source, options.seed, options.subset)
    exif = options.exif or default_exif(source.classes)
    preparation = None if from_shards else Preparation(options.check, options.on_odd, exif=exif)
    made = made_by(
        "make_ffcv.py",
        source,
        options,
        from_shards=from_shards,
        write_mode=options.write_mode,
        max_resolution=options.max_resolution,
        quality=options.quality,
        compress_probability=options.compress_probability,
        smart_threshold=options.smart_threshold,
        check=preparation and options.check,
        on_odd=preparation and options.on_odd,
        exif=preparation and exif,
    )
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


def make_split(job: BetonJob, workers: int) -> shard_format.BetonRecord:
    """Write the beton of a split. Raises DataError if a file that we did not make is in the way."""
    if job.path.exists() and not shard_format.record_path(job.path).exists():
        raise DataError(f"{job.path} exists and was not finished by this script; delete it or use another --out")
    if job.unfinished.exists():
        print(f"{job.split}: an earlier run did not finish; starting again")
    return write_beton(job, workers)


def check_split(job: BetonJob, found: shard_format.BetonRecord, workers: int) -> None:
    """Check a finished beton byte for byte; make it again if it is damaged. Raises DataError for other settings."""
    job.check_settings(found.made, f"{job.path} was", f"{shard_format.record_path(job.path)} and {job.path}")
    try:
        for file in (found, found.index):
            shard_format.check_file(job.out / file.name, file, by_hash=True, wording=shard_format.BETON_WORDING)
    except DataError as error:
        print(f"{error.args[0].split(';')[0]}; making it again")
        again = write_beton(job, workers)
        if again.sha256 != found.sha256:
            print(f"{job.split}: the result differs from before, so its record is new too")
    print(f"{job.split}: {found.samples} samples in {job.path.name} are complete and correct")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line. Raises DataError for options that exclude each other."""
    parser = make_parser("Convert shards, an ImageFolder, or a data set's official files, to FFCV's betons.")
    add_source_options(parser)
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
    _check(options)
    if has_shards(options.src):
        _check_with_shards(options)
    return options


def _check(options: argparse.Namespace) -> None:
    check_source_options(options)
    if options.quality > 100:
        raise DataError(f"--quality {options.quality} is more than 100")
    for mode, name in (("smart", "smart_threshold"), ("proportion", "compress_probability")):
        if getattr(options, name) is not None and options.write_mode != mode:
            raise DataError(f"--{name.replace('_', '-')} needs --write-mode {mode}")
    # FFCV itself would then store everything raw.
    if options.write_mode == "smart" and options.smart_threshold is None:
        raise DataError("--write-mode smart needs --smart-threshold BYTES, such as 150528 for 224 x 224 pixels")
    if options.compress_probability is not None and not 0 <= options.compress_probability <= 1:
        raise DataError(f"--compress-probability {options.compress_probability} is not between 0 and 1")


def _check_with_shards(options: argparse.Namespace) -> None:
    """Raise DataError for an option that applies only when shards are made."""
    heeded = {"src", "split", "workers"}
    if options.write_mode == "proportion":  # which also draws by the seed
        heeded.add("seed")
    sources = OneLineParser()
    add_source_options(sources)
    for name, default in vars(sources.parse_args(["--src", ""])).items():
        if name not in heeded and getattr(options, name) != default:
            raise DataError(f"--{name.replace('_', '-')} applies only when shards are made; remove it")


def open_source(options: argparse.Namespace) -> tuple[dict[str, Source], list[str]]:
    """Return the requested splits, and the classes' readable names. Raises DataError."""
    if has_shards(options.src):
        shards, names = open_shards(options.src, options.split)
        return dict(shards), names
    there = sorted(options.out.glob("*.beton.json"))
    classes = shard_format.read_record(there[0].with_suffix("")).classes if there else None
    sources = open_chosen(options, classes)
    return sources, class_names(options, next(iter(sources.values())).classes)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    require_ffcv()
    sources, names = open_source(options)
    settle_check(options, sum(map(len, sources.values())))
    jobs = [plan_job(split, source, names, options) for split, source in sources.items()]
    for job in jobs:
        if options.dry_run:
            job.print_plan(job.order, str(job.path))
        elif shard_format.record_path(job.path).exists():
            check_split(job, shard_format.read_record(job.path), options.workers)
        else:
            record = make_split(job, options.workers)
            modes = ", ".join(f"{count} {mode}" for mode, count in record.modes.items())
            job.print_result(record, f"({modes}) in {record.name}", shard_format.record_path(job.path).name)
