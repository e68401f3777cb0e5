"""FFCV's files, .beton: their format, their writer, and the facts beside them that FFCV does not store.

    train.beton             FFCV's format, readable by FFCV's own Loader: fields `image` (RGBImageField) and `label`
    train.beton.json        classes, counts, SHA-256, settings, the skipped images with reasons
    train.beton.index.npz   per sample: offset, size, label, crc32, mode, width, height, key
    val.beton, ...

A sample's id is its position in the beton. It is the id of the same sample in shards that were made with the same
settings.

The writer does without FFCV's processes. FFCV's DatasetWriter waits forever if one of its workers dies or a sample
raises an error, re-encodes JPEGs, and writes samples in the order in which its workers finish. Here one process
writes the samples in order, so the same samples give the same bytes, and an error is raised.
"""

import errno
import io
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field

from karat_scale.data.shards import shard_format
from karat_scale.data.shards.shard_files import NO_BLOCKS, Blocks, Readahead
from karat_scale.data.shards.shard_format import (
    FileRecord,
    OddRecord,
    ShardRecord,
    SkippedRecord,
    key_of,
    keys_of,
    read_columns,
    read_record_text,
)
from karat_scale.foundation.errors import DataError

FIX = "copy it again or make it again with data_prep/make_ffcv.py"
WORDING = shard_format.Wording("its record", FIX)
# As FFCV numbers the ways in which it stores an image.
MODES = {"jpg": 0, "raw": 1}
RAW = MODES["raw"]
COLUMNS = {
    "offset": np.int64,
    "size": np.int64,
    "label": np.int32,
    "crc32": np.uint32,
    "mode": np.uint8,
    "width": np.int32,
    "height": np.int32,
}
Column = npt.NDArray[Any]


class BetonRecord(ShardRecord):
    """The content of a beton's JSON file.

    made: the source and the settings. modes: samples by their storage mode. odd: images on which decoders
    disagree, and those that no decoder reads.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal["karat-beton"] = "karat-beton"
    version: Literal[1] = 1
    split: str
    classes: list[str]
    names: list[str] = Field(default_factory=list)
    made: dict[str, Any] = Field(default_factory=dict)
    modes: dict[str, int] = Field(default_factory=dict)
    skipped: list[SkippedRecord] = Field(default_factory=list)
    odd: list[OddRecord] = Field(default_factory=list)
    grey: int = 0
    per_class: list[int] = Field(default_factory=list)
    empty_classes: list[str] = Field(default_factory=list)


def beton_path(directory: Path, split: str) -> Path:
    """Return the beton of a split."""
    return directory / f"{split}.beton"


def record_path(beton: Path) -> Path:
    """Return the JSON file beside a beton."""
    return beton.with_name(f"{beton.name}.json")


def index_path(beton: Path) -> Path:
    """Return the index beside a beton."""
    return beton.with_name(f"{beton.name}.index.npz")


def read_record(beton: Path) -> BetonRecord:
    """Read the JSON file beside a beton. Raises DataError if it is missing or damaged."""
    path = record_path(beton)
    fix = "make the beton with data_prep/make_ffcv.py, or correct data.path"
    try:
        return shard_format.validated(BetonRecord, path, lambda: read_record_text(path), fix)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {fix}") from error


def index_bytes(columns: dict[str, Column], keys: list[str]) -> bytes:
    """Return the index file of these columns and keys."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: columns[name].astype(kind) for name, kind in COLUMNS.items()}
    np.savez(buffer, key=np.array([key.encode() for key in keys], dtype=np.bytes_), **arrays)
    return buffer.getvalue()


def check_file(directory: Path, record: FileRecord, by_hash: bool) -> None:
    """Compare a file with its record by size or by SHA-256. Raises DataError."""
    shard_format.check_file(directory / record.name, record, by_hash, WORDING)


def _check_images(columns: dict[str, Column]) -> None:
    """Raise ValueError for an image without pixels, of an unknown mode, or of another size than its pixels."""
    width, height, mode = columns["width"], columns["height"], columns["mode"]
    pixels = 3 * width.astype(np.int64) * height
    wrong = (width < 1) | (height < 1) | (mode > RAW) | ((mode == RAW) & (columns["size"] != pixels))
    if wrong.any():
        number = int(wrong.argmax())
        raise ValueError(
            f"sample {number} is stored in mode {mode[number]} with {width[number]} x {height[number]} pixels in "
            f"{columns['size'][number]} bytes"
        )


