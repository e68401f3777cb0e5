"""Files at a URL that are written: each one is whole, or as it was before."""

import functools
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from karat_scale.stores.failures import MissingFileError, StoreError
from karat_scale.stores.retries import DEFAULT_TIMEOUT
from karat_scale.stores.store import Store
from karat_scale.stores.urls import check_writable

# A library holds about ten parts of a file in memory at a time. An object has at most 10,000.
_PART, _MOST_PARTS = 8 << 20, 9_000


class WritableStore(Store):
    """A Store that is written, too. An object appears when all its parts have come: a killed writer leaves none."""

    def __init__(self, url: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        super().__init__(url, timeout, "checkpoint.timeout")
        try:
            check_writable(self.url)
        except ValueError as error:
            raise StoreError(str(error)) from None

    def write(self, name: str, data: bytes) -> None:
        """Write a small file. Raises StoreError."""
        path = self._connection.path(name)
        self._send(name, lambda seconds: self._connection.call("pipe_file", seconds, path, data))

    def put(self, name: str, file: Path, on_bytes: Callable[[int], None]) -> None:
        """Write a local file. That may take long, as long as the store takes parts of it.

        Args:
            on_bytes: is called with the size of each part that the store has taken, by another thread.

        Raises:
            StoreError: the store does not take it.
            OSError: there is no such file.
        """
        part = max(_PART, -(-file.stat().st_size // _MOST_PARTS // _PART) * _PART)
        self._send(name, functools.partial(self._connection.put_file, file, name, part, on_bytes))

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, one after another. Raises StoreError."""
        for name in names:
            self._retries.persist(self.where(name), functools.partial(self._remove, self._connection.path(name)))

    def _send(self, name: str, ask: Callable[[float], object]) -> None:
        try:
            self._retries.persist(self.where(name), ask)
        except MissingFileError:
            raise StoreError(f"{self.where(name)} cannot be written: there is no such bucket") from None

    def _remove(self, path: str, seconds: float) -> None:
        with suppress(FileNotFoundError):
            self._connection.call("rm_file", seconds, path)
