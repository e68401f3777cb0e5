"""Turn images into indexed WebDataset shards.

    python data_prep/make_webdataset.py --src DIR --out DIR

The source is an ImageFolder (with or without train/ and val/ or test/) or a directory of IDX files such as
MNIST's. Samples are shuffled over the shards by a seed; the bytes of image files are kept as they are. The
same source and options give the same shards. Run on a finished output, it checks every byte and makes again
what is damaged.
"""

import multiprocessing
import re
import signal
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from console import add_source_options, make_parser, positive, progress, run
from sources import Source, UnreadableSampleError, open_splits

from karat_scale import __version__
from karat_scale.data.order import epoch_order
from karat_scale.data.shard_format import (
    DATASET_FILE,
    DatasetRecord,
    ShardRecord,
    SkippedRecord,
    SplitRecord,
    read_dataset_record,
    write_dataset_record,
)
from karat_scale.data.shard_writer import EncodedSample, shard_name, write_shard
from karat_scale.data.shards import check_file
from karat_scale.errors import DataError

DEFAULT_SHARD_SAMPLES = 5000


@dataclass(frozen=True)
class Job:
    """One split to make: which samples go into which shard, and the settings that decide it."""

    split: str
    source: Source
    out: Path
    shards: list[npt.NDArray[np.int64]]
    made: dict[str, str | int | None]


@dataclass(frozen=True)
class MadeShard:
    """A shard that was written, and what was left out of it."""

    number: int
    record: ShardRecord
    skipped: list[SkippedRecord]


