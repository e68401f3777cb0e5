"""Files by URL, in object stores and on web servers, by fsspec: listings, ranged reads, and writes, all retried.

Credentials and endpoints come from the usual places of the library of each protocol. They are in no URL of ours, and no
message repeats what a library says, since that may hold a signed URL. A request that fails with a temporary error is
tried again, with longer and longer pauses, until a deadline. A write leaves the whole new file, or the old one.
"""

import functools
import importlib
import io
import logging
import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import quote, unquote, urlsplit

from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import DataError, causes
from karat_scale.foundation.machine import Background
from karat_scale.foundation.tables import how_to_install, load

T = TypeVar("T")
# The codes of a server's answers that may change later; all others from 400 to 499 are final.
_PASSING = (408, 425, 429)
_NO_SUCH_RANGE = 416
# Libraries' errors that no second try changes, by name, since these libraries may not be installed.
_FINAL = (
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"),
    *("NoSuchBucket", "ParamValidationError"),
)


class StoreError(DataError):
    """A file at a URL cannot be read or written; the message names it."""


class MissingFileError(StoreError):
    """There is no such file."""


class ChangedFileError(StoreError):
    """A file at a URL is no longer the one that was indexed."""


class FinalError(Exception):
    """An error that another try would not change; the message is the reason."""


_MISSING = "it is missing"
NO_SIZE = "the server does not say how large the file is; use one that does"


_NO_ANSWER = "no answer came in time"
_CREDENTIALS = "; check the credentials that the store's library finds"


def judged(error: BaseException) -> tuple[str, bool]:
    """Return what an error means, and whether it is final."""
    for cause in causes(error):
        if isinstance(cause, FinalError):
            return str(cause), True
        if isinstance(cause, TimeoutError):  # also one that S3 answers with status 400
            return _NO_ANSWER, False
        if (status := _status(cause)) is not None:
            what = {403: "access is refused", 401: "access is refused", 404: _MISSING}.get(status, "it failed")
            hint = _CREDENTIALS if status in (401, 403) else ""
            return f"{what} (HTTP {status}){hint}", status < 500 and status not in _PASSING
        if type(cause).__name__ in _FINAL or isinstance(cause, ssl.SSLCertVerificationError):
            return f"{type(cause).__name__}; check the name, the credentials, the endpoint and the certificates", True
    # fsspec makes one of any error while it asks a web server for a file's facts.
    if isinstance(error, FileNotFoundError) and not any(_is_of_connection(c) for c in causes(error) if c is not error):
        return _MISSING, True
    if isinstance(error, PermissionError):
        return f"access is refused{_CREDENTIALS}", True
    if any(isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__ for cause in causes(error)):
        return _NO_ANSWER, False
    if isinstance(error, EOFError):
        return f"the answer was cut short: {error}", False
    failed = next((cause for cause in causes(error) if isinstance(cause, OSError) and cause.strerror), None)
    # asyncio has its own words for an error of the system; one of a name's resolution is below 0.
    words = failed and (os.strerror(failed.errno) if failed.errno and failed.errno > 0 else failed.strerror)
    return f"the connection failed ({words or type(error).__name__})", False


# The server refuses to connect, or its name is unknown.
_NOWHERE = (ConnectionRefusedError, socket.gaierror)


