"""Read the encoded images of a batch by threads, with the operations to apply to each."""

import copy
import resource
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool

import numpy as np
import numpy.typing as npt

from karat_scale.data.batch import Draw
from karat_scale.data.decoders.decode import Decoder, UndecodableImageError, View, check_pixels, read_chosen
from karat_scale.data.decoders.jpeg_header import read_frame
from karat_scale.data.loading.assemble import ImageSource, prepare
from karat_scale.data.plan import PADDING, BatchSlice
from karat_scale.data.shards.shard_files import MAX_OPEN_SHARDS
from karat_scale.foundation.errors import DataError

# The second bytes of markers: 0 means a plain 0xff, those of restarts differ in their last three bits.
START_OF_SCAN, END_OF_IMAGE, STUFFED, RESTART, FILL = 0xDA, 0xD9, 0x00, 0xD0, 0xFF

# From (epoch, sample id, width, height) to the view, and to the draw if there is one.
Choose = Callable[[int, int, int, int], tuple[View, Draw | None]]


@dataclass(frozen=True, eq=False)
class Row:
    """One sample of a batch: the JPEG whose `view` is to be decoded, or its `pixels` if they are decoded already."""

    view: View
    draw: Draw | None
    data: npt.NDArray[np.uint8] | None = None
    pixels: npt.NDArray[np.uint8] | None = None


class RowReader:
    """Reads the rows of a slice in up to `threads` threads, so that a slow file system gets many requests at a time.

    A library decodes batches of ordinary, complete JPEGs. All others are decoded here, by `decoder`. So is a damaged
    JPEG, even if its wanted part may be intact: all backends must find the same samples
    bad.
    """

    def __init__(self, source: ImageSource, decoder: Decoder, choose: Choose, max_pixels: int, threads: int) -> None:
        self._source, self._decoder, self._choose, self._max_pixels = source, decoder, choose, max_pixels
        self._own = threading.local()
        self._sources: list[ImageSource] = []
        self._at: dict[int, int] = {}
        threads = min(threads, _readers_with_files(threads))
        # The threads are daemons: one that waits for a dead file system does not keep the process alive.
        self._pool = ThreadPool(threads) if threads > 1 else None

    def read(self, part: BatchSlice) -> list[Row | None] | None:
        """Return the rows of a slice, None for padding; None instead of the list if one cannot be read or decoded.

        Raises:
            DataError: they are at a URL, and cannot be fetched.
        """
        prepare(self._source, part)
        ids = part.sample_ids.tolist()

        def row(sample_id: int) -> Row | None:
            return None if sample_id == PADDING else self._row(part.epoch, sample_id)

        try:
            return self._pool.map(row, ids) if self._pool else [row(sample_id) for sample_id in ids]
        except (UndecodableImageError, DataError):
            return None

    def _row(self, epoch: int, sample_id: int) -> Row:
        # Each thread has its own open files.
        if not hasattr(self._own, "source"):
            self._own.source = copy.copy(self._source)
            self._sources.append(self._own.source)
        thread = threading.get_ident()
        self._at[thread] = sample_id
        try:
            data = self._own.source.read(sample_id)
        finally:
            del self._at[thread]
        choose = partial(self._choose, epoch, sample_id)
        frame, encoded = read_frame(data), np.frombuffer(data, dtype=np.uint8)
        if frame is None or not frame.is_grey_or_colour or not _ends_as_it_should(encoded):
            pixels, view, draw = read_chosen(self._decoder, data, choose)
            return Row(view, draw, pixels=pixels)
        check_pixels(frame.width, frame.height, self._max_pixels)
        return Row(*choose(frame.width, frame.height), data=encoded)

    def whereabouts(self) -> str:
        """Return what is being read now, for the message of a loader that gets no batch."""
        at = sorted(self._at.copy().values())
        if not at:
            return "all files were read, and pixels were processed"
        places = ", ".join(f"sample {i} in {self._source.file_of(i)}" for i in at)
        return f"reading {places}; check that file system"

    def close(self) -> None:
        """Stop the threads and close their files."""
        if self._pool:
            self._pool.terminate()
            self._pool = None
        for source in self._sources:
            source.close()


def _ends_as_it_should(data: npt.NDArray[np.uint8]) -> bool:
    """True if the JPEG's last scan runs to the end of the image and of the data, without another marker in it."""
    codes = data[np.flatnonzero(data[:-1] == 0xFF) + 1]
    markers = codes[(codes != STUFFED) & (codes != FILL) & (codes & 0xF8 != RESTART)]
    ends: list[int] = [*markers[-2:].tolist(), *data[-2:].tolist()]
    return ends == [START_OF_SCAN, END_OF_IMAGE, 0xFF, END_OF_IMAGE]


def _readers_with_files(wanted: int) -> int:
    """Return how many readers, at most `wanted`, may each keep as many shards open as a source does.

    If this process may open too few files, it allows itself more, as far as the system lets it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = (2 * wanted + 1) * MAX_OPEN_SHARDS  # training and evaluation, and all else
    if soft != resource.RLIM_INFINITY and soft < needed:
        more = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with suppress(OSError, ValueError):  # some sandboxes refuse it
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft // MAX_OPEN_SHARDS - 1))
