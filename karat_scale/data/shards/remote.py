"""A data set at a URL: its records and indexes, and its samples, which are fetched in extents.

An extent is consecutive samples, fetched by one request and kept in the node's cache. Its entry there is its bytes. If
the index does not know the CRC-32 of its samples, these follow, as uint32. So each sample is checked when it is read
from the cache.
"""

import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b, sha256
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple

import numpy as np

from karat_scale.data.shards.cache import NodeCache, Part, RemoteUse, data_cache_directory
from karat_scale.data.shards.shard_files import CHANGED, Blocks, ChangedSampleError, SamplePlaces, ShardFiles
from karat_scale.data.shards.shard_format import DATASET_FILE, FileRecord, ShardRecord
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.stores import Store

# Descriptors of extents; one that the cache has removed takes space on the disk until it is closed.
_MAX_OPEN = 64
# Requests at a time of one process, and the bytes that all of them together may hold.
_MOST_REQUESTS, _FEWEST_REQUESTS, _BYTES_UNDER_WAY = 32, 4, 256 << 20
_CRC_BYTES = 4
DAMAGED_ON_THE_WAY = "arrives damaged, each time in another way; check the network, and run the same command again"


class Extent(NamedTuple):
    """Consecutive samples of one shard, first .. last - 1, and their bytes in it, begin .. end - 1."""

    shard: int
    first: int
    last: int
    begin: int
    end: int
    has_crcs: bool
    """Whether its entry in the cache has the CRCs of its samples."""

    @property
    def entry_bytes(self) -> int:
        """The size of its entry in the cache."""
        return self.end - self.begin + self.has_crcs * _CRC_BYTES * (self.last - self.first)