def plan_job(
    split: str,
    source: Source,
    src: Path,
    out: Path,
    seed: int,
    shard_samples: int | None,
    shard_bytes: int | None,
) -> Job:
    """Spread the samples over shards of about equal size, in an order drawn from the seed."""
    order = epoch_order(seed, 0, len(source))
    if shard_bytes is not None:
        ends = np.cumsum(source.sizes[order])
        count = max(1, round(int(ends[-1]) / shard_bytes))
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count)
        shards = [shard for shard in np.split(order, cuts) if len(shard)]
    else:
        shard_samples = shard_samples or DEFAULT_SHARD_SAMPLES
        shards = np.array_split(order, -(-len(source) // shard_samples))
    made: dict[str, str | int | None] = {
        "tool": "data_prep/make_webdataset.py",
        "version": __version__,
        "source": src.resolve().name,
        "source_sha256": source.fingerprint(),
        "seed": seed,
        "shard_samples": shard_samples,
        "shard_bytes": shard_bytes,
    }
    return Job(split, source, out, shards, made)


def make_shard(job: Job, number: int) -> MadeShard:
    """Write one shard of a job."""
    skipped: list[SkippedRecord] = []

    def samples() -> Iterator[EncodedSample]:
        for index in job.shards[number].tolist():
            try:
                yield job.source.read(index)
            except UnreadableSampleError as error:
                skipped.append(SkippedRecord(path=job.source.name(index), reason=str(error)))

    record = write_shard(job.out, shard_name(job.split, number), samples())
    return MadeShard(number, record, skipped)


_job: Job | None = None


def _start_worker(job: Job) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _make_in_worker(number: int) -> MadeShard:
    assert _job is not None
    return make_shard(_job, number)


def make_shards(job: Job, numbers: list[int], workers: int) -> Generator[MadeShard, None, None]:
    """Write these shards of a job, in parallel; yields them as they are done. Raises DataError if a process dies."""
    if min(workers, len(numbers)) <= 1:
        yield from (make_shard(job, number) for number in numbers)
        return
    pool = ProcessPoolExecutor(min(workers, len(numbers)), multiprocessing.get_context("fork"), _start_worker, (job,))
    try:
        for future in as_completed([pool.submit(_make_in_worker, number) for number in numbers]):
            yield future.result()
    except BrokenProcessPool as error:
        raise DataError("a worker process died; use fewer --workers if memory is short") from error
    finally:
        pool.shutdown(cancel_futures=True)


def make_split(job: Job, workers: int) -> SplitRecord:
    """Write all shards of a split; returns its record. Raises DataError when no image is usable."""
    _remove_leftovers(job)
    done: list[MadeShard] = []
    with (
        progress(f"{job.split}: writing", len(job.source), "images") as advance,
        closing(make_shards(job, list(range(len(job.shards))), workers)) as shards,
    ):
        for shard in shards:
            done.append(shard)
            advance(len(job.shards[shard.number]))
    done.sort(key=lambda shard: shard.number)
    records = [shard.record for shard in done]
    skipped = [SkippedRecord(path=path, reason=reason) for path, reason in job.source.skipped]
    skipped += [item for shard in done for item in shard.skipped]
    if sum(record.samples for record in records) == 0:
        raise DataError(f"no image of split {job.split} is usable; first: {skipped[0].path}: {skipped[0].reason}")
    return SplitRecord(
        samples=sum(record.samples for record in records),
        bytes=sum(record.bytes for record in records),
        shards=records,
        made=job.made,
        skipped=sorted(skipped, key=lambda item: item.path),
    )


def _remove_leftovers(job: Job) -> None:
    """Remove what an unfinished run left, so that no reader takes its shards for ours.

    A shard's index is there before its tar, so a tar alone is not ours: DataError.
    """
    ours = re.compile(rf"\.?{job.split}-\d{{6}}\.(tar|index\.npz)(\..+)?")
    found = [path for path in sorted(job.out.iterdir()) if ours.fullmatch(path.name)]
    for path in found:
        if path.suffix == ".tar" and not path.with_suffix(".index.npz").exists():
            raise DataError(f"{path} is in the way and was not made by this script; use another --out")
    for path in found:
        path.unlink()


def check_split(job: Job, found: SplitRecord, workers: int) -> None:
    """Check a finished split byte for byte and make damaged shards again. Raises DataError for other settings."""
    for key, value in job.made.items():
        if key not in ("version", "source") and found.made.get(key) != value:
            raise DataError(
                f"{job.out} holds split {job.split} made with {key} = {found.made.get(key)}, now {value}; "
                f"use another --out, or delete {job.out / DATASET_FILE} to make it anew"
            )
    damaged = []
    with progress(f"{job.split}: checking", len(found.shards), "shards") as advance:
        for number, shard in enumerate(found.shards):
            try:
                check_file(job.out, shard, by_hash=True)
                check_file(job.out, shard.index, by_hash=True)
            except DataError as error:
                print(f"{error.args[0].split(';')[0]}; making it again")
                damaged.append(number)
            advance(1)
    for made in make_shards(job, damaged, workers):
        if made.record != found.shards[made.number]:
            raise DataError(
                f"{job.out / made.record.name} came out otherwise than {DATASET_FILE} says; "
                f"delete {job.out / DATASET_FILE} and run again"
            )
    print(f"{job.split}: {found.samples} samples in {len(found.shards)} shards are there and right")


def report(split: str, record: SplitRecord) -> None:
    """Say what was made and what was skipped."""
    print(
        f"{split}: {record.samples} samples in {len(record.shards)} shards, {record.bytes / 1e6:,.1f} MB, "
        f"{len(record.skipped)} skipped"
    )
    _list_skipped((item.path, item.reason) for item in record.skipped[:5])
    if len(record.skipped) > 5:
        print(f"  ... all are listed in {DATASET_FILE}")


def _list_skipped(items: Iterable[tuple[str, str]]) -> None:
    for path, reason in items:
        print(f"  skipped {path}: {reason}")


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("Turn an ImageFolder or IDX files into indexed WebDataset shards.")
    add_source_options(parser)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--shard-samples", type=positive, metavar="N", help=f"samples a shard (default {DEFAULT_SHARD_SAMPLES})"
    )
    size.add_argument("--shard-bytes", type=positive, metavar="N", help="image bytes a shard, about")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order in the shards (default 0)")
    options = parser.parse_args(arguments)
    if options.split is not None and not re.fullmatch(r"\w+", options.split):
        raise DataError(f"--split {options.split!r} is no name; use letters, digits and _")

    out: Path = options.out
    dataset = read_dataset_record(out) if (out / DATASET_FILE).exists() else None
    sources = open_splits(options.src, options.split, dataset.classes if dataset else None)
    jobs = [
        plan_job(split, source, options.src, out, options.seed, options.shard_samples, options.shard_bytes)
        for split, source in sources.items()
    ]
    if options.dry_run:
        for job in jobs:
            print(
                f"{job.split}: {len(job.source)} images of {len(job.source.classes)} classes, about "
                f"{job.source.sizes.sum() / 1e6:,.1f} MB, would go into {len(job.shards)} shards in {out}"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    dataset = dataset or DatasetRecord(classes=jobs[0].source.classes)
    for job in jobs:
        if job.split in dataset.splits:
            check_split(job, dataset.splits[job.split], options.workers)
            continue
        dataset.splits[job.split] = make_split(job, options.workers)
        write_dataset_record(out, dataset)
        report(job.split, dataset.splits[job.split])


if __name__ == "__main__":
    run(main)
