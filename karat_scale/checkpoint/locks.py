"""Locks on a checkpoint, by its manifest: nobody removes what another reads. Some file systems have no locks."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from karat_scale.checkpoint.manifest import MANIFEST
from karat_scale.files import open_regular


def hold(checkpoint: Path) -> BinaryIO | None:
    """Keep a checkpoint from being removed as long as the returned file is open; None if it is not there."""
    try:
        handle = os.fdopen(open_regular(checkpoint / MANIFEST), "rb")
    except OSError:
        return None
    _lock(handle, fcntl.LOCK_SH)
    if not (checkpoint / MANIFEST).exists():
        handle.close()
        return None
    return handle


@contextmanager
def holding(checkpoint: Path) -> Iterator[bool]:
    """Keep a checkpoint from being removed inside the block; whether it is there."""
    handle = hold(checkpoint)
    if handle is None:
        yield False
        return
    with handle:
        try:
            yield True
        finally:
            _lock(handle, fcntl.LOCK_UN)  # closing would leave it to processes that were forked meanwhile


@contextmanager
def alone(checkpoint: Path) -> Iterator[None]:
    """Let nobody begin to read a checkpoint inside the block. Raises BlockingIOError if somebody reads it."""
    with ExitStack() as stack:
        with suppress(FileNotFoundError):  # a damaged one has no manifest
            path = checkpoint / MANIFEST
            # NFS gives such a lock only on what is open for writing.
            descriptor = open_regular(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
            handle = stack.enter_context(os.fdopen(descriptor, "rb"))
            _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _lock(handle: BinaryIO, kind: int) -> None:
    """Lock a file, where its file system has locks. Raises BlockingIOError if it is locked and `kind` does not wait."""
    try:
        fcntl.flock(handle, kind)
    except BlockingIOError:
        raise
    except OSError:
        pass
