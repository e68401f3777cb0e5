"""The bytes of a tar that is indexed, on a file system or at a URL."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import open_regular
from karat_scale.foundation.stores import Store

# What is fetched at once. At 20 ms for a request and 100 MB/s, skipping an image of less than 2 MB would gain nothing.
_WINDOW = 8 << 20


@dataclass(frozen=True)
class Tar:
    """A tar to read.

    Attributes:
        name: its path or URL.
        size: in bytes.
        read: returns `size` bytes from `offset`; fewer only at the end.
        etag: what its server says of its content; empty on a file system.
    """

    name: str
    size: int
    read: Callable[[int, int], bytes]
    etag: str = ""


@contextmanager
def open_tar(place: Path | Store, name: str) -> Iterator[Tar]:
    """Open a tar in a directory or at a URL. Raises DataError."""
    if isinstance(place, Store):
        with _remote_tar(place, name) as tar:
            yield tar
        return
    path = place / name
    try:
        with os.fdopen(open_regular(path), "rb", buffering=0) as file:
            handle = file.fileno()
            yield Tar(str(path), os.fstat(handle).st_size, lambda at, size: os.pread(handle, size, at))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


@contextmanager
def _remote_tar(store: Store, name: str) -> Iterator[Tar]:
    """Open a tar at a URL. What is read of it is fetched once, in large pieces, to a file that has no name."""
    where, facts = store.where(name), store.facts(name)
    if facts.bytes < 0:
        raise DataError(f"{where}: the server does not say its size; use one that does")
    try:
        with tempfile.TemporaryFile() as file:
            handle, fetched = file.fileno(), set[int]()

            def read(at: int, size: int) -> bytes:
                for window in range(at // _WINDOW, -(-min(at + size, facts.bytes) // _WINDOW)):
                    if window not in fetched:
                        start = window * _WINDOW
                        data = store.read(name, start, min(start + _WINDOW, facts.bytes), facts.etag)
                        os.pwrite(handle, data, start)
                        fetched.add(window)
                return os.pread(handle, size, at)

            yield Tar(where, facts.bytes, read, facts.etag)
    except OSError as error:
        place = tempfile.gettempdir()
        raise DataError(f"{where}: no copy can be kept in {place}: {error.strerror}; set TMPDIR") from error
