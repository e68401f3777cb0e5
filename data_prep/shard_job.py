"""Make the shards of one split: assign samples, write in parallel, and remember each finished shard.

A shard that is finished has a hidden file beside it, `.train-000000.made.json`, with its record and the settings it
was made with. It lets a killed run resume; dataset.json replaces it when the split is complete.
"""

import ctypes
import json
import multiprocessing
import re
import signal
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from preparing import OddImageSkippedError, Preparation
from pydantic import BaseModel, ValidationError
from sources import Source, UnreadableSampleError

from karat_scale.data.formats.shard_format import OddRecord, ShardRecord, SkippedRecord
from karat_scale.data.formats.shard_writer import EncodedSample, shard_name, write_shard
from karat_scale.data.formats.shards import check_file
from karat_scale.data.order import epoch_order
from karat_scale.errors import DataError
from karat_scale.files import write_atomically

DEFAULT_SHARD_SAMPLES = 5000
# These may differ between two runs that make the same shards.
FREE_SETTINGS = ("version", "source")
PR_SET_PDEATHSIG = 1


class MadeShard(BaseModel):
    """A shard that was written, and what was odd or left out."""

    number: int
    record: ShardRecord
    skipped: list[SkippedRecord] = []
    odd: list[OddRecord] = []
    grey: int = 0
    labels: dict[int, int] = {}


@dataclass(frozen=True)
class Job:
    """One split to make: the samples of each shard, and the settings that decide its bytes."""

    split: str
    source: Source
    out: Path
    shards: list[npt.NDArray[np.int64]]
    preparation: Preparation
    made: dict[str, Any]

    @property
    def samples(self) -> int:
        """Source images of the shards."""
        return sum(len(shard) for shard in self.shards)

    def made_with(self) -> dict[str, Any]:
        """The settings that decide the shards' bytes."""
        return {key: value for key, value in self.made.items() if key not in FREE_SETTINGS}


def spread(
    source: Source, seed: int, subset: int | None, shard_samples: int | None, shard_bytes: int | None
) -> list[npt.NDArray[np.int64]]:
    """Samples by shard, in an order drawn from the seed; shards are of about equal size.

    subset: the number of images of each class, the first in that order.
    """
    order = epoch_order(seed, 0, len(source))
    if subset is not None:
        order = order[_rank_in_class(source.labels[order]) < subset]
    if shard_bytes is not None:
        ends = np.cumsum(source.sizes[order])
        count = max(1, round(int(ends[-1]) / shard_bytes))
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count)
        return [shard for shard in np.split(order, cuts) if len(shard)]
    return np.array_split(order, -(-len(order) // (shard_samples or DEFAULT_SHARD_SAMPLES)))


def _rank_in_class(labels: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Return for each sample how many of its class come before it."""
    by_class = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[by_class], labels[by_class])
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[by_class] = np.arange(len(labels)) - first
    return ranks


def make_shard(job: Job, number: int) -> MadeShard:
    """Write one shard of a job, and then the file that marks it as finished."""
    skipped: list[SkippedRecord] = []
    odd: list[OddRecord] = []
    labels: dict[int, int] = {}
    grey = 0

    def samples() -> Iterator[EncodedSample]:
        nonlocal grey
        for index in job.shards[number].tolist():
            path = job.source.name(index)
            try:
                image = job.preparation.prepare(job.source.read(index), path)
            except UnreadableSampleError as error:
                skipped.append(SkippedRecord(path=path, reason=str(error)))
                if isinstance(error, OddImageSkippedError):
                    odd.append(OddRecord(path=path, what=str(error), done="skipped"))
                continue
            if image.odd:
                odd.append(OddRecord(path=path, what=image.odd, done=image.done))
            label = int(job.source.labels[index])
            labels[label] = labels.get(label, 0) + 1
            grey += image.grey
            yield EncodedSample(job.source.key(index), image.extension, image.data, label)

    name = shard_name(job.split, number)
    record = write_shard(job.out, name, samples())
    made = MadeShard(number=number, record=record, skipped=skipped, odd=odd, grey=grey, labels=labels)
    note = {"made": job.made_with(), "shard": made.model_dump()}
    write_atomically(_note_path(job, number), json.dumps(note, ensure_ascii=False))
    return made


def _note_path(job: Job, number: int) -> Path:
    return job.out / f".{shard_name(job.split, number)}.made.json"


def finished_shards(job: Job, advance: Callable[[int], None]) -> list[MadeShard]:
    """Return the shards of this job that an earlier run finished and that still have their hash."""
    found = []
    for number in range(len(job.shards)):
        try:
            note = json.loads(_note_path(job, number).read_bytes())
            made = MadeShard.model_validate(note["shard"])
            if note["made"] != job.made_with() or made.number != number:
                continue
            check_file(job.out, made.record, by_hash=True)
            check_file(job.out, made.record.index, by_hash=True)
        except (OSError, ValueError, KeyError, TypeError, ValidationError, DataError):
            continue
        found.append(made)
        advance(len(job.shards[number]))
    return found


def remove_leftovers(job: Job, kept: list[MadeShard]) -> None:
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


def forget_notes(job: Job) -> None:
    """Remove the marks of finished shards, once dataset.json has their content."""
    for path in job.out.glob(f".{job.split}-*.made.json"):
        path.unlink()


_job: Job | None = None


def _start_worker(job: Job) -> None:
    global _job
    _job = job
    become_worker()


def become_worker() -> None:
    """Ignore Ctrl-C in the calling process, since the main process handles it, and end with the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # If the main process is killed, its workers must stop writing.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _make_in_worker(number: int) -> MadeShard:
    assert _job is not None
    return make_shard(_job, number)


def make_shards(job: Job, numbers: list[int], workers: int) -> Generator[MadeShard, None, None]:
    """Write these shards of a job in parallel; yields them when they are done. Raises DataError if a process dies."""
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
