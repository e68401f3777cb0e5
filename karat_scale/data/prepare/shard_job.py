"""Make the shards of one split: assign samples, write in parallel, and remember each finished shard.

A shard that is finished has a hidden file beside it, `.train-000000.made.json`, with its record and the settings it
was made with. It lets a killed run resume; dataset.json replaces it when the split is complete.
"""

import json
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from karat_scale.data.prepare.job import Job, Notes, run_in_processes
from karat_scale.data.prepare.sources import Source
from karat_scale.data.prepare.threads import run_in_threads
from karat_scale.data.shards.shard_format import ShardRecord
from karat_scale.data.shards.shard_writer import EncodedSample, shard_name, write_shard
from karat_scale.data.shards.shards import check_file
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import write_atomically

DEFAULT_SHARD_SAMPLES = 5000


class MadeShard(Notes):
    """A shard that was written, and the notes about its images."""

    number: int
    record: ShardRecord


@dataclass(frozen=True)
class ShardJob(Job):
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
    notes = Notes()

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
    return run_in_processes(partial(make_shard, job), numbers, min(workers, len(numbers)))


def _mark_path(job: ShardJob, number: int) -> Path:
    return job.out / f".{shard_name(job.split, number)}.made.json"


def finished_shards(job: ShardJob, workers: int, advance: Callable[[int], None]) -> list[MadeShard]:
    """Return the shards of this job that an earlier run finished and that still have their hash."""
    found = []
    for made in run_in_threads(partial(_finished_shard, job), range(len(job.shards)), workers):
        if made is not None:
            found.append(made)
            advance(len(job.shards[made.number]))
    return found


def _finished_shard(job: ShardJob, number: int) -> MadeShard | None:
    try:
        mark = json.loads(_mark_path(job, number).read_bytes())
        made = MadeShard.model_validate(mark["shard"])
        if mark["made"] != job.made_with() or made.number != number:
            return None
        return made if damage_of(job.out, made.record) is None else None
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None


def damage_of(out: Path, shard: ShardRecord) -> DataError | None:
    """Return what is wrong with a shard or its index, by their hashes; None if they are as they were written."""
    try:
        check_file(out, shard, by_hash=True)
        check_file(out, shard.index, by_hash=True)
    except DataError as error:
        return error
    return None


def remove_leftovers(job: ShardJob, kept: list[MadeShard]) -> None:
    """Remove what an unfinished run left beside the kept shards, so that no reader mistakes it for a shard.

    A shard's index exists before its tar, so a tar without an index is not ours: DataError.
    """
    # A hidden file's temporary name has two dots.
    ours = re.compile(rf"\.{{0,2}}{job.split}-\d{{6}}\.(tar|index\.npz|made\.json)(\..+)?")
    safe = {shard_name(job.split, shard.number) for shard in kept}
    whole = {f"{name}{end}" for name in safe for end in (".tar", ".index.npz")} | {
        f".{name}.made.json" for name in safe
    }
    found = [path for path in sorted(job.out.iterdir()) if ours.fullmatch(path.name) and path.name not in whole]
    for path in found:
        if path.suffix == ".tar" and path.name[0] != "." and not path.with_suffix(".index.npz").exists():
            raise DataError(f"{path} exists and was not made by this script; use another --out")
    for path in found:
        path.unlink()


def remove_marks(job: ShardJob) -> None:
    """Remove the marks of finished shards, once dataset.json has their content."""
    for path in job.out.glob(f".{job.split}-*.made.json"):
        path.unlink()