def _is_of_connection(error: BaseException) -> bool:
    is_one = isinstance(error, OSError | TimeoutError) and not isinstance(error, FileNotFoundError)
    return is_one or type(error).__module__.partition(".")[0] == "aiohttp"


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of the answer that caused an error of any of the libraries; None without one."""
    if type(error).__module__.startswith("aiohttp.http_"):  # of aiohttp's parser: the code is its own, of a cut answer
        return None
    if isinstance(error, OSError) and error.errno is None and str(error).startswith("Forbidden"):  # of gcsfs
        return 403
    if isinstance(error, ValueError) and str(error).startswith("Bad Request"):  # of gcsfs
        return 400
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        holders = ((error, "status"), (response, "status_code"), (error, "status_code"), (error, "code"))
        found = next((getattr(holder, name) for holder, name in holders if hasattr(holder, name)), None)
    return found if isinstance(found, int) and 400 <= found < 600 else None


DEFAULT_TIMEOUT = 300.0
QUIET = 10.0
"""Seconds of failing tries after which a store tells of them."""
FIRST_CONTACT = 20.0
"""Seconds after which a command without a timeout gives up a server that it has never reached, if the server's name is
unknown or it refuses to connect: the URL is probably wrong."""
# The share of the timeout after which a store has failed, so that its error comes before that of a waiting loader.
_PATIENCE = 0.8
# The share of that time that one try may take.
_TRY = 1 / 3
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0
# What fsspec needs for each protocol.
PROTOCOLS = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp", "http": "aiohttp", "hf": "huggingface_hub"}
_WRITABLE = ("s3", "gs")


def is_url(text: object) -> bool:
    """True for a text such as s3://bucket/folder, with any protocol."""
    return isinstance(text, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def check_url(url: str) -> str:
    """Return a URL with its protocol in small letters, and without a slash at its end.

    Raises:
        ValueError: the protocol is unknown, the URL names no place, or it holds a credential. The message does not
            repeat the credential.
    """
    parts = urlsplit(url)
    if not is_url(url):
        raise ValueError(f"{url[:100]!r} is not a URL; use one that begins with s3:// or gs://")
    if parts.scheme not in PROTOCOLS:
        *others, last = [f"{name}://" for name in PROTOCOLS]
        raise ValueError(f"{parts.scheme}:// is not supported; use {', '.join(others)} or {last}")
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"{shown} has a user, a query or a fragment, which may be a credential; leave these out, and give "
            "credentials to the store's library (docs/data.md)"
        )
    if not parts.netloc:
        raise ValueError(f"{shown} names no bucket or server; write it after the //")
    return f"{parts.scheme}://{url.partition('://')[2].rstrip('/')}"


def check_writable(url: str) -> None:
    """Raise ValueError if files at a URL cannot be written."""
    scheme = urlsplit(url).scheme
    if is_url(url) and scheme not in _WRITABLE:
        use = " or ".join(f"{name}://" for name in _WRITABLE)
        raise ValueError(f"nothing can be written to {scheme}://; use {use}")


class FileFacts(NamedTuple):
    """The size of a file, and the server's tag of its content: an ETag, a hash or a time; empty if there is none."""

    bytes: int
    etag: str


def _facts_of(info: Mapping[str, Any]) -> FileFacts:
    """Return the facts of a file in one of fsspec's answers. The size is -1 if it is unknown."""
    size = info.get("size")
    return FileFacts(-1 if size is None else int(size), _tag_of(info))


def _tag_of(info: Mapping[str, Any]) -> str:
    """Return the tag that tells one content of a file from another; empty if there is none."""
    lfs = info.get("lfs")
    values = [info.get(name) for name in ("ETag", "etag", "md5Hash", "blob_id")]
    values = [lfs.get("sha256") if isinstance(lfs, Mapping) else None, *values, info.get("Last-Modified")]
    return next((str(value).strip('"') for value in values if value), "")


class Sink(Protocol):
    """A receiver of the bytes of a part of a file, piece by piece. Its own errors are DataErrors."""

    def restart(self) -> None:
        """Forget what was written: the part comes from its start, for the first time or again."""

    def write(self, data: bytes, /) -> object:
        """Take the next piece."""


class _InMemory(io.BytesIO):
    """See Sink."""

    def restart(self) -> None:
        """See Sink."""
        self.seek(0)
        self.truncate()


class _OneTry:
    """Passes the pieces of one try on to a sink until the try is over: the library may go on with it even then."""

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
        """Pass nothing on from now on."""
        with self._lock:
            self._is_over = True


_POLL_SECONDS = 0.5
_THREADS = 16
_PIECE = 16 << 20
# All file systems of this process, and of those that it was forked from. To free one would close its connections: in a
# forked process the parent's. As both share the epoll, the parent's event loop would no longer watch its sockets.
_KEPT: dict[int, Any] = {}


