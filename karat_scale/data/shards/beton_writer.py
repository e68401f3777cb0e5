"""Write betons in FFCV's format, without FFCV's processes.

FFCV's DatasetWriter waits for ever if one of its workers dies or a sample raises an error, re-encodes JPEGs, and writes
samples in the order in which its workers finish. Here one process writes the samples in order, so the same samples
give the same bytes, and an error is raised.
"""

import errno
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from karat_scale.data.shards.beton import COLUMNS, MODES, Column

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
