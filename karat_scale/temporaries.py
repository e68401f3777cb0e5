"""Temporary names beside what is being written: `.NAME.RANDOM.unfinished`, a file or a folder.

The writer holds a lock on it. A kill releases the lock, so what a killed writer left behind is known by it, and the
next writer of that name, or the next start of the run, removes it.
"""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SUFFIX = ".unfinished"
_NAME = re.compile(r"\.(?P<of>.+)\.[a-z0-9_]{8}\.unfinished", re.DOTALL)


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path`; gone after the block, unless it was renamed."""

    def make(prefix: str, directory: Path) -> Path:
        handle, name = tempfile.mkstemp(_SUFFIX, prefix, directory)
        os.close(handle)
        return Path(name)

    with _held(path, make) as temporary:
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`; gone after the block, unless it was renamed."""
    with _held(path, lambda prefix, directory: Path(tempfile.mkdtemp(_SUFFIX, prefix, directory))) as temporary:
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _held(path: Path, make: Callable[[str, Path], Path]) -> Iterator[Path]:
    remove_leftovers(path.parent, path.name)
    while True:
        temporary = make(f".{path.name}.", path.parent)
        try:
            handle = _open(temporary, 0)
        except FileNotFoundError:  # another writer took it for a leftover
            continue
        try:
            _lock(handle)
            if temporary.exists():
                yield temporary
                return
        finally:
            os.close(handle)


def remove_leftovers(directory: Path, of: str | None = None) -> list[str]:
    """Remove what killed writers left in a directory.

    Args:
        of: the name that they were writing; any when None.

    Returns:
        A line for each one that cannot be removed.
    """
    problems = []
    for path in _unfinished(directory, of):
        try:
            handle = _open(path, os.O_NONBLOCK | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        except OSError as error:
            problems.append(_line(path, error))
            continue
        try:
            if _lock(handle):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        except OSError as error:
            problems.append(_line(path, error))
        finally:
            os.close(handle)
    return problems


def _open(path: Path, flags: int) -> int:
    """Open it for a lock: NFS locks only files that are open for writing, and folders cannot be."""
    return os.open(path, flags | (os.O_RDWR if path.is_file() and os.access(path, os.W_OK) else os.O_RDONLY))


def _unfinished(directory: Path, of: str | None) -> list[Path]:
    with suppress(OSError):
        found = [(path, _NAME.fullmatch(path.name)) for path in directory.iterdir()]
        return [path for path, match in found if match and of in (None, match["of"])]
    return []


def _lock(handle: int) -> bool:
    """Take the lock; False where another process has it. Where there are no locks, nothing is a leftover."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _line(path: Path, error: OSError) -> str:
    return f"{path} is left over from a run that was killed and cannot be removed: {error.strerror}; remove it by hand"
