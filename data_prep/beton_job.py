"""Make one beton: images are read, checked and packed in parallel, and one process writes them in order."""

import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from beton_packing import Packer, Packing
from preparing import OddImageSkippedError, Preparation, Prepared
from shard_job import FREE_SETTINGS, become_worker
from sources import Source, UnreadableSampleError

from karat_scale.data.formats.beton import BetonRecord, beton_path, index_bytes, index_path, record_path
from karat_scale.data.formats.beton_writer import BetonWriter, StoredImage
from karat_scale.data.formats.shard_format import FileRecord, OddRecord, SkippedRecord
from karat_scale.errors import DataError
from karat_scale.files import commit_file, file_sha256, write_atomically

CHUNK = 8
CHUNKS_AHEAD = 4
# Settings of the preparation. Without a preparation they have no effect, even if an older record has them.
PREPARING = ("check", "on_odd")


@dataclass(frozen=True)
class BetonJob:
    """One split to make: the samples in their order, how they are processed, and the settings that decide its bytes.

    preparation is None if the images were prepared before, as those in shards are.
    """

    split: str
    source: Source
    out: Path
    order: npt.NDArray[np.int64]
    preparation: Preparation | None
    packing: Packing
    names: list[str]
    made: dict[str, Any]

    @property
    def path(self) -> Path:
        """The beton."""
        return beton_path(self.out, self.split)

    def made_with(self) -> dict[str, Any]:
        """The settings that decide the beton's bytes."""
        free = FREE_SETTINGS if self.preparation else (*FREE_SETTINGS, *PREPARING)
        return {key: value for key, value in self.made.items() if key not in free}


@dataclass
class Report:
    """One source image in progress: what is stored of it, or the reason why nothing is."""

    index: int
    image: StoredImage | None = None
    grey: bool = False
    skipped: str = ""
    odd: OddRecord | None = None


@dataclass
class _Counts:
    keys: list[str] = field(default_factory=list)
    skipped: list[SkippedRecord] = field(default_factory=list)
    odd: list[OddRecord] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    grey: int = 0


def treat(job: BetonJob, packer: Packer, index: int) -> Report:
    """Read, check and pack one image of the source."""
    path = job.source.name(index)
    try:
        data = job.source.read(index)
        prepared = job.preparation.prepare(data, path) if job.preparation else Prepared(data, "", False)
    except UnreadableSampleError as error:
        left_out = OddRecord(path=path, what=str(error), done="skipped")
        return Report(index, skipped=str(error), odd=left_out if isinstance(error, OddImageSkippedError) else None)
    image, undecodable = packer.pack(prepared.data, index, path)
    what = prepared.odd or undecodable
    return Report(
        index, image, prepared.grey, odd=OddRecord(path=path, what=what, done=prepared.done) if what else None
    )


def write_beton(job: BetonJob, workers: int, advance: Callable[[int], None]) -> BetonRecord:
    """Write a beton, its index and, last, its record. Raises DataError if no image is left or a process dies.

    A beton without its record is invalid, so all files are first written under another name.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    temporary = unfinished_path(job)
    counts = _Counts()
    try:
        with BetonWriter(temporary, len(job.order), job.packing.page) as writer:
            for report in treated(job, workers):
                _take(job, report, writer, counts)
                advance(1)
            if not counts.keys:
                first = counts.skipped[0]
                raise DataError(f"no image of split {job.split} is usable; first: {first.path}: {first.reason}")
            index = index_bytes(writer.finish(), counts.keys)
        commit_file(temporary, job.path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    write_atomically(index_path(job.path), index)
    record = _record(job, counts)
    write_atomically(record_path(job.path), record.model_dump_json(indent=1) + "\n")
    return record


def _take(job: BetonJob, report: Report, writer: BetonWriter, counts: _Counts) -> None:
    path = job.source.name(report.index)
    if report.odd:
        counts.odd.append(report.odd)
    if report.image is None:
        counts.skipped.append(SkippedRecord(path=path, reason=report.skipped))
        return
    label = int(job.source.labels[report.index])
    writer.add(report.image, label)
    counts.keys.append(job.source.key(report.index))
    counts.modes[report.image.mode] += 1
    counts.labels[label] += 1
    counts.grey += report.grey


def _record(job: BetonJob, counts: _Counts) -> BetonRecord:
    skipped = [SkippedRecord(path=path, reason=reason) for path, reason in job.source.skipped] + counts.skipped
    return BetonRecord(
        **_file_record(job.path).model_dump(),
        samples=len(counts.keys),
        index=_file_record(index_path(job.path)),
        split=job.split,
        classes=job.source.classes,
        names=job.names,
        made=job.made,
        modes=dict(sorted(counts.modes.items())),
        skipped=sorted(skipped, key=lambda item: item.path),
        odd=sorted(counts.odd, key=lambda item: item.path),
        grey=counts.grey,
        per_class=[counts.labels[label] for label in range(len(job.source.classes))],
    )


def _file_record(path: Path) -> FileRecord:
    return FileRecord(name=path.name, bytes=path.stat().st_size, sha256=file_sha256(path))


def unfinished_path(job: BetonJob) -> Path:
    """Return the name of a beton until it is complete."""
    return job.out / f".{job.path.name}.unfinished"


_job: BetonJob | None = None
_packer: Packer | None = None


def _start_worker(job: BetonJob) -> None:
    global _job, _packer
    _job, _packer = job, Packer(job.packing)
    become_worker()


def _treat_in_worker(indices: list[int]) -> list[Report]:
    assert _job is not None
    assert _packer is not None
    return [treat(_job, _packer, index) for index in indices]


def treated(job: BetonJob, workers: int) -> Generator[Report, None, None]:
    """Yield all images of a job in its order. Raises DataError if a process dies."""
    if workers <= 1:
        packer = Packer(job.packing)
        yield from (treat(job, packer, index) for index in job.order.tolist())
        return
    chunks = deque(job.order[start : start + CHUNK].tolist() for start in range(0, len(job.order), CHUNK))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (job,))
    waiting: deque[Future[list[Report]]] = deque()
    try:
        while chunks or waiting:
            while chunks and len(waiting) < workers * CHUNKS_AHEAD:
                waiting.append(pool.submit(_treat_in_worker, chunks.popleft()))
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a worker process died; use fewer --workers if memory is short") from error
    finally:
        pool.shutdown(cancel_futures=True)
