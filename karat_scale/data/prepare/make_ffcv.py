"""Convert images to FFCV's betons, for data.backend=ffcv and for FFCV's own Loader.

    python data_prep/make_ffcv.py --src DIR --out DIR

The source is a directory of shards made by make_webdataset.py, or any source of that script. Each split becomes one
beton with a JSON file and an index beside it (karat_scale/data/shards/beton.py). Sample ids are those of the shards
that the same options make. JPEGs are copied byte for byte, unless --write-mode or --max-resolution re-encodes them.

The same source and options give the same bytes. Run on a finished output, the script checks every byte and makes
damaged betons again. A run that was killed leaves a hidden file, or a record without its beton; the next run starts
that beton again and says so. The script needs FFCV: in the clone, pip install -e '.[ffcv]'.
"""

import argparse

import numpy as np

from karat_scale.data.decoders.ffcv import require_ffcv
from karat_scale.data.prepare.beton_job import BetonJob, Packing, write_beton
from karat_scale.data.prepare.job import (
    add_source_options,
    check_source_options,
    made_by,
    make_parser,
    settle_check,
    shuffled,
)
from karat_scale.data.prepare.join_splits import open_chosen
from karat_scale.data.prepare.make_webdataset import class_names
from karat_scale.data.prepare.preparing import Preparation
from karat_scale.data.prepare.sources import Source, default_exif
from karat_scale.data.prepare.sources.tars import has_shards, open_shards
from karat_scale.data.shards.beton import BetonRecord, check_file, page_bytes, read_record, record_path
from karat_scale.foundation.arguments import count
from karat_scale.foundation.errors import DataError, run_script

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


def make_split(job: BetonJob, workers: int) -> BetonRecord:
    """Write the beton of a split. Raises DataError if a file that we did not make is in the way."""
    if job.path.exists() and not record_path(job.path).exists():
        raise DataError(f"{job.path} exists and was not finished by this script; delete it or use another --out")
    if job.unfinished.exists():
        print(f"{job.split}: an earlier run did not finish; starting again")
    return write_beton(job, workers)


def check_split(job: BetonJob, found: BetonRecord, workers: int) -> None:
    """Check a finished beton byte for byte; make it again if it is damaged. Raises DataError for other settings."""
    job.check_settings(found.made, f"{job.path} was", f"{record_path(job.path)} and {job.path}")
    try:
        check_file(job.out, found, by_hash=True)
        check_file(job.out, found.index, by_hash=True)
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
        _check_with_shards(options, parser)
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


def _check_with_shards(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raise DataError for an option that applies only when shards are made."""
    settled = [
        "subset",
        "val_fraction",
        "val_count",
        "check",
        "on_odd",
        "exif",
        "val_labels",
        "synsets",
        "names",
        "encoding",
        "any_hash",
        "image_column",
        "label_column",
    ]
    if options.write_mode != "proportion":  # which also draws by the seed
        settled.append("seed")
    for name in settled:
        if getattr(options, name) != parser.get_default(name):
            raise DataError(f"--{name.replace('_', '-')} applies only when shards are made; remove it")


def open_source(options: argparse.Namespace) -> tuple[dict[str, Source], list[str]]:
    """Return the requested splits, and the classes' readable names. Raises DataError."""
    if has_shards(options.src):
        shards, names = open_shards(options.src, options.split)
        return dict(shards), names
    there = sorted(options.out.glob("*.beton.json"))
    classes = read_record(there[0].with_suffix("")).classes if there else None
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
        elif record_path(job.path).exists():
            check_split(job, read_record(job.path), options.workers)
        else:
            record = make_split(job, options.workers)
            modes = ", ".join(f"{count} {mode}" for mode, count in record.modes.items())
            job.print_result(record, f"({modes}) in {record.name}", record_path(job.path).name)


if __name__ == "__main__":
    run_script(main)
