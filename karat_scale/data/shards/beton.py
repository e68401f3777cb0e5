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

from karat_scale.data.shards import shard_format
from karat_scale.data.shards.shard_files import (
    CUT_SHORT,
    NO_BLOCKS,
    Blocks,
    ChangedSampleError,
    LocalShardFiles,
    SamplePlaces,
)
from karat_scale.data.shards.shard_format import BETON_WORDING, beton_path, index_path, read_record, record_path
from karat_scale.data.shards.shards import IndexedSplit, LocalPlace

# As FFCV numbers the ways in which it stores an image.
MODES = {"jpg": 0, "raw": 1}
RAW = MODES["raw"]
COLUMNS = {**shard_format.INDEX_FIELDS, "mode": np.uint8, "width": np.int32, "height": np.int32}
Column = npt.NDArray[Any]


def index_bytes(columns: dict[str, Column], keys: list[str]) -> bytes:
    """Return the index file of these columns and keys."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: columns[name].astype(kind) for name, kind in COLUMNS.items()}
    np.savez(buffer, key=np.array([key.encode() for key in keys], dtype=np.bytes_), **arrays)
    return buffer.getvalue()


class BetonFiles(LocalShardFiles):
    """The images of one beton. See LocalShardFiles.

    `read` compares a JPEG with its checksum. Raw pixels are read as a PPM image and rely on verify="hash", since a
    checksum would cost a third of their reading.
    lends: raw pixels are read into one buffer, which the next read reuses; for a decoder that keeps no bytes.
    """

    def __init__(
        self, directory: Path, places: SamplePlaces, readahead: Blocks, columns: dict[str, Column], lends: bool
    ) -> None:
        super().__init__(directory, places, readahead)
        self._modes, self._widths, self._heights = columns["mode"], columns["width"], columns["height"]
        self._lends, self._buffer = lends, bytearray()

    def read(self, sample_id: int) -> bytes:
        if self._modes[sample_id] != RAW:
            return super().read(sample_id)
        file = self._opened(sample_id)
        size, offset = int(self._places.sizes[sample_id]), int(self._places.offsets[sample_id])
        header = b"P6 %d %d 255\n" % (self._widths[sample_id], self._heights[sample_id])
        end = len(header) + size
        if len(self._buffer) < end:
            self._buffer = bytearray(end)
        lent = memoryview(self._buffer)[:end]
        lent[: len(header)] = header
        if os.preadv(file, [lent[len(header) :]], offset) != size:
            raise ChangedSampleError(CUT_SHORT)
        return cast(bytes, lent) if self._lends else bytes(lent)


class BetonSplit(IndexedSplit):
    """The images of one beton. See IndexedSplit and BetonFiles."""

    kinds = COLUMNS

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
        record.name, record.index.name = self.path.name, index_path(self.path).name  # they may have been renamed
        shard_format.check_class_count(self.path, len(record.classes), num_classes)
        place, self.listed_in = LocalPlace(self.path.parent, BETON_WORDING), record_path(self.path).name
        super().__init__(record.classes, [record], place, place, verify, readahead)
        self._files = BetonFiles(self.path.parent, self.places, readahead, self._columns, lends)

    def _check_columns(self, columns: dict[str, Column]) -> None:
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
        """Append a sample, which is at most a page, and whose sides are at most MAX_SIDE."""
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
