"""The bytes of samples by their id: the interface of all sources, the places of samples, tars on a file system.

If the order uses few blocks of samples at a time, whole blocks are read ahead.
"""

import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from karat_scale.data.shards.shard_format import ShardRecord


class ImageSource:
    """Encoded images by sample id, 0 .. len - 1. A copy has its own open files.

    labels: int32 [len]. classes: the names of the classes in the order of the labels. ahead: the number of samples of a
    rank to fetch before they are needed; 0 on a file system.
    """

    labels: npt.NDArray[np.int32]
    classes: tuple[str, ...]
    ahead = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def identity(self) -> object:
        """The samples' identity as plain data, equal for copies; by default a hash of their labels."""
        return sha256(self.labels.tobytes()).hexdigest()

    @property
    def notice(self) -> str:
        """A line about what is left out; "" if nothing is."""
        return ""

    def read(self, sample_id: int) -> bytes:
        """Return the image's bytes. Raises DataError naming the file if it cannot be read or has changed."""
        raise NotImplementedError

    def locate(self, sample_id: int) -> tuple[str, str]:
        """Return the sample's key (or path) and its shard (or folder), for messages."""
        raise NotImplementedError

    def file_of(self, sample_id: int) -> str:
        """Return the path or the URL of the file that holds the sample, without reading the disk."""
        raise NotImplementedError

    def prepare(self, sample_ids: Iterable[int]) -> None:
        """Fetch what is needed for some samples at a URL, several at a time. Raises DataError."""

    def hint(self, sample_ids: Iterable[int]) -> None:
        """Fetch samples at a URL into the node's cache, except those that another process fetches. Raises DataError."""

    def close(self) -> None:
        """Close open files; a later read opens them again."""


class Blocks(NamedTuple):
    """An order that uses `window` blocks at a time. samples: the samples of each block; 0 for another order."""

    samples: int = 0
    window: int = 0


NO_BLOCKS = Blocks()


MAX_OPEN_SHARDS = 256


@dataclass(frozen=True, eq=False)
class SamplePlaces:
    """The places of a split's samples, shard after shard.

    starts: int64 [shards + 1], the first sample of each shard. offsets, sizes: int64 [samples], the place of a sample's
    bytes in its shard. crcs: uint32 [samples]; meaningless for a shard without a SHA-256: only its headers were read.
    """

    shards: Sequence[ShardRecord]
    starts: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    crcs: npt.NDArray[np.uint32]

    def shard_of(self, sample_id: int) -> int:
        """Return the number of the shard that holds a sample."""
        return int(np.searchsorted(self.starts, sample_id, side="right")) - 1

    def check(self, sample_id: int, data: bytes | memoryview) -> None:
        """Raise ChangedSampleError unless these are the bytes that were indexed, by their CRC if that is known."""
        if len(data) != self.sizes[sample_id]:
            raise ChangedSampleError(CUT_SHORT)
        if self.shards[self.shard_of(sample_id)].sha256 and zlib.crc32(data) != self.crcs[sample_id]:
            raise ChangedSampleError(CHANGED)


class ChangedSampleError(Exception):
    """The bytes of a sample are not those that were indexed; the message says what is wrong with its shard."""


CUT_SHORT, CHANGED = "is cut short", "has changed since its index was written"


class LocalShardFiles:
    """The bytes of samples by their id, in tars on a file system. A copy has its own open files.

    readahead: the blocks that the system reads ahead when one of their samples is read, once in an epoch.
    """

    def __init__(self, directory: Path, places: SamplePlaces, readahead: Blocks) -> None:
        self._directory, self._places, self._readahead = directory, places, readahead
        self._files: OrderedDict[int, int] = OrderedDict()
        self._asked: OrderedDict[int, None] = OrderedDict()

    def read(self, sample_id: int) -> bytes:
        """Return a sample's bytes, checked against their CRC if that is known.

        Raises:
            OSError: the file cannot be read.
            ChangedSampleError: the bytes differ from those that were indexed, or are fewer.
            DataError: the store or the cache fails.
        """
        places = self._places
        data = os.pread(self._opened(sample_id), int(places.sizes[sample_id]), int(places.offsets[sample_id]))
        places.check(sample_id, data)
        return data

    def span(self, sample_id: int, begin: int, end: int) -> bytes:
        """Return these bytes of the file that holds a sample. Raises OSError, DataError."""
        return os.pread(self._opened(sample_id), end - begin, begin)

    def _opened(self, sample_id: int) -> int:
        """Return a descriptor of the shard that holds a sample; its block is read ahead."""
        places, number = self._places, self._places.shard_of(sample_id)
        if number in self._files:
            self._files.move_to_end(number)
        else:
            if len(self._files) >= MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            path = self._directory / places.shards[number].name
            self._files[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._read_ahead(number, sample_id)
        return self._files[number]

    def _read_ahead(self, number: int, sample_id: int) -> None:
        """Request the part of a sample's block that is in the open shard of this number.

        It remembers the parts of little more than a window of blocks, since a window may begin inside a block, and
        files may cut blocks. So it has forgotten a block by the time the next epoch comes to it.
        """
        places, (samples, window) = self._places, self._readahead
        if not samples or not hasattr(os, "posix_fadvise"):  # not on every system, and only a hint
            return
        # Blocks and files are both in order, so the first sample identifies the part.
        first = max(sample_id // samples * samples, int(places.starts[number]))
        if first in self._asked:
            return
        self._asked[first] = None
        if len(self._asked) > window + window // 2 + 2:
            self._asked.popitem(last=False)
        part = slice(first, min((sample_id // samples + 1) * samples, int(places.starts[number + 1])))
        # In the tars of others, an image may lie before that of the sample before it.
        begin, end = int(places.offsets[part].min()), int((places.offsets[part] + places.sizes[part]).max())
        with suppress(OSError):
            os.posix_fadvise(self._files[number], begin, end - begin, os.POSIX_FADV_WILLNEED)

    def prepare(self, sample_ids: Iterable[int]) -> None:
        """See ImageSource."""

    def hint(self, sample_ids: Iterable[int]) -> None:
        """See ImageSource."""

    def close(self) -> None:
        """Close open files; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        # Descriptors have no meaning in a process that was not forked.
        return {**self.__dict__, "_files": OrderedDict()}