class BetonSplit:
    """The images of one beton; see ImageSource. `labels` is int32 [len].

    Opening checks the file's size, or with verify="hash" its SHA-256. `read` compares a JPEG with its checksum; raw
    pixels are read as a PPM image and rely on verify="hash", since a checksum would cost a third of their reading.
    readahead: the blocks that the system reads ahead when one of their samples is read.
    lends: raw pixels are read into one buffer, which the next read reuses; for a decoder that keeps no bytes.
    Raises DataError, one line, if anything is missing, cut short, changed or out of range.
    """

    def __init__(
        self,
        directory: Path | str,
        split: str,
        num_classes: int,
        verify: Literal["size", "hash"] = "size",
        readahead: Blocks = NO_BLOCKS,
        lends: bool = False,
    ) -> None:
        self.path = beton_path(Path(directory).expanduser(), split)
        record = read_record(self.path)
        self.classes = tuple(record.classes)
        shard_format.check_class_count(self.path, len(self.classes), num_classes)
        check_file(self.path.parent, record, by_hash=verify == "hash")
        columns = self._read_index(record)
        self._index = record.index
        self.labels: npt.NDArray[np.int32] = columns["label"]
        self._offsets, self._sizes, self._crcs = columns["offset"], columns["size"], columns["crc32"]
        self._modes, self._widths, self._heights = columns["mode"], columns["width"], columns["height"]
        self._readahead = Readahead(readahead, self._offsets, self._sizes)
        self._file: int | None = None
        self._lends, self._buffer = lends, bytearray()

    def _read_index(self, record: BetonRecord) -> dict[str, Column]:
        path = index_path(self.path)
        data = shard_format.read_checked(path, record.index, WORDING)
        try:
            columns = read_columns(data, COLUMNS, record.samples, record.bytes)
            _check_images(columns)
        except ValueError as error:
            raise DataError(f"{path} does not fit {self.path.name}: {error}; {FIX}") from None
        wrong = np.flatnonzero((columns["label"] < 0) | (columns["label"] >= len(self.classes)))
        if len(wrong):
            raise DataError(
                f"{self.path}: sample {wrong[0]} has label {columns['label'][wrong[0]]}, but {record_path(self.path)} "
                f"lists {len(self.classes)} classes; {FIX}"
            )
        return columns

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, sample_id: int) -> bytes:
        """Return the encoded image, or raw pixels as a PPM image. Raises DataError if the beton has changed."""
        size, offset = int(self._sizes[sample_id]), int(self._offsets[sample_id])
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            self._readahead.ask(self._file, sample_id, 0, len(self))
            raw = self._modes[sample_id] == RAW
            data = self._read_ppm(self._file, sample_id) if raw else os.pread(self._file, size, offset)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}; {FIX}") from error
        if not raw and (len(data) != size or zlib.crc32(data) != self._crcs[sample_id]):
            raise self._changed(sample_id, "is cut short" if len(data) != size else "has changed since it was written")
        return data

    def _read_ppm(self, file: int, sample_id: int) -> bytes:
        size, offset = int(self._sizes[sample_id]), int(self._offsets[sample_id])
        header = b"P6 %d %d 255\n" % (self._widths[sample_id], self._heights[sample_id])
        end = len(header) + size
        if len(self._buffer) < end:
            self._buffer = bytearray(end)
        lent = memoryview(self._buffer)[:end]
        lent[: len(header)] = header
        if os.preadv(file, [lent[len(header) :]], offset) != size:
            raise self._changed(sample_id, "is cut short")
        return cast(bytes, lent) if self._lends else bytes(lent)

    def _changed(self, sample_id: int, what: str) -> DataError:
        return DataError(f"{self.path} {what}: sample {self.locate(sample_id)[0]} differs; {FIX}")

    def locate(self, sample_id: int) -> tuple[str, str]:
        """Return the key of a sample and the name of the beton, for messages."""
        try:
            return key_of(index_path(self.path).read_bytes(), sample_id), self.path.name
        except (OSError, ValueError, IndexError):  # the index has changed: the place is all that is known
            return f"number {sample_id}", self.path.name

    def keys(self) -> list[str]:
        """Return the key of each sample. Raises DataError if the index has changed."""
        return keys_of(shard_format.read_checked(index_path(self.path), self._index, WORDING))

    def file_of(self, sample_id: int) -> str:
        """Return the path of the beton."""
        return str(self.path)

    def close(self) -> None:
        """Close the beton; a later read opens it again."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def __getstate__(self) -> dict[str, Any]:
        # A descriptor has no meaning in a process that was not forked.
        return {**self.__dict__, "_file": None}


MIN_PAGE_BYTES = 8 << 20
MAX_SIDE = 2**16 - 1


@dataclass(frozen=True)
class StoredImage:
    """An image in a beton: bytes that are a JPEG (`jpg`) or RGB pixels (`raw`), and its dimensions."""

    mode: str
    width: int
    height: int
    data: bytes


def page_bytes(largest: int) -> int:
    """Return FFCV's page size for samples of at most this many bytes: a power of two; no sample spans two pages."""
    return max(MIN_PAGE_BYTES, 1 << (largest - 1).bit_length())


