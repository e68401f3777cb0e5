"""The node's cache of remote data, and how a recipe uses samples at a URL through it.

All processes of the node share the cache. Its entries are files, its size is bounded, and it is kept over restarts.

    <directory>/ab/abcdef...        an entry; it gets this name when it is complete
    <directory>/ab/abcdef....part   an entry in the making; its lock says whether a process still makes it
    <directory>/total               the bytes of all entries

An entry's modification time is that of its last use. When the total is over the limit, the entries that were not used
for the longest are removed. A process that has an entry open can still read it then.

A recipe's use says what is fetched together, how far ahead, and what the cache must hold.
"""

import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import lock, locked
from karat_scale.foundation.machine import is_local, local_directory
from karat_scale.foundation.native_build import cache_directory
from karat_scale.foundation.stores import DEFAULT_TIMEOUT
from karat_scale.recipe import DataConfig

VARIABLE = "KARAT_DATA_CACHE"
# How far below its limit the cache is emptied, so that this is not done for each new entry.
_KEPT = 0.9
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.05
_PART = ".part"
_NAME_LENGTH = 40


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
        if found.st_uid != os.getuid():
            raise DataError(f"the cache {directory} belongs to another user; set {VARIABLE} to a directory of yours")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            with _named_errors(self.directory):
                directory.chmod(0o700)

    def open(
        self, key: str, size: int, make: Callable[[Part], None], deadline: float, waits: bool = True
    ) -> int | None:
        """Return a descriptor of an entry of `size` bytes, which the caller closes.

        Args:
            make: writes the entry's content, if it is not there.
            deadline: of time.monotonic; until then, it waits for another process that makes the entry.
            waits: if not, it returns None at once where another process makes the entry.

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
                raise DataError(f"another process did not finish to fetch {key.partition(' ')[0]} in time")
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
        """Return the error where an entry that was made twice is wrong each time."""
        return DataError(f"the cache {self.directory} does not keep what is written to it; check its disk")

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()[:_NAME_LENGTH]
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
        """The bytes of all entries, with what writes another number; one process at a time."""
        with locked(self.directory / "total") as handle:
            assert handle is not None
            text = os.pread(handle, 32, 0)
            yield int(text) if text.strip().isdigit() else 0, lambda number: os.pwrite(handle, b"%-32d" % number, 0)

    def _make_room(self) -> None:
        """Remove the entries that were not used for the longest. One process does so at a time; the others go on."""
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

    def _entries(self) -> Iterator[tuple[int, int, str]]:
        """Yield the time of the last use, the bytes and the path of each entry; parts without a maker are removed."""
        for folder in os.scandir(self.directory):
            if not folder.is_dir(follow_symlinks=False):
                continue
            for file in os.scandir(folder):
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
# Of each rank, in `order: full`: those ahead, those that workers were given, and as many that were used lately.
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
    def of(cls, data: DataConfig, training: bool) -> "RemoteUse":
        """Return how a recipe uses a split, on each of the ranks that the environment tells of."""
        ranks, on_this_node = _ranks(os.environ)
        if training and data.order == "block":
            # All ranks use one window at a time, while the next is fetched.
            window = data.block_samples * data.window_blocks
            return cls(data.timeout, data.cache_gb, data.block_samples, -(-window // ranks), 2 * window)
        return cls(data.timeout, data.cache_gb, 1 if training else _TOGETHER, _AHEAD, _HELD * on_this_node)


def _ranks(environ: Mapping[str, str]) -> tuple[int, int]:
    """Return the ranks of the run and those of this node, as torchrun or srun tells them."""
    if "WORLD_SIZE" in environ:
        ranks = int(environ["WORLD_SIZE"])
        return ranks, int(environ.get("LOCAL_WORLD_SIZE", ranks))
    ranks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return ranks, -(-ranks // int(environ.get("SLURM_STEP_NUM_NODES", "1")))