class Store:
    """The files below a URL. It may be used by any process and thread; each process has its own connections.

    timeout: a request, with all its tries, is given up after most of these seconds; None if no recipe sets them.
    tell: a function that is called once with a line if tries fail for `QUIET` seconds, or if there is no such server.

    Raises:
        StoreError: the URL cannot be used, the library of its protocol is not installed, or a file cannot be read.
    """

    setting = "data.timeout"
    """The recipe's key for the timeout."""

    def __init__(self, url: str, timeout: float | None = None, tell: Callable[[str], object] | None = None) -> None:
        try:
            self.url = check_url(url)
        except ValueError as error:
            raise StoreError(str(error)) from None
        self._timeout, self._patience, self._tell = timeout, _PATIENCE * (timeout or DEFAULT_TIMEOUT), tell
        self._protocol, self._is_reached = urlsplit(url).scheme, False
        self._is_web = self._protocol in ("http", "https")
        self._opened: tuple[int, Any] | None = None
        self._system()

    def where(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.url}/{name}" if name else self.url

    def deadline(self) -> float:
        """Return the time, by time.monotonic, at which a read that begins now is given up."""
        return time.monotonic() + self._patience

    def read(self, name: str, start: int, stop: int, etag: str = "", deadline: float | None = None) -> bytes:
        """Return exactly the bytes start .. stop - 1 of a file; see `copy`. Raises StoreError."""
        memory = _InMemory()
        self.copy(name, start, stop, memory, etag, deadline)
        return memory.getvalue()

    def copy(self, name: str, start: int, stop: int, sink: Sink, etag: str = "", deadline: float | None = None) -> None:
        """Write exactly the bytes start .. stop - 1 of a file to a sink.

        Args:
            etag: the file's ETag when it was indexed, if that is to be checked.
            deadline: when to give up; see `deadline`.

        Raises:
            ChangedFileError: the file has another ETag, or is too short.
            StoreError: the file cannot be read.
        """

        def ask(seconds: float) -> None:
            one_try, is_outside = _OneTry(sink), False
            try:
                self._range(name, start, stop, one_try, etag, seconds)
            except Exception as error:
                is_outside = any(_status(cause) == _NO_SUCH_RANGE for cause in causes(error))
                if not is_outside:
                    raise
            finally:
                one_try.end()
            if one_try.size == stop - start:
                return
            # Of a file that is shorter now, servers send what there is, or answer that there is nothing.
            if is_outside or 0 <= self._facts(name, seconds).bytes < stop:
                raise ChangedFileError(f"{self.where(name)} is cut short, or has changed since it was indexed")
            raise EOFError(f"{one_try.size} of {stop - start} bytes came")

        if stop > start:
            self._persist(name, ask, deadline)

    def read_small(self, name: str, most: int) -> bytes:
        """Return a whole file of at most `most` bytes. Raises StoreError."""
        facts = self.facts(name)
        if facts.bytes < 0:
            raise StoreError(f"{self.where(name)}: {NO_SIZE}")
        if facts.bytes > most:
            raise StoreError(f"{self.where(name)} has {facts.bytes} bytes; it should have at most {most}")
        return self.read(name, 0, facts.bytes)

    def pieces(self, name: str, size: int, etag: str = "") -> Iterator[bytes]:
        """Yield a whole file of `size` bytes, piece by piece; see `read`. Raises StoreError."""
        for start in range(0, size, _PIECE):
            yield self.read(name, start, min(start + _PIECE, size), etag)

    def facts(self, name: str, deadline: float | None = None) -> FileFacts:
        """Return the facts of a file. Raises StoreError."""
        return self._persist(name, functools.partial(self._facts, name), deadline)

    def facts_of(self, names: list[str]) -> dict[str, FileFacts]:
        """Return the facts of many files: by one listing if the store's listings have them. Raises StoreError."""
        if self._is_web:
            ask = functools.partial(self.facts, deadline=self.deadline())
            with ThreadPool(min(_THREADS, max(1, len(names)))) as pool:
                return dict(zip(names, pool.imap(ask, names), strict=True))
        found = self.files()
        if missing := [name for name in names if name not in found]:
            raise StoreError(f"{self.where(missing[0])} is missing")
        return {name: found[name] for name in names}

    def files(self) -> dict[str, FileFacts]:
        """Return all files below the URL, by their names relative to it. Raises StoreError.

        A web server must list its folders as pages with links. Such pages have no sizes: these are -1.
        """
        if self._is_web:
            return dict(self._linked(f"{self.url}/"))
        path = self._path("")
        listed = self._persist("", lambda seconds: self._call("find", seconds, path, detail=True))
        return {name[len(path) :].lstrip("/"): _facts_of(info) for name, info in listed.items()}

    def _linked(self, folder: str) -> Iterator[tuple[str, FileFacts]]:
        """Yield the files to which the page of a folder links, and those of the folders in it.

        fsspec's own walk leaves out a folder that it cannot read.
        """
        listed = self._persist("", lambda seconds: self._call("ls", seconds, folder, detail=True))
        for link in sorted(info["name"] for info in listed):
            if not link.startswith(folder) or link == folder or "?" in link:  # back, or the same page in another order
                continue
            if link.endswith("/"):
                yield from self._linked(link)
            else:
                yield unquote(link[len(self.url) + 1 :]), FileFacts(-1, "")

    def _facts(self, name: str, seconds: float) -> FileFacts:
        return _facts_of(self._call("info", seconds, self._path(name)))

    def _range(self, name: str, start: int, stop: int, sink: _OneTry, etag: str, seconds: float) -> None:
        """Write a part of a file to a sink. Raises ChangedFileError, and what the library raises."""
        system, path = self._system(), self._path(name)
        if self._is_web:
            from fsspec.asyn import sync

            found = sync(system.loop, _web_range, system, path, start, stop, sink, timeout=seconds)
        else:
            # Libraries that are not asynchronous open the file, and would read ahead.
            options = {} if getattr(system, "async_impl", False) else {"cache_type": "none"}
            sink.write(self._call("cat_file", seconds, path, start=start, end=stop, **options))
            found = self._facts(name, seconds).etag if etag else ""
        if etag and found != etag:
            raise ChangedFileError(f"{self.where(name)} has changed since it was indexed; run karat index again")

    def _persist(
        self,
        name: str,
        ask: Callable[[float], T],
        deadline: float | None = None,
        got_further: Callable[[], bool] = lambda: False,
    ) -> T:
        """Return the result of `ask`, which takes the seconds of one try; try again until the deadline.

        After a try that failed, but `got_further` than all before it, the time begins anew.

        Raises:
            StoreError: no try succeeded, or one met an error that is final.
        """
        begun = time.monotonic()
        deadline = self.deadline() if deadline is None else deadline
        pause, tries, jitter = _FIRST_PAUSE, 0, random.Random()  # its own, for training's must not change
        whole, reason = _TRY * self._patience, ""
        while True:
            seconds = max(0.01, min(deadline - time.monotonic(), whole))
            try:
                result = ask(seconds)
                self._is_reached = True
                return result
            except DataError:  # final, or of the sink
                raise
            except Exception as error:
                tries += 1
                found, is_final = judged(error)
                if not reason or seconds == whole or found != _NO_ANSWER:  # one that was cut short says nothing
                    reason = found
                is_nowhere = not self._is_reached and any(isinstance(cause, _NOWHERE) for cause in causes(error))
                self._is_reached = not is_nowhere
            if is_final:
                kind = MissingFileError if reason.startswith(_MISSING) else StoreError
                raise kind(f"{self.where(name)}: {reason}")
            if got_further():
                deadline = self.deadline()
            if is_nowhere and not self._timeout:  # a run waits longer: its network may be late
                deadline = min(deadline, begun + FIRST_CONTACT)
            pause = min(2 * pause, _LONGEST_PAUSE)
            wait = pause * (0.5 + jitter.random())
            if time.monotonic() + wait >= deadline:
                spent = time.monotonic() - begun
                fix = "check the URL and the store"
                if self._timeout:
                    fix += f", or raise {self.setting} (now {self._timeout:g} s) if it is only slow"
                raise StoreError(f"{self.where(name)}: {reason}, {plural(tries, 'time')} in {spent:.0f} s; {fix}")
            if self._tell is not None and (is_nowhere or time.monotonic() - begun > QUIET):
                self._tell(f"{self.where(name)}: {reason}; trying for up to {deadline - begun:.0f} s")
                self._tell = None
            time.sleep(wait)

    def _path(self, name: str) -> str:
        """Return the path of a file for fsspec, which keeps whole URLs for web servers."""
        path: str = self.where(quote(name)) if self._is_web else self._system()._strip_protocol(self.where(name))
        return path

    def _call(self, method: str, seconds: float, *args: Any, **options: Any) -> Any:
        """Call a method of the file system, and raise TimeoutError if it takes longer."""
        system = self._system()
        if getattr(system, "async_impl", False):
            from fsspec.asyn import sync

            return sync(system.loop, getattr(system, f"_{method}"), *args, timeout=seconds, **options)
        call = Background(functools.partial(getattr(system, method), *args, **options))
        if not call.wait(seconds):  # it goes on in its thread
            raise TimeoutError
        return call.result()

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
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints tracebacks of errors that are tried again
    # A cached listing would hide that a file has changed.
    return kind(use_listings_cache=False)


