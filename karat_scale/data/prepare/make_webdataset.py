"""Convert images to indexed WebDataset shards.

    python data_prep/make_webdataset.py --src DIR --out DIR

The source is one of

    an ImageFolder, with or without train/ and val/ or test/, as a directory or as one uncompressed tar
    ImageNet's official tars, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar with the validation labels
    (sources/imagefolder.py lists their formats); they are read in place, nothing is unpacked
    the official files of CIFAR-10, CIFAR-100, SVHN, STL-10 or Oxford Flowers-102 (see sources/small.py),
    whose published hashes are checked
    IDX files such as MNIST's
    Parquet files as the Hugging Face hub has them (sources/parquet.py)

Samples are shuffled over the shards by a seed. The bytes of image files are copied, unless --resize re-encodes them.
The same source and options give the same shards. A run that was killed resumes with the shard it was writing. Run on a
finished output, the script checks every byte and makes damaged shards again. dataset.json lists odd files with what
was done about them (--on-odd, --exif). If there are fewer than 100,000 images, each is decoded (--check), and those
that cannot be, such as truncated photographs, are skipped. --val-fraction or --val-count divides a source without a
validation split.
"""

import argparse
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from karat_scale.data.prepare.images import choose_encoder
from karat_scale.data.prepare.job import (
    Notes,
    add_source_options,
    check_source_options,
    made_by,
    make_parser,
    settle_check,
    shuffled,
)
from karat_scale.data.prepare.join_splits import open_chosen
from karat_scale.data.prepare.preparing import DEFAULT_QUALITY, Preparation
from karat_scale.data.prepare.shard_job import (
    DEFAULT_SHARD_SAMPLES,
    MadeShard,
    ShardJob,
    damage_of,
    finished_shards,
    make_shards,
    remove_leftovers,
    remove_marks,
    split_order,
)
from karat_scale.data.prepare.sources import Source, default_exif
from karat_scale.data.prepare.sources.imagefolder import NAME_FILES, find_file, read_synset_names
from karat_scale.data.prepare.threads import run_in_threads
from karat_scale.data.shards.shard_format import (
    DATASET_FILE,
    DatasetRecord,
    SplitRecord,
    read_dataset_record,
    write_dataset_record,
)
from karat_scale.foundation.arguments import count
from karat_scale.foundation.console import progress
from karat_scale.foundation.errors import DataError, run_script


def plan_job(split: str, source: Source, options: argparse.Namespace) -> ShardJob:
    """Return the job of one split, from the command line."""
    order = shuffled(source, options.seed, options.subset)
    quality = options.quality or DEFAULT_QUALITY
    encoder = choose_encoder(options.encoder) if options.resize else "pillow"
    exif = options.exif or default_exif(source.classes)
    made = made_by(
        "make_webdataset.py",
        source,
        options,
        shard_samples=None if options.shard_bytes else options.shard_samples or DEFAULT_SHARD_SAMPLES,
        shard_bytes=options.shard_bytes,
        resize=options.resize,
        quality=quality if options.resize else None,
        encoder=encoder if options.resize else None,
        check=options.check,
        on_odd=options.on_odd,
        exif=exif,
    )
    preparation = Preparation(options.check, options.on_odd, options.resize, quality, encoder, exif)
    shards = split_order(order, source, options.shard_samples, options.shard_bytes)
    return ShardJob(split, source, options.out, preparation, made, shards)


def make_split(job: ShardJob, workers: int) -> SplitRecord:
    """Write the missing shards of a split; returns its record. Raises DataError if no image is left."""
    with progress(f"{job.split}: writing", sum(map(len, job.shards)), "images") as advance:
        done = finished_shards(job, workers, advance)
        remove_leftovers(job, done)
        if done:
            print(f"{job.split}: {len(done)} of {len(job.shards)} shards were finished before; resuming")
        missing = sorted(set(range(len(job.shards))) - {shard.number for shard in done})
        with closing(make_shards(job, missing, workers)) as shards:
            for shard in shards:
                done.append(shard)
                advance(len(job.shards[shard.number]))
    return _split_record(job, sorted(done, key=lambda shard: shard.number))


