"""Convert images to indexed WebDataset shards.

    python data_prep/make_webdataset.py --src DIR --out DIR

The source is one of

    an ImageFolder, with or without train/ and val/ or test/, as a directory or as one uncompressed tar
    ImageNet's official tars, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar with the validation labels
    (sources/tars.py lists their formats); they are read in place, nothing is unpacked
    the official files of CIFAR-10, CIFAR-100, SVHN, STL-10 or Oxford Flowers-102 (see sources/small.py),
    whose published hashes are checked
    IDX files such as MNIST's
    Parquet files as the Hugging Face hub has them (sources/parquet.py)

Samples are shuffled over the shards by a seed. The bytes of image files are copied, unless --resize re-encodes them.
The same source and options give the same shards. A run that was killed resumes with the shard it was writing. Run on a
finished output, the script checks every byte and makes damaged shards again. A shard that is finished has a hidden file
beside it, `.train-000000.made.json`, with its record and the settings it was made with; dataset.json replaces it when
the split is complete. dataset.json lists odd files with what was done about them (--on-odd, --exif). If there are fewer
than 100,000 images, each is decoded (--check), and those that cannot be, such as truncated photographs, are skipped.
--val-fraction or --val-count divides a source without a validation split.
"""

import argparse
import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karat_scale.data.indexing import is_indexed
from karat_scale.data.prepare import making
from karat_scale.data.prepare.images import DEFAULT_QUALITY, Preparation, choose_encoder
from karat_scale.data.prepare.sources import Source
from karat_scale.data.shards import shard_format
from karat_scale.data.shards.tars import EncodedSample, shard_name, write_shard
from karat_scale.foundation.arguments import count
from karat_scale.foundation.console import plural, progress
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import write_atomically

DEFAULT_SHARD_SAMPLES = 5000


class MadeShard(making.Notes):
    """A shard that was written, and the notes about its images."""

    number: int
    record: shard_format.ShardRecord


@dataclass(frozen=True)
class ShardJob(making.Job):
    """One split to make; `shards` holds the samples of each shard."""

    shards: list[npt.NDArray[np.int64]]