async def _web_range(system: Any, url: str, start: int, stop: int, sink: _OneTry) -> str:
    """Write a range of a file on a web server to a sink, piece by piece; return its ETag.

    A server that sends all of the file is refused.
    """
    session = await system.set_session()
    options = dict(system.kwargs)
    headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    async with session.get(system.encode_url(url), headers=headers, **options) as answer:
        answer.raise_for_status()
        if answer.status != 206:
            raise FinalError("the server does not answer requests for a part of a file; use one that does")
        async for piece in answer.content.iter_any():  # as it comes: parts are large, and several are under way
            sink.write(piece)
        return _tag_of(answer.headers)


# A library holds about ten parts of a file in memory at a time. An object has at most 10,000.
_PART, _MOST_PARTS = 8 << 20, 9_000


class WritableStore(Store):
    """A Store that can be written, too. An object appears when all its parts have come: a killed writer leaves none."""

    setting = "checkpoint.timeout"

    def __init__(self, url: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        try:
            check_writable(url)
        except ValueError as error:
            raise StoreError(str(error)) from None
        super().__init__(url, timeout)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file. Raises StoreError."""
        self._send(name, lambda seconds: self._call("pipe_file", seconds, self._path(name), data))

    def put(self, name: str, file: Path, on_bytes: Callable[[int], None]) -> None:
        """Write a local file. That may take any time, as long as the store keeps taking parts.

        Args:
            on_bytes: is called, in another thread, with the size of each part that the store has taken.

        Raises:
            StoreError: the store does not take it.
            OSError: there is no such file.
        """
        part = max(_PART, -(-file.stat().st_size // _MOST_PARTS // _PART) * _PART)
        taken: list[int] = []  # by each try

        def ask(seconds: float) -> None:
            taken.append(0)
            self._put(file, name, part, count, seconds)

        def count(size: int) -> None:
            taken[-1] += size
            on_bytes(size)

        try:
            self._send(name, ask, lambda: taken[-1] > max(taken[:-1], default=0))
        except StoreError:
            file.stat()  # if it has gone, that is the reason
            raise

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, one after another. Raises StoreError."""
        for name in names:
            self._persist(name, functools.partial(self._remove, name))

    def _send(self, name: str, ask: Callable[[float], object], got_further: Callable[[], bool] = lambda: False) -> None:
        try:
            self._persist(name, ask, got_further=got_further)
        except MissingFileError:
            raise StoreError(f"{self.where(name)} cannot be written: there is no such bucket") from None

    def _put(self, file: Path, name: str, part: int, on_bytes: Callable[[int], None], seconds: float) -> None:
        """Write a local file in parts of `part` bytes. Raises TimeoutError if none is taken for `seconds`."""
        import asyncio
        import concurrent.futures

        from fsspec.callbacks import Callback

        taken, taken_at = 0, time.monotonic()

        def hear(size: int, value: int, **_: Any) -> None:
            nonlocal taken, taken_at
            if value > taken:
                on_bytes(value - taken)
                taken, taken_at = value, time.monotonic()

        system = self._system()
        put = system._put_file(str(file), self._path(name), callback=Callback(hooks={"": hear}), chunksize=part)
        task = asyncio.run_coroutine_threadsafe(put, system.loop)
        while not concurrent.futures.wait([task], _POLL_SECONDS).done:
            if time.monotonic() - taken_at > seconds:
                task.cancel()
                raise TimeoutError
        task.result()

    def _remove(self, name: str, seconds: float) -> None:
        with suppress(FileNotFoundError):
            self._call("rm_file", seconds, self._path(name))
