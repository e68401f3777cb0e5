"""A data set at a URL: its records and indexes, its samples, and the node's cache of them.

All processes of the node share the cache. Its entries are files, its size is bounded, and it is kept over restarts.

    <directory>/ab/abcdef...        an entry; it gets this name when it is complete
    <directory>/ab/abcdef....part   an entry in the making; its lock says whether a process still makes it
    <directory>/total               the bytes of all entries

An entry's modification time is that of its last use. When the total is over the limit, the least recently used entries
are removed. A process that has an entry open can still read it then.

`RemoteUse` says what is fetched together, how far ahead, and what the cache must hold.

An extent is consecutive samples, fetched by one request and kept in the cache. Its entry there holds its bytes. If the
index lacks the CRC-32s of its samples, the entry has them at its end, as uint32. So each sample is checked when it is
read from the cache.
"""

import errno
import math
import os
import re
import stat
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b, sha256
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from karat_scale.data.shards.shard_files import CHANGED, Blocks, ChangedSampleError, SamplePlaces
from karat_scale.data.shards.shard_format import DATASET_FILE, FileRecord, ShardRecord
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import lock, locked
from karat_scale.foundation.machine import is_local, local_directory, number_in
from karat_scale.foundation.native_build import cache_directory
from karat_scale.foundation.stores import DEFAULT_TIMEOUT, NO_SIZE, Store
from karat_scale.recipe import DataConfig

VARIABLE = "KARAT_DATA_CACHE"
# How far below its limit the cache is emptied, so that this is not done for each new entry.
_KEPT = 0.9
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.05
_PART = ".part"
_NAME_LENGTH = 40
_ENTRY = re.compile(rf"[0-9a-f]{{{_NAME_LENGTH}}}({re.escape(_PART)})?")