class RemoteShardFiles(ShardFiles):
    """Samples in tars at a URL. See ShardFiles.

    together: the samples of an extent, which the order should use at about the same time.
    """

    def __init__(self, store: Store, cache: NodeCache, places: SamplePlaces, together: int) -> None:
        self._store, self._cache, self._places, self._together = store, cache, places, together
        self._open: OrderedDict[Extent, int] = OrderedDict()

    def read(self, sample_id: int) -> bytes:
        places, extent = self._places, self._extent(sample_id)
        size, offset = int(places.sizes[sample_id]), int(places.offsets[sample_id]) - extent.begin
        seen: list[bytes] = []
        for _ in range(2):
            entry = self._entry(extent)
            data = os.pread(entry, size, offset)
            if len(data) == size and zlib.crc32(data) == self._crc(extent, entry, sample_id):
                return data
            # The cache's disk, or what was fetched, is wrong: it is fetched again.
            os.close(self._open.pop(extent))
            self._cache.remove(self._key(extent))
            seen.append(data)
        if not extent.has_crcs:
            if seen[0] != seen[1]:
                raise DataError(f"{self._store.where(places.shards[extent.shard].name)} {DAMAGED_ON_THE_WAY}")
            raise ChangedSampleError(CHANGED)
        raise self._cache.keeps_nothing()

    def span(self, sample_id: int, begin: int, end: int) -> bytes:
        """The cache has images alone."""
        shard = self._places.shards[self._places.shard_of(sample_id)]
        return self._store.read(shard.name, begin, end, shard.etag or "")

    def _crc(self, extent: Extent, entry: int, sample_id: int) -> int:
        if not extent.has_crcs:
            return int(self._places.crcs[sample_id])
        place = extent.end - extent.begin + _CRC_BYTES * (sample_id - extent.first)
        return int.from_bytes(os.pread(entry, _CRC_BYTES, place), "little")

    def prepare(self, sample_ids: Iterable[int]) -> None:
        missing = []
        for extent in self.extents_of(sample_ids):
            if extent in self._open:
                continue
            if (entry := self._cache.find(self._key(extent), extent.entry_bytes)) is not None:
                self._keep(extent, entry)
            else:
                missing.append(extent)
        self._fetch_all(missing, waits=True)

    def hint(self, sample_ids: Iterable[int]) -> None:
        missing = [extent for extent in self.extents_of(sample_ids) if not self._cache.touch(self._key(extent))]
        self._fetch_all(missing, waits=False)

    def extents_of(self, sample_ids: Iterable[int]) -> list[Extent]:
        """Return the extents of some samples, each once, in the order of the samples."""
        return list(dict.fromkeys(map(self._extent, sample_ids)))

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _extent(self, sample_id: int) -> Extent:
        places = self._places
        shard, block = places.shard_of(sample_id), sample_id // self._together
        first = max(block * self._together, int(places.starts[shard]))
        last = min((block + 1) * self._together, int(places.starts[shard + 1]))
        offsets = places.offsets[first:last]
        end = int((offsets + places.sizes[first:last]).max())
        return Extent(shard, first, last, int(offsets.min()), end, not places.shards[shard].sha256)

    def _entry(self, extent: Extent) -> int:
        if extent in self._open:
            self._open.move_to_end(extent)
            return self._open[extent]
        entry = self._fetched(extent, self._store.deadline(), waits=True)
        assert entry is not None
        return self._keep(extent, entry)

    def _keep(self, extent: Extent, entry: int) -> int:
        while len(self._open) >= _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        self._open[extent] = entry
        return entry

    def _fetched(self, extent: Extent, deadline: float, waits: bool) -> int | None:
        """Return a descriptor of an extent; None if another process fetches it and this one must not wait."""
        return self._cache.open(
            self._key(extent), extent.entry_bytes, lambda part: self._fetch(extent, part, deadline), deadline, waits
        )

    def _fetch(self, extent: Extent, part: Part, deadline: float) -> None:
        """Write the content of an extent's entry."""
        places, shard = self._places, self._places.shards[extent.shard]
        etag = shard.etag if extent.has_crcs and shard.etag else ""
        self._store.copy(shard.name, extent.begin, extent.end, part, etag, deadline)
        if extent.has_crcs:
            ids = slice(extent.first, extent.last)
            offsets, sizes = (places.offsets[ids] - extent.begin).tolist(), places.sizes[ids].tolist()
            crcs = [zlib.crc32(part.read(size, offset)) for offset, size in zip(offsets, sizes, strict=True)]
            part.write(np.array(crcs, "<u4").tobytes())

    def _key(self, extent: Extent) -> str:
        """Return the key of an extent: its file, the content of that, and the place of each of its samples."""
        shard, ids = self._places.shards[extent.shard], slice(extent.first, extent.last)
        places = self._places.offsets[ids].tobytes() + self._places.sizes[ids].tobytes()
        content = shard.sha256 or shard.etag or f"{shard.bytes} {shard.index.sha256}"
        return f"{self._store.where(shard.name)} {content} {blake2b(places, digest_size=16).hexdigest()}"

    def _fetch_all(self, extents: list[Extent], waits: bool) -> None:
        """Fetch extents into the cache, in threads if there are several; raises the first of their errors."""
        deadline = self._store.deadline()

        def fetch(extent: Extent) -> None:
            entry = self._fetched(extent, deadline, waits)
            if entry is not None:
                os.close(entry)  # a large batch has more extents than a process may open

        if len(extents) == 1:
            fetch(extents[0])
        elif extents:
            largest = max(extent.entry_bytes for extent in extents)
            threads = min(_MOST_REQUESTS, max(_FEWEST_REQUESTS, _BYTES_UNDER_WAY // largest), len(extents))
            with ThreadPool(threads) as pool:  # its threads are daemons: one that waits keeps no process alive
                pool.map(fetch, extents, chunksize=1)


_THREADS = 16
# The cache is emptied to a tenth below its limit.
_SPARE = 1.12
_CHANGED = "has changed since it was indexed"


class RemotePlace:
    """The files of a data set below a URL, like those of LocalPlace. The use says what is fetched together."""

    fix = "upload the shards again, or run karat index again"

    def __init__(self, url: str, use: RemoteUse) -> None:
        self._store, self._use = Store(url, use.timeout), use
        self._cache = NodeCache(data_cache_directory(), 1e9 * use.cache_gb)

    def where(self, name: str) -> str:
        return self._store.where(name)

    def check(self, shards: Sequence[ShardRecord], by_hash: bool) -> None:
        if by_hash:
            raise DataError(
                f"data.verify = hash would fetch all of {self._store.url} at each start; use data.verify=size, which "
                "checks each image when it is fetched"
            )
        facts = self._store.facts_of([shard.name for shard in shards])
        for shard in shards:
            found = facts[shard.name]
            if found.bytes != shard.bytes:
                raise DataError(
                    f"{self.where(shard.name)} {_CHANGED}: {found.bytes} bytes, {DATASET_FILE} says {shard.bytes}; "
                    f"{self.fix}"
                )
            # With a hash, the CRC of each image is known, and is checked when it is read.
            if shard.etag and not shard.sha256 and found.etag != shard.etag:
                raise DataError(f"{self.where(shard.name)} {_CHANGED}: its ETag differs; {self.fix}")

    def read_checked(self, record: FileRecord) -> bytes:
        deadline = self._store.deadline()

        def fetch(part: Part) -> None:
            seen: list[bytes] = []
            while len(seen) < 2:
                seen.append(self._store.read(record.name, 0, record.bytes, deadline=deadline))
                if sha256(seen[-1]).hexdigest() == record.sha256:
                    part.write(seen[-1])
                    return
            if seen[0] != seen[1]:
                raise DataError(f"{self.where(record.name)} {DAMAGED_ON_THE_WAY}")
            raise DataError(f"{self.where(record.name)} has changed since it was written; {self.fix}")

        key = f"{self.where(record.name)} {record.sha256}"
        for _ in range(2):
            entry = self._cache.open(key, record.bytes, fetch, deadline)
            assert entry is not None
            try:
                data = os.pread(entry, record.bytes, 0)
            finally:
                os.close(entry)
            if sha256(data).hexdigest() == record.sha256:
                return data
            self._cache.remove(key)
        raise self._cache.keeps_nothing()

    def read_all_checked(self, records: Sequence[FileRecord]) -> Iterator[bytes]:
        with ThreadPool(min(_THREADS, max(1, len(records)))) as pool:
            yield from pool.imap(self.read_checked, records)

    def files(self, places: SamplePlaces, readahead: Blocks) -> RemoteShardFiles:
        self._check_cache(places)
        return RemoteShardFiles(self._store, self._cache, places, self._use.together)

    def _check_cache(self, places: SamplePlaces) -> None:
        """Refuse a cache in which the samples that the order needs at a time have no place."""
        samples = len(places.sizes)
        span = sum(shard.bytes for shard in places.shards)
        needed = _SPARE * span * min(1.0, self._use.working_set / max(1, samples)) / 1e9
        if needed > self._use.cache_gb:
            raise DataError(
                f"data.cache_gb = {self._use.cache_gb:g} is too small for the order of the samples of "
                f"{self._store.url}: it needs {needed:.3g} GB at a time; set data.cache_gb={needed:.3g} or more"
                + (", or lower data.window_blocks or data.block_samples" if self._use.together > 1 else "")
            )
