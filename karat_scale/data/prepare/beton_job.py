"""Make one beton: images are read, checked and packed in parallel, and one process writes them in order."""

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from karat_scale.data.prepare.beton_packing import Packer, Packing
from karat_scale.data.prepare.job import Job, Notes, run_in_processes
from karat_scale.data.shards.beton import BetonRecord, beton_path, index_bytes, index_path, record_path
from karat_scale.data.shards.beton_writer import BetonWriter, StoredImage
from karat_scale.data.shards.shard_format import FileRecord
from karat_scale.foundation.console import progress
from karat_scale.foundation.files import commit_file, file_sha256, flush_to_disk, write_atomically

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
        return beton_path(self.out, self.split)

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


def write_beton(job: BetonJob, workers: int) -> BetonRecord:
    """Write a beton, after its index and its record. Raises DataError if no image is left or a process dies.

    The beton gets its name last: a run that is killed before leaves a record without its beton, which readers refuse
    and the next run makes again.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    try:
        record, index = _write_unfinished(job, workers)
        write_atomically(index_path(job.path), index)
        write_atomically(record_path(job.path), record.model_dump_json(indent=1) + "\n")
        commit_file(job.unfinished, job.path)
    except BaseException:
        job.unfinished.unlink(missing_ok=True)
        raise
    return record


def _write_unfinished(job: BetonJob, workers: int) -> tuple[BetonRecord, bytes]:
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
    record = BetonRecord(
        name=job.path.name,
        bytes=job.unfinished.stat().st_size,
        sha256=file_sha256(job.unfinished),
        samples=len(keys),
        index=FileRecord(name=index_path(job.path).name, bytes=len(index_content), sha256=index_hash),
        split=job.split,
        classes=job.source.classes,
        names=job.names,
        modes=dict(sorted(modes.items())),
        **fields,
    )
    return record, index_content