def data_cache_directory() -> Path:
    """Return the directory of the cache: KARAT_DATA_CACHE, or one below KARAT_CACHE_DIR or on a disk of this node."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser()
    usual = cache_directory()
    if os.environ.get("KARAT_CACHE_DIR") or is_local(usual):
        return usual / "data"
    return (local_directory() or usual) / "data"


class Part:
    """An entry in the making: a file that is written from front to back. See `Sink`."""

    def __init__(self, handle: int, directory: Path) -> None:
        self._handle, self._directory = handle, directory

    def restart(self) -> None:
        """Remove what was written, also by a process that was killed."""
        with _named_errors(self._directory):
            os.ftruncate(self._handle, 0)
            os.lseek(self._handle, 0, os.SEEK_SET)

    def write(self, data: bytes) -> None:
        """Append all of `data`. Raises DataError where the disk is full."""
        view = memoryview(data)
        with _named_errors(self._directory):
            while view:
                view = view[os.write(self._handle, view) :]

    def read(self, size: int, offset: int) -> bytes:
        """Return bytes that were written."""
        return os.pread(self._handle, size, offset)


class NodeCache:
    """Entries by key. Each is made by one process of the node at a time, while the others wait for it.

    limit: the bytes that all entries may have together.

    Raises:
        DataError: the directory cannot be used, or its disk is full.
    """

    def __init__(self, directory: Path, limit: float) -> None:
        self.directory, self._limit = directory, limit
        with _named_errors(self.directory):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = directory.stat()
        fix = f"set {VARIABLE} to a directory of yours"
        if found.st_uid != os.getuid():
            raise DataError(f"the cache {directory} belongs to another user; {fix}")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise DataError(f"other users may write to the cache {directory}; chmod go-w {directory}, or {fix}")

    def open(
        self, key: str, size: int, make: Callable[[Part], None], deadline: float, waits: bool = True
    ) -> int | None:
        """Return a descriptor of an entry of `size` bytes, which the caller closes.

        Args:
            make: writes the entry's content, if it is not there.
            deadline: the time, by time.monotonic, until which it waits for another process that makes the entry.
            waits: whether it waits. If not, it returns None at once if another process makes the entry.

        Raises:
            DataError: the entry cannot be stored, or another process did not finish it in time.
        """
        path, pause = self._path(key), _FIRST_PAUSE
        while True:
            with _named_errors(self.directory):
                if (entry := _whole(path, size)) is not None:
                    return entry
                part = self._claim(path)
            if part is not None:
                return self._made(path, part, size, make)
            if not waits:
                return None
            if time.monotonic() > deadline:
                raise DataError(f"another process has not fetched {key.partition(' ')[0]} in time; raise data.timeout")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def find(self, key: str, size: int) -> int | None:
        """Return a descriptor of an entry of `size` bytes, which the caller closes; None if there is none."""
        with _named_errors(self.directory):
            return _whole(self._path(key), size)

    def touch(self, key: str) -> bool:
        """Note that an entry will be used soon; returns whether there is one."""
        try:
            os.utime(self._path(key))
        except OSError:
            return False
        return True

    def remove(self, key: str) -> None:
        """Remove an entry, which is damaged."""
        with suppress(OSError):
            self._path(key).unlink()

    def keeps_nothing(self) -> DataError:
        """Return the error for an entry that was made twice and is wrong each time."""
        return DataError(f"the cache {self.directory} does not keep what is written to it; check its disk")

    def _path(self, key: str) -> Path:
        name = sha256(key.encode()).hexdigest()[:_NAME_LENGTH]
        return self.directory / name[:2] / name

    def _claim(self, path: Path) -> int | None:
        """Return the locked descriptor of the entry in the making; None where another process has the lock."""
        part = path.with_name(path.name + _PART)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if _lock(handle, part):
            return handle
        os.close(handle)
        return None

    def _made(self, path: Path, part: int, size: int, make: Callable[[Part], None]) -> int:
        temporary = path.with_name(path.name + _PART)
        try:
            # Another process may have made it before this one had the lock.
            if (entry := _whole(path, size)) is not None:
                temporary.unlink(missing_ok=True)
                return entry
            content = Part(part, self.directory)
            content.restart()
            make(content)
            with _named_errors(self.directory):
                temporary.rename(path)
                entry = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(part)
        with suppress(OSError):  # the entry is there, whatever becomes of the count
            with self._total() as (total, write):
                write(total + size)
            if total + size > self._limit:
                self._make_room()
        return entry

    @contextmanager
    def _total(self) -> Iterator[tuple[int, Callable[[int], object]]]:
        """Yield the bytes of all entries, and a function that writes a new total; one process at a time."""
        with locked(self.directory / "total") as handle:
            assert handle is not None
            text = os.pread(handle, 32, 0)
            yield int(text) if text.strip().isdigit() else 0, lambda number: os.pwrite(handle, b"%-32d" % number, 0)

    def _make_room(self) -> None:
        """Remove the least recently used entries. One process does so at a time; the others do not wait for it."""
        total = math.inf
        while total > self._limit:  # others add entries meanwhile, and leave it to this one to make room
            with locked(self.directory / "making_room", wait=False) as held:
                if held is None:
                    return
                with self._total() as (before, _):
                    pass
                entries = sorted(self._entries())
                left = sum(size for _, size, _ in entries)
                for _, size, path in entries:
                    if left <= _KEPT * self._limit:
                        break
                    with suppress(FileNotFoundError):
                        Path(path).unlink()
                    left -= size
                with self._total() as (now, write):
                    write(left + max(0, now - before))
            with self._total() as (total, _):
                pass

    def _entries(self) -> Iterator[tuple[int, int, str]]:
        """Yield the time of the last use, the bytes and the path of each entry; parts without a maker are removed.

        The user may have chosen a directory with other files in it, so only names that we give count.
        """
        for folder in os.scandir(self.directory):
            if not (re.fullmatch(r"[0-9a-f]{2}", folder.name) and folder.is_dir(follow_symlinks=False)):
                continue
            for file in os.scandir(folder):
                if not (_ENTRY.fullmatch(file.name) and file.is_file(follow_symlinks=False)):
                    continue
                with suppress(FileNotFoundError):
                    if file.name.endswith(_PART):
                        _remove_if_left(Path(file.path))
                    else:
                        found = file.stat(follow_symlinks=False)
                        yield found.st_mtime_ns, found.st_size, file.path


@contextmanager
def _named_errors(directory: Path) -> Iterator[None]:
    """Turn an error of the cache's disk into one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free space there, lower data.cache_gb, or set" if full else "set"
        raise DataError(
            f"the cache of remote data, {directory}, cannot be written: {error.strerror}; {fix} {VARIABLE} to a "
            "directory on another disk"
        ) from error


