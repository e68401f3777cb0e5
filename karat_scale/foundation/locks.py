"""Locks on files. The lock of a process that ends, however it ends, is released. Some file systems have no locks."""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EINVAL
from pathlib import Path
from typing import IO, Any


def lock(file: int | IO[Any], shared: bool = False, wait: bool = True, without: bool | None = True) -> bool:
    """Lock an open file; False where another process has it locked and this one does not wait.

    Args:
        shared: others may hold such a lock too.
        without: the answer where the file system has no locks; None to raise its OSError.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        if without is None:
            raise
        return without
    return True


def unlock(file: int | IO[Any]) -> None:
    """Release a lock at once: closing the file would leave it to processes that were forked meanwhile."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[int | None]:
    """Hold a lock file, which is made if need be, inside the block. Yields its descriptor.

    None where another process holds it and this one does not wait. Raises OSError if it is a link or no regular file.
    """
    # Neither follows a link nor waits for the reader of a pipe, and truncates nothing.
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(EINVAL, "not a regular file; remove it", str(path))
        yield handle if lock(handle, wait=wait) else None
    finally:
        os.close(handle)
