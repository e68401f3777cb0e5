"""The files below a URL: listings, sizes, ranged reads, and writes.

A file that is written is whole, or as it was before.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.parse import unquote

from karat_scale.foundation.stores.connection import (
    Connection,
    FileFacts,
    InMemory,
    OneTry,
    Sink,
    check_url,
    check_writable,
    facts_of,
)
from karat_scale.foundation.stores.failures import (
    DEFAULT_TIMEOUT,
    ChangedFileError,
    MissingFileError,
    Retries,
    StoreError,
)

_THREADS = 16
_PIECE = 16 << 20


class Store:
    """The files below a URL. It may be used by any process and thread; each process has its own connections.

    timeout: a file that cannot be read for most of these seconds is given up. `setting` is the recipe's key for it.

    Raises:
        StoreError: the URL cannot be used, or a file cannot be read.
    """

    def __init__(self, url: str, timeout: float = DEFAULT_TIMEOUT, setting: str = "data.timeout") -> None:
        try:
            self.url = check_url(url)
        except ValueError as error:
            raise StoreError(str(error)) from None
        self._connection, self._retries = Connection(self.url), Retries(timeout, setting)

    def where(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.url}/{name}" if name else self.url

    def deadline(self) -> float:
        """Return the time, of time.monotonic, at which a read that begins now is given up."""
        return self._retries.deadline()

    def read(self, name: str, start: int, stop: int, etag: str = "", deadline: float | None = None) -> bytes:
        """Return exactly the bytes start .. stop - 1 of a file; see `copy`. Raises StoreError."""
        memory = InMemory()
        self.copy(name, start, stop, memory, etag, deadline)
        return b"".join(memory.pieces)

    def copy(self, name: str, start: int, stop: int, sink: Sink, etag: str = "", deadline: float | None = None) -> None:
        """Write exactly the bytes start .. stop - 1 of a file to a sink.

        Args:
            etag: what the file had when it was indexed, if that is to be checked.
            deadline: when to give up; see `deadline`.

        Raises:
            ChangedFileError: it has another ETag.
            StoreError: it cannot be read.
        """

        def ask(seconds: float) -> None:
            one_try = OneTry(sink)
            try:
                self._range(name, start, stop, one_try, etag, seconds)
            finally:
                one_try.end()
            if one_try.size == stop - start:
                return
            # Of a file that is shorter now, servers send what there is.
            if 0 <= self._facts(name, seconds).bytes < stop:
                raise ChangedFileError(f"{self.where(name)} is cut short, or has changed since it was indexed")
            raise EOFError(f"{one_try.size} of {stop - start} bytes came")

        if stop > start:
            self._retries.persist(self.where(name), ask, deadline)

    def read_small(self, name: str, most: int, deadline: float | None = None) -> bytes:
        """Return a whole file of at most `most` bytes. Raises StoreError."""
        facts = self.facts(name, deadline)
        if facts.bytes > most:
            raise StoreError(f"{self.where(name)} has {facts.bytes} bytes; it should have at most {most}")
        return self.read(name, 0, facts.bytes, deadline=deadline)

    def pieces(self, name: str, size: int, etag: str = "") -> Iterator[bytes]:
        """Yield a whole file of `size` bytes, piece by piece; see `read`. Raises StoreError."""
        for start in range(0, size, _PIECE):
            yield self.read(name, start, min(start + _PIECE, size), etag)

    def facts(self, name: str, deadline: float | None = None) -> FileFacts:
        """Return the facts of a file. Raises StoreError."""
        return self._retries.persist(self.where(name), functools.partial(self._facts, name), deadline)

    def facts_of(self, names: list[str]) -> dict[str, FileFacts]:
        """Return the facts of many files: by one listing if the store's listings have them. Raises StoreError."""
        if self._connection.is_web:
            ask = functools.partial(self.facts, deadline=self.deadline())
            with ThreadPool(min(_THREADS, max(1, len(names)))) as pool:
                return dict(zip(names, pool.imap(ask, names), strict=True))
        found = self.files()
        missing = next((name for name in names if name not in found), None)
        if missing is not None:
            raise StoreError(f"{self.where(missing)} is missing")
        return {name: found[name] for name in names}

    def files(self) -> dict[str, FileFacts]:
        """Return all files below the URL, by their names relative to it. Raises StoreError.

        A web server must list its folders as pages with links. Such pages have no sizes: these are -1.
        """
        if self._connection.is_web:
            return dict(self._linked(f"{self.url}/"))
        path = self._connection.path("")
        ask = functools.partial(self._connection.call, "find")
        listed = self._retries.persist(self.url, lambda seconds: ask(seconds, path, detail=True))
        return {name[len(path) :].lstrip("/"): facts_of(info) for name, info in listed.items()}

    def _linked(self, folder: str) -> Iterator[tuple[str, FileFacts]]:
        """Yield the files to which the page of a folder links, and those of the folders in it.

        fsspec's own walk leaves out a folder that it cannot read.
        """
        ask = functools.partial(self._connection.call, "ls")
        listed = self._retries.persist(self.url, lambda seconds: ask(seconds, folder, detail=True))
        for link in sorted(info["name"] for info in listed):
            if not link.startswith(folder) or link == folder or "?" in link:  # back, or the same page in another order
                continue
            if link.endswith("/"):
                yield from self._linked(link)
            else:
                yield unquote(link[len(self.url) + 1 :]), FileFacts(-1, "")

    def _facts(self, name: str, seconds: float) -> FileFacts:
        return facts_of(self._connection.call("info", seconds, self._connection.path(name)))

    def _range(self, name: str, start: int, stop: int, sink: OneTry, etag: str, seconds: float) -> None:
        """Write a part of a file to a sink. Raises ChangedFileError, and what the library raises."""
        if self._connection.is_web:
            found = self._connection.web_range(name, start, stop, sink, seconds)
        else:
            sink.write(self._connection.object_range(name, start, stop, seconds))
            found = self._facts(name, seconds).etag if etag else ""
        if etag and found != etag:
            raise ChangedFileError(f"{self.where(name)} has changed since it was indexed; run karat index again")


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
