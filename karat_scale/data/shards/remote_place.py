"""A data set at a URL, in part or whole: its records and indexes, and what reads its samples."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool

from karat_scale.data.shards.cache import NodeCache, Part, RemoteUse, data_cache_directory
from karat_scale.data.shards.extents import DAMAGED_ON_THE_WAY, RemoteShardFiles
from karat_scale.data.shards.shard_files import Blocks, SamplePlaces
from karat_scale.data.shards.shard_format import DATASET_FILE, FileRecord, ShardRecord
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.stores import Store

_THREADS = 16
# The cache is emptied to a tenth below its limit.
_SPARE = 1.12
_CHANGED = "has changed since it was indexed"


class RemotePlace:
    """The files below a URL. See Place."""

    fix = "upload the shards again, or run karat index again"

    def __init__(self, url: str, use: RemoteUse) -> None:
        self._store, self._use = Store(url, use.timeout), use
        self._cache = NodeCache(data_cache_directory(), 1e9 * use.cache_gb)

    def where(self, name: str) -> str:
        """See Place."""
        return self._store.where(name)

    def check(self, shards: Sequence[ShardRecord], by_hash: bool) -> None:
        """See Place."""
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
        """See Place."""
        deadline = self._store.deadline()

        def fetch(part: Part) -> None:
            seen: list[bytes] = []
            while len(seen) < 2:
                seen.append(self._store.read(record.name, 0, record.bytes, deadline=deadline))
                if hashlib.sha256(seen[-1]).hexdigest() == record.sha256:
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
            if hashlib.sha256(data).hexdigest() == record.sha256:
                return data
            self._cache.remove(key)
        raise DataError(f"the cache {self._cache.directory} does not keep what is written to it; check its disk")

    def read_all_checked(self, records: Sequence[FileRecord]) -> Iterator[bytes]:
        """See Place."""
        with ThreadPool(min(_THREADS, max(1, len(records)))) as pool:
            yield from pool.imap(self.read_checked, records)

    def files(self, places: SamplePlaces, readahead: Blocks) -> RemoteShardFiles:
        """See Place. The use says what is fetched together."""
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