def split_order(
    order: npt.NDArray[np.int64], source: Source, shard_samples: int | None, shard_bytes: int | None
) -> list[npt.NDArray[np.int64]]:
    """Divide an order of samples over shards of about equal size."""
    if shard_bytes is not None:
        ends = np.cumsum(source.sizes[order])
        count = max(1, round(int(ends[-1]) / shard_bytes))
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count)
        return [shard for shard in np.split(order, cuts) if len(shard)]
    return np.array_split(order, -(-len(order) // (shard_samples or DEFAULT_SHARD_SAMPLES)))


def make_shard(job: ShardJob, number: int) -> MadeShard:
    """Write one shard of a job, and then the file that marks it as finished."""
    notes = making.Notes()

    def samples() -> Iterator[EncodedSample]:
        for index in job.shards[number].tolist():
            image = job.prepare(index, notes)
            if image is not None:
                label = int(job.source.labels[index])
                notes.stored(job.source.name(index), image, label, image.odd)
                yield EncodedSample(job.source.key(index), image.extension, image.data, label)

    record = write_shard(job.out, shard_name(job.split, number), samples())
    made = MadeShard(number=number, record=record, **dict(notes))
    content = {"made": job.made_with(), "shard": made.model_dump()}
    write_atomically(_mark_path(job, number), json.dumps(content, ensure_ascii=False))
    return made


def make_shards(job: ShardJob, numbers: Sequence[int], workers: int) -> Generator[MadeShard, None, None]:
    """Write these shards of a job in parallel, and yield them. Raises DataError if a process dies."""
    return making.run_in_processes(partial(make_shard, job), numbers, min(workers, len(numbers)))


def _mark_path(job: ShardJob, number: int) -> Path:
    return job.out / f".{shard_name(job.split, number)}.made.json"


def finished_shard(job: ShardJob, number: int) -> MadeShard | None:
    """Return a shard of this job that an earlier run finished, if it still has its hash."""
    try:
        mark = json.loads(_mark_path(job, number).read_bytes())
        made = MadeShard.model_validate(mark["shard"])
        if mark["made"] == job.made_with() and made.number == number:
            return None if shard_format.damage_of(job.out, made.record) else made
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def remove_leftovers(job: ShardJob, kept: list[MadeShard]) -> None:
    """Remove what an unfinished run left beside the kept shards, so that no reader mistakes it for a shard.

    A shard's index exists before its tar, so a tar without an index is not ours: DataError.
    """
    # A hidden file's temporary name has two dots.
    ours = re.compile(rf"\.{{0,2}}{job.split}-\d{{6}}\.(tar|index\.npz|made\.json)(\..+)?")
    names = [shard_name(job.split, shard.number) for shard in kept]
    whole = {file for name in names for file in (f"{name}.tar", f"{name}.index.npz", f".{name}.made.json")}
    found = [path for path in sorted(job.out.iterdir()) if ours.fullmatch(path.name) and path.name not in whole]
    for path in found:
        if path.suffix == ".tar" and path.name[0] != "." and not path.with_suffix(".index.npz").exists():
            raise DataError(f"{path} exists and was not made by this script; use another --out")
    for path in reversed(found):  # a tar before its index
        path.unlink()


def plan_job(split: str, source: Source, options: argparse.Namespace, found: Mapping[str, Any]) -> ShardJob:
    """Return the job of one split, from the command line. found: the settings that an existing split was made with."""
    order = making.shuffled(source, options.seed, options.subset)
    quality = options.quality or DEFAULT_QUALITY
    encoder = choose_encoder(options.encoder) if options.resize else "pillow"
    check = making.check_of(options, source, found)
    preparation = Preparation(check, options.on_odd, options.resize, quality, encoder, options.exif)
    made = making.made_by(
        "make_webdataset.py",
        source,
        options,
        preparation,
        shard_samples=None if options.shard_bytes else options.shard_samples or DEFAULT_SHARD_SAMPLES,
        shard_bytes=options.shard_bytes,
        resize=options.resize,
        quality=quality if options.resize else None,
        encoder=encoder if options.resize else None,
    )
    shards = split_order(order, source, options.shard_samples, options.shard_bytes)
    return ShardJob(split, source, options.out, preparation, made, shards)


def make_split(job: ShardJob, workers: int) -> shard_format.SplitRecord:
    """Write the missing shards of a split; returns its record. Raises DataError if no image is left."""
    with progress(f"{job.split}: writing", sum(map(len, job.shards)), "images") as advance:
        done = []
        with ThreadPoolExecutor(workers) as pool:
            for made in filter(None, pool.map(partial(finished_shard, job), range(len(job.shards)))):
                done.append(made)
                advance(len(job.shards[made.number]))
        remove_leftovers(job, done)
        if done:
            print(f"{job.split}: {len(done)} of {len(job.shards)} shards were finished before; resuming")
        missing = sorted(set(range(len(job.shards))) - {shard.number for shard in done})
        with closing(make_shards(job, missing, workers)) as shards:
            for shard in shards:
                done.append(shard)
                advance(len(job.shards[shard.number]))
    done.sort(key=lambda shard: shard.number)
    records, notes = [shard.record for shard in done], making.Notes()
    for shard in done:
        notes.add(shard)
    return shard_format.SplitRecord(
        samples=sum(record.samples for record in records),
        bytes=sum(record.bytes for record in records),
        shards=records,
        **job.record_fields(notes),
    )


def check_split(job: ShardJob, found: shard_format.SplitRecord, workers: int) -> None:
    """Check a finished split byte for byte and make damaged shards again. Raises DataError for other settings."""
    job.check_settings(found.made, f"{job.out} holds split {job.split}", str(job.out / shard_format.DATASET_FILE))
    damaged = []
    with (
        progress(f"{job.split}: checking", len(found.shards), "shards") as advance,
        ThreadPoolExecutor(workers) as pool,
    ):
        for number, error in enumerate(pool.map(partial(shard_format.damage_of, job.out), found.shards)):
            if error:
                print(f"{error}; making it again")
                damaged.append(number)
            advance(1)
    for made in make_shards(job, damaged, workers):
        if made.record != found.shards[made.number]:
            raise DataError(
                f"{job.out / made.record.name} differs from {shard_format.DATASET_FILE}; "
                f"delete {job.out / shard_format.DATASET_FILE} and run again"
            )
    counts = f"{plural(found.samples, 'sample')} in {plural(len(found.shards), 'shard')}"
    print(f"{job.split}: {counts} are complete and correct")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line. Raises DataError for options that exclude each other."""
    parser = making.source_parser(
        "Convert an ImageFolder, or a data set's official files, to indexed WebDataset shards."
    )
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
    making.check_source_options(options)
    if options.quality is not None and options.quality > 100:
        raise DataError(f"--quality {options.quality} should be at most 100")
    if options.quality is not None and options.resize is None:
        raise DataError(f"--quality {options.quality} needs --resize; without it, no image is encoded")
    if options.encoder != "auto" and options.resize is None:
        raise DataError(f"--encoder {options.encoder} needs --resize; without it, no image is encoded")
    return options


def _list_split(
    out: Path, dataset: shard_format.DatasetRecord, name: str, split: shard_format.SplitRecord
) -> shard_format.DatasetRecord:
    """Add a split to dataset.json, where another run may have added one meanwhile; returns the record."""
    with making.alone_in(out):
        if (out / shard_format.DATASET_FILE).exists():
            found = shard_format.read_dataset_record(out, what="--out")
            _refuse_other_classes(out, found, dataset.classes)
            dataset = found
        dataset.splits[name] = split
        shard_format.write_dataset_record(out, dataset)
    return dataset


def _refuse_other_classes(out: Path, found: shard_format.DatasetRecord, classes: list[str]) -> None:
    if found.classes != classes:
        raise DataError(f"{out} has shards of other classes by now; use another --out")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    out: Path = options.out
    has_record = (out / shard_format.DATASET_FILE).exists()
    dataset = shard_format.read_dataset_record(out, what="--out") if has_record else None
    # To make it again might remove tars that nobody has a copy of.
    if (dataset and is_indexed(dataset)) or (out / shard_format.OTHERS_FILE).exists():
        raise DataError(f"{out} has tars that others made, and karat index has indexed; use another --out")
    known = dataset.classes if dataset else None
    sources = making.open_chosen(options, known)
    making.settle(options, sources)
    before = {name: split.made for name, split in dataset.splits.items()} if dataset else {}
    jobs = [plan_job(split, source, options, before.get(split, {})) for split, source in sources.items()]
    if options.dry_run:
        for job in jobs:
            job.print_plan(np.concatenate(job.shards), f"{plural(len(job.shards), 'shard')} in {out}")
        return
    out.mkdir(parents=True, exist_ok=True)
    classes = jobs[0].source.classes
    names = making.class_names(options, classes)
    if dataset and options.names and names != dataset.names:
        raise DataError(f"--names has no effect: {out / shard_format.DATASET_FILE} has other names; correct it there")
    dataset = dataset or shard_format.DatasetRecord(classes=classes, names=names)
    for job in jobs:
        with making.alone_in(out / f".{job.split}.making", made=True):
            if (out / shard_format.DATASET_FILE).exists():  # another run may have made the split by now
                dataset = shard_format.read_dataset_record(out, what="--out")
                _refuse_other_classes(out, dataset, classes)
            if job.split in dataset.splits:
                check_split(job, dataset.splits[job.split], options.workers)
            else:
                made = make_split(job, options.workers)
                dataset = _list_split(out, dataset, job.split, made)
                job.print_result(made, f"in {plural(len(made.shards), 'shard')}", shard_format.DATASET_FILE)
            for mark in out.glob(f".{job.split}-*.made.json"):  # dataset.json has their content
                mark.unlink()
