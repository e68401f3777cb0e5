"""Make one beton: images are read, checked and packed in parallel, and one process writes them in order.

Images are packed so that every reader gets the same pixels as from the shards. A JPEG that FFCV's decoder reads is
stored byte for byte. An image it cannot read (PNG, CMYK, ...) is stored as raw RGB pixels. A file that nothing reads is
stored unchanged, and every reader of this project then treats it as a bad sample.
"""

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
from karat_scale.data.decoders.ffcv import JpegDecoder
from karat_scale.data.decoders.jpeg_header import read_frame
from karat_scale.data.decoders.orientation import to_jpeg
from karat_scale.data.prepare.job import Job, Notes, run_in_processes
from karat_scale.data.shards.beton import (
    MAX_SIDE,
    BetonRecord,
    BetonWriter,
    StoredImage,
    beton_path,
    index_bytes,
    index_path,
    record_path,
)
from karat_scale.data.shards.shard_format import FileRecord
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
        self._decode = JpegDecoder()

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