def _whole(path: Path, size: int) -> int | None:
    """Return a descriptor of a complete entry, and note that it was used; None if there is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    found = os.fstat(handle)
    # Cut short by a crash of the machine, or a pipe: it is made again.
    if found.st_size != size or not stat.S_ISREG(found.st_mode):
        os.close(handle)
        return None
    with suppress(OSError):  # a disk that is read-only by now
        os.utime(handle)
    return handle


def _lock(handle: int, path: Path) -> bool:
    """Lock a file that still has its name; False where another process has the lock, or has renamed or removed it."""
    try:
        is_mine = lock(handle, wait=False, without=None)
        return is_mine and os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def _remove_if_left(part: Path) -> None:
    handle = os.open(part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)  # as NFS wants it for a lock
    try:
        if _lock(handle, part):
            part.unlink()
    finally:
        os.close(handle)


# Samples that are fetched together, and ahead, where the order does not say it.
_TOGETHER, _AHEAD = 64, 1024
# The samples of a rank, in `order: full`: those ahead, those that workers have, and as many that were used lately.
_HELD = 8 * _AHEAD


@dataclass(frozen=True)
class RemoteUse:
    """How the samples at a URL are used.

    Attributes:
        timeout: data.timeout.
        cache_gb: data.cache_gb.
        together: the consecutive samples that are fetched by one request.
        ahead: the samples of a rank that may be fetched before its workers are given them.
        working_set: the samples that the node's cache must hold at a time.
    """

    timeout: float = DEFAULT_TIMEOUT
    cache_gb: float = 20.0
    together: int = 1
    ahead: int = _AHEAD
    working_set: int = 0

    @classmethod
    def of(cls, data: DataConfig, training: bool, world_size: int | None = None) -> "RemoteUse":
        """Return how a recipe uses a split, by the ranks in the environment, or by their number `world_size`."""
        ranks, on_this_node = _ranks(os.environ)
        if world_size is not None:  # the ranks of a launcher may share batches; without one, all may be on this node
            ranks, on_this_node = world_size, min(on_this_node, world_size) if ranks > 1 else world_size
        if training and data.order == "block":
            # All ranks use one window at a time, while the next is fetched.
            window = data.block_samples * data.window_blocks
            return cls(data.timeout, data.cache_gb, data.block_samples, -(-window // ranks), 2 * window)
        return cls(data.timeout, data.cache_gb, 1 if training else _TOGETHER, _AHEAD, _HELD * on_this_node)


def _ranks(environ: Mapping[str, str]) -> tuple[int, int]:
    """Return the numbers of ranks of the run and of this node, as torchrun or srun set them."""
    if "WORLD_SIZE" in environ:
        ranks = number_in(environ, "WORLD_SIZE")
        return ranks, number_in(environ, "LOCAL_WORLD_SIZE", str(ranks))
    ranks = number_in(environ, "SLURM_STEP_NUM_TASKS", "1")
    return ranks, -(-ranks // number_in(environ, "SLURM_STEP_NUM_NODES", "1"))


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


class RemoteShardFiles:
    """Samples in tars at a URL. See LocalShardFiles.

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
        """See LocalShardFiles. It reads the store, since the cache has only images."""
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

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

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
        places, shard = self._places, self._places.shards[extent.shard]

        def fetch(part: Part) -> None:
            etag = shard.etag if extent.has_crcs and shard.etag else ""
            self._store.copy(shard.name, extent.begin, extent.end, part, etag, deadline)
            if extent.has_crcs:
                ids = slice(extent.first, extent.last)
                offsets, sizes = (places.offsets[ids] - extent.begin).tolist(), places.sizes[ids].tolist()
                crcs = [zlib.crc32(part.read(size, offset)) for offset, size in zip(offsets, sizes, strict=True)]
                part.write(np.array(crcs, "<u4").tobytes())

        return self._cache.open(self._key(extent), extent.entry_bytes, fetch, deadline, waits)

    def _key(self, extent: Extent) -> str:
        """Return the key of an extent: its file, the file's content, and the place of each of its samples."""
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
    """The files of a data set below a URL. See LocalPlace. `use` says what is fetched together."""

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
            if found.bytes < 0:
                raise DataError(f"{self.where(shard.name)}: {NO_SIZE}")
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
        span = sum(shard.bytes for shard in places.shards)
        needed = _SPARE * span * min(1.0, self._use.working_set / max(1, len(places.sizes))) / 1e9
        if needed > self._use.cache_gb:  # the samples that the order needs at a time have no place
            raise DataError(
                f"data.cache_gb = {self._use.cache_gb:g} is too small for the order of the samples of "
                f"{self._store.url}: it needs {needed:.3g} GB at a time; set data.cache_gb={math.ceil(needed)} or more"
                + (", or lower data.window_blocks or data.block_samples" if self._use.together > 1 else "")
            )
        return RemoteShardFiles(self._store, self._cache, places, self._use.together)
