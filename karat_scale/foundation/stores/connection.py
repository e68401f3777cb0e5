"""The connection to a URL: fsspec's file system, in each process its own, with a time limit on its calls.

Also here: which URLs can be used, what a store says of a file, and what takes the bytes of a part of a file while they
come.
"""

import functools
import importlib
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import quote, urlsplit

from karat_scale.foundation.stores.failures import FinalError, StoreError
from karat_scale.foundation.tables import how_to_install, load

# What fsspec needs for each protocol.
PROTOCOLS = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp", "http": "aiohttp", "hf": "huggingface_hub"}
_WRITABLE = ("s3", "gs")


def is_url(text: object) -> bool:
    """True for a text such as s3://bucket/folder, with any protocol."""
    return isinstance(text, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def check_url(url: str) -> str:
    """Return a URL without a slash at its end.

    Raises:
        ValueError: the protocol is unknown, there is no place in it, or it holds a credential. The message does not
            repeat that.
    """
    parts = urlsplit(url)
    if parts.scheme not in PROTOCOLS:
        raise ValueError(f"{parts.scheme}:// is not supported; use {', '.join(f'{name}://' for name in PROTOCOLS)}")
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"{shown} has a user, a query or a fragment, which may be a credential; leave these out, and give "
            "credentials to the store's library (docs/data.md)"
        )
    if not parts.netloc:
        raise ValueError(f"{shown} names no bucket or server")
    return url.rstrip("/")


def check_writable(url: str) -> None:
    """Raise ValueError if files at a URL cannot be written."""
    if urlsplit(url).scheme not in _WRITABLE:
        raise ValueError(f"{url} cannot be written; use {' or '.join(f'{name}://' for name in _WRITABLE)}")


class FileFacts(NamedTuple):
    """The size of a file, and what its server says of its content: an ETag, a hash or a time; empty if nothing."""

    bytes: int
    etag: str


def facts_of(info: Mapping[str, Any]) -> FileFacts:
    """Return what one of fsspec's answers says of a file. The size is -1 where it is not said."""
    size = info.get("size")
    return FileFacts(-1 if size is None else int(size), tag_of(info))


def tag_of(info: Mapping[str, Any]) -> str:
    """Return what tells one content of a file from another."""
    lfs = info.get("lfs")
    values = [info.get(name) for name in ("ETag", "etag", "md5Hash", "blob_id")]
    values = [lfs.get("sha256") if isinstance(lfs, Mapping) else None, *values, info.get("Last-Modified")]
    return next((str(value).strip('"') for value in values if value), "")


class Sink(Protocol):
    """What takes the bytes of a part of a file, piece by piece. Its own errors are DataErrors."""

    def restart(self) -> None:
        """Forget what was written: the part comes from its start, for the first time or again."""

    def write(self, data: bytes) -> object:
        """Take the next piece."""