def _split_record(job: ShardJob, done: list[MadeShard]) -> SplitRecord:
    records = [shard.record for shard in done]
    notes = Notes()
    for shard in done:
        notes.add(shard)
    return SplitRecord(
        samples=sum(record.samples for record in records),
        bytes=sum(record.bytes for record in records),
        shards=records,
        **job.record_fields(notes),
    )


def check_split(job: ShardJob, found: SplitRecord, workers: int) -> None:
    """Check a finished split byte for byte and make damaged shards again. Raises DataError for other settings."""
    job.check_settings(found.made, f"{job.out} holds split {job.split}", str(job.out / DATASET_FILE))
    damaged = []
    with progress(f"{job.split}: checking", len(found.shards), "shards") as advance:
        for number, error in enumerate(run_in_threads(partial(damage_of, job.out), found.shards, workers)):
            if error is not None:
                print(f"{error.args[0].split(';')[0]}; making it again")
                damaged.append(number)
            advance(1)
    for made in make_shards(job, damaged, workers):
        if made.record != found.shards[made.number]:
            raise DataError(
                f"{job.out / made.record.name} differs from {DATASET_FILE}; "
                f"delete {job.out / DATASET_FILE} and run again"
            )
    print(f"{job.split}: {found.samples} samples in {len(found.shards)} shards are complete and correct")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line. Raises DataError for options that exclude each other."""
    parser = make_parser("Convert an ImageFolder, or a data set's official files, to indexed WebDataset shards.")
    add_source_options(parser)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--shard-samples", type=count, metavar="N", help=f"samples per shard (default {DEFAULT_SHARD_SAMPLES})"
    )
    size.add_argument("--shard-bytes", type=count, metavar="N", help="approximate image bytes per shard")
    parser.add_argument("--resize", type=count, metavar="S", help="re-encode with a short side of at most S pixels")
    parser.add_argument(
        "--quality", type=count, metavar="Q", help=f"JPEG quality with --resize (default {DEFAULT_QUALITY})"
    )
    parser.add_argument(
        "--encoder",
        choices=("auto", "native", "pillow"),
        default="auto",
        help="with --resize: C++ or Pillow; auto uses native if it can be compiled (default auto)",
    )
    options = parser.parse_args(arguments)
    check_source_options(options)
    if options.quality is not None and (options.resize is None or options.quality > 100):
        raise DataError(f"--quality {options.quality} needs --resize and is at most 100")
    if options.encoder != "auto" and options.resize is None:
        raise DataError(f"--encoder {options.encoder} needs --resize; without it, no image is encoded")
    return options


def class_names(options: argparse.Namespace, classes: list[str]) -> list[str]:
    """Return readable names of the classes, from --names or a known file beside the images; empty if there is none."""
    path = options.names or find_file(options.src, NAME_FILES)
    if path is None:
        return []
    names = read_synset_names(path)
    return [names.get(name, name) for name in classes]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    out: Path = options.out
    dataset = read_dataset_record(out) if (out / DATASET_FILE).exists() else None
    known = dataset.classes if dataset else None
    sources = open_chosen(options, known)
    settle_check(options, sum(map(len, sources.values())))
    jobs = [plan_job(split, source, options) for split, source in sources.items()]
    if options.dry_run:
        for job in jobs:
            job.print_plan(np.concatenate(job.shards), f"{len(job.shards)} shards in {out}")
        return
    out.mkdir(parents=True, exist_ok=True)
    classes = jobs[0].source.classes
    dataset = dataset or DatasetRecord(classes=classes, names=class_names(options, classes))
    for job in jobs:
        if job.split in dataset.splits:
            check_split(job, dataset.splits[job.split], options.workers)
        else:
            dataset.splits[job.split] = make_split(job, options.workers)
            write_dataset_record(out, dataset)
            made = dataset.splits[job.split]
            job.print_result(made, f"in {len(made.shards)} shards", DATASET_FILE)
        remove_marks(job)


if __name__ == "__main__":
    run_script(main)