class BetonWriter:
    """Writes a beton to `path`, for at most `capacity` samples of at most `page` bytes each; a context manager.

    After `finish` the file is complete. FFCV's header, field descriptions and tables come from FFCV's code.
    """

    def __init__(self, path: Path, capacity: int, page: int) -> None:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.memory_allocator import MemoryAllocator
        from ffcv.writer import DatasetWriter

        self._path = path
        self._format = DatasetWriter(str(path), {"image": RGBImageField(), "label": IntField()}, page, num_workers=1)
        self._format.num_samples = capacity
        self._format.prepare()
        self._pages = MemoryAllocator(str(path), self._format.data_region_start, page)
        self._pages.__enter__()
        self._rows: list[tuple[int, ...]] = []

    def add(self, image: StoredImage, label: int) -> None:
        """Append a sample. Raises ValueError if it is larger than a page or a side is over MAX_SIDE."""
        if max(image.width, image.height) > MAX_SIDE:
            raise ValueError(f"{image.width} x {image.height} pixels do not fit FFCV's format")
        self._pages.set_current_sample(len(self._rows))
        offset, room = self._pages.malloc(len(image.data))
        room[:] = np.frombuffer(image.data, dtype=np.uint8)
        crc = zlib.crc32(image.data)
        self._rows.append((offset, room.size, label, crc, MODES[image.mode], image.width, image.height))

    def finish(self) -> dict[str, Column]:
        """Write the tables; returns the columns of the index. Raises OSError if the disk is full."""
        self._pages.__exit__(None, None, None)
        # Pages are written unbuffered, and FFCV does not detect an incomplete write.
        if self._rows and self._path.stat().st_size < max(row[0] + row[1] for row in self._rows):
            raise OSError(errno.ENOSPC, "the disk is full", str(self._path))
        table = np.array(self._rows, dtype=np.int64).reshape(-1, len(COLUMNS))
        columns: dict[str, Column] = {name: table[:, i].astype(kind) for i, (name, kind) in enumerate(COLUMNS.items())}
        self._fill_metadata(columns)
        self._format.header["num_samples"] = len(self._rows)
        self._format.finalize([self._pages.allocations])
        return columns

    def _fill_metadata(self, columns: dict[str, Column]) -> None:
        metadata = np.frombuffer(self._format.metadata_sm.buf, dtype=self._format.metadata_type)[: len(self._rows)]
        image, label = (metadata[name] for name in metadata.dtype.names or ())
        for field, column in (("mode", "mode"), ("width", "width"), ("height", "height"), ("data_ptr", "offset")):
            image[field] = columns[column]
        label[:] = columns["label"]

    def __enter__(self) -> "BetonWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._pages.fp.close()
        self._format.metadata_sm.close()
        self._format.metadata_sm.unlink()