class InMemory:
    """See Sink."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def restart(self) -> None:
        """See Sink."""
        self.pieces.clear()

    def write(self, data: bytes) -> None:
        """See Sink."""
        self.pieces.append(data)


class OneTry:
    """Passes the pieces of one try on to a sink, until it is over: the library may go on with one that was given up."""

    def __init__(self, sink: Sink) -> None:
        self._sink, self._lock, self._is_over = sink, threading.Lock(), False
        self.size = 0
        sink.restart()

    def write(self, data: bytes) -> None:
        """Pass on a piece."""
        with self._lock:
            if self._is_over:
                raise FinalError("this try was given up")
            self._sink.write(data)
            self.size += len(data)

    def end(self) -> None:
        """Pass nothing on from here."""
        with self._lock:
            self._is_over = True


_POLL_SECONDS = 0.5
# All file systems of this process, and of those that it was forked from. What frees one closes its connections: in a
# forked process those of the parent, whose sockets its event loop would then no longer watch, as both share the epoll.
_KEPT: dict[int, Any] = {}
T = TypeVar("T")


class _Progress:
    """Hears how many bytes of a file were taken; remembers when the last of them were."""

    def __init__(self, on_bytes: Callable[[int], None]) -> None:
        self._on_bytes, self._taken, self.at = on_bytes, 0, time.monotonic()

    def __call__(self, size: int, value: int, **_: Any) -> None:
        if value > self._taken:
            self._on_bytes(value - self._taken)
            self._taken, self.at = value, time.monotonic()


class Connection:
    """What a store asks of fsspec. It may be used by any process and thread.

    Raises:
        StoreError: the library of the protocol is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._protocol = urlsplit(url).scheme
        self.is_web = self._protocol in ("http", "https")
        self._opened: tuple[int, Any] | None = None
        self._system()

    def path(self, name: str) -> str:
        """Return the path of a file for fsspec, which keeps whole URLs for web servers."""
        if self.is_web:
            return f"{self.url}/{quote(name)}" if name else self.url
        path: str = self._system()._strip_protocol(f"{self.url}/{name}" if name else self.url)
        return path

    def call(self, method: str, seconds: float, *args: Any, **options: Any) -> Any:
        """Call a method of the file system, and raise TimeoutError if it takes longer."""
        system = self._system()
        if getattr(system, "async_impl", False):
            from fsspec.asyn import sync

            return sync(system.loop, getattr(system, f"_{method}"), *args, timeout=seconds, **options)
        return _in_time(functools.partial(getattr(system, method), *args, **options), seconds)

    def web_range(self, name: str, start: int, stop: int, sink: OneTry, seconds: float) -> str:
        """Write a range of a file on a web server to a sink, piece by piece; return its ETag."""
        from fsspec.asyn import sync

        system = self._system()
        tag: str = sync(system.loop, _web_range, system, self.path(name), start, stop, sink, timeout=seconds)
        return tag

    def object_range(self, name: str, start: int, stop: int, seconds: float) -> bytes:
        """Return a range of a file in an object store."""
        # Libraries that are not asynchronous open the file, and would read ahead.
        options = {} if getattr(self._system(), "async_impl", False) else {"cache_type": "none"}
        data: bytes = self.call("cat_file", seconds, self.path(name), start=start, end=stop, **options)
        return data

    def put_file(self, file: Path, name: str, part: int, on_bytes: Callable[[int], None], seconds: float) -> None:
        """Write a local file in parts of `part` bytes. Raises TimeoutError if for so many seconds none is taken."""
        import asyncio
        import concurrent.futures

        from fsspec.callbacks import Callback

        progress, system = _Progress(on_bytes), self._system()
        put = system._put_file(str(file), self.path(name), callback=Callback(hooks={"": progress}), chunksize=part)
        task = asyncio.run_coroutine_threadsafe(put, system.loop)
        while not concurrent.futures.wait([task], _POLL_SECONDS).done:
            if time.monotonic() - progress.at > seconds:
                task.cancel()
                raise TimeoutError
        task.result()

    def _system(self) -> Any:
        """Return this process's file system. Connections of a parent process cannot be used after a fork."""
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            opened = self._opened = os.getpid(), _file_system(self._protocol)
            _KEPT[id(opened[1])] = opened[1]
        return opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


def _file_system(protocol: str) -> Any:
    try:
        importlib.import_module(PROTOCOLS[protocol])
        import fsspec

        # gcsfs's other class uses gRPC, whose threads do not survive the fork of data workers.
        kind = load("gcsfs.core:GCSFileSystem") if protocol == "gs" else fsspec.get_filesystem_class(protocol)
    except ImportError:
        needed = PROTOCOLS[protocol]
        raise StoreError(f"{protocol}:// needs {needed}, which is not installed; {how_to_install('remote')}") from None
    # A cached listing would hide that a file has changed.
    return kind(use_listings_cache=False)


async def _web_range(system: Any, url: str, start: int, stop: int, sink: OneTry) -> str:
    """See Connection.web_range. A server that sends all of the file is refused."""
    session = await system.set_session()
    options = dict(system.kwargs)
    headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    async with session.get(system.encode_url(url), headers=headers, **options) as answer:
        answer.raise_for_status()
        if answer.status != 206:
            raise FinalError("the server does not answer requests for a part of a file; use one that does")
        async for piece in answer.content.iter_any():  # as it comes: parts are large, and several are under way
            sink.write(piece)
        return tag_of(answer.headers)


def _in_time(call: Callable[[], T], seconds: float) -> T:
    """Return what a call returns that knows no time limit. Raises TimeoutError; the call may then go on in a thread."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="karat-store", daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not result:
        raise TimeoutError
    return result[0]
