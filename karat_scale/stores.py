"""Files by URL, in object stores and on web servers: listings, sizes, and ranged reads that are retried. By fsspec.

Credentials and endpoints come from the usual places of the library of each protocol. They are in no URL of ours, and no
message repeats what a library says, since that may hold a signed URL.
"""

import functools
import importlib
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlsplit

from karat_scale.errors import DataError
from karat_scale.tables import how_to_install, load

# What fsspec needs for each protocol.
PROTOCOLS = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp", "http": "aiohttp", "hf": "huggingface_hub"}
DEFAULT_TIMEOUT = 300.0
# The share of data.timeout after which a store has failed, so that its error comes before that of a waiting loader.
PATIENCE = 0.8
# The share of that time that one try may take.
_TRY = 1 / 3
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0
# Answers of a server that may be other ones later; all others from 400 to 499 are final.
_PASSING = (408, 425, 429)
# Libraries' errors that no second try changes, by name, since these libraries may not be installed.
_FINAL = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError", "NoSuchBucket")
_THREADS = 16
_PIECE = 16 << 20
T = TypeVar("T")


class StoreError(DataError):
    """A file at a URL cannot be read; the message names it."""


class ChangedFileError(StoreError):
    """A file at a URL is no longer the one that was indexed."""


class FileFacts(NamedTuple):
    """The size of a file, and what its server says of its content: an ETag, a hash or a time; empty if nothing."""

    bytes: int
    etag: str


class _FinalError(Exception):
    """The reason of an error that another try would not change."""


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


class Store:
    """The files below a URL. It may be used by any process and thread; each process has its own connections.

    timeout: data.timeout. A file that cannot be read for most of that time is given up.

    Raises:
        StoreError: the URL cannot be used, or a file cannot be read.
    """

    def __init__(self, url: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        try:
            self.url = check_url(url)
        except ValueError as error:
            raise StoreError(str(error)) from None
        self._protocol = urlsplit(self.url).scheme
        self._is_web = self._protocol in ("http", "https")
        self._timeout, self.patience = timeout, PATIENCE * timeout
        self._opened: tuple[int, Any] | None = None
        self._system()

    def where(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.url}/{name}" if name else self.url

    def deadline(self) -> float:
        """Return the time, of time.monotonic, at which a read that begins now is given up."""
        return time.monotonic() + self.patience

    def read(self, name: str, start: int, stop: int, etag: str = "", deadline: float | None = None) -> bytes:
        """Return exactly the bytes start .. stop - 1 of a file.

        Args:
            etag: what the file had when it was indexed, if that is to be checked.
            deadline: when to give up; see `deadline`.

        Raises:
            ChangedFileError: it has another ETag.
            StoreError: it cannot be read.
        """

        def ask(seconds: float) -> bytes:
            data = self._range(name, start, stop, etag, seconds)
            if len(data) == stop - start:
                return data
            # Of a file that is shorter now, servers send what there is.
            if 0 <= _facts(self._call("info", seconds, self._path(name))).bytes < stop:
                raise ChangedFileError(f"{self.where(name)} is cut short, or has changed since it was indexed")
            raise EOFError(f"{len(data)} of {stop - start} bytes came")

        return self._persist(name, ask, deadline) if stop > start else b""

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
        return self._persist(name, lambda seconds: _facts(self._call("info", seconds, self._path(name))), deadline)

    def facts_of(self, names: list[str]) -> dict[str, FileFacts]:
        """Return the facts of many files: by one listing if the store's listings have them. Raises StoreError."""
        if self._is_web:
            with ThreadPool(min(_THREADS, max(1, len(names)))) as pool:
                return dict(zip(names, pool.map(self.facts, names), strict=True))
        found = self.files()
        missing = next((name for name in names if name not in found), None)
        if missing is not None:
            raise StoreError(f"{self.where(missing)} is missing")
        return {name: found[name] for name in names}

    def files(self) -> dict[str, FileFacts]:
        """Return all files below the URL, by their names relative to it. Raises StoreError.

        A web server must list its folders as pages with links. Such pages have no sizes: these are -1.
        """
        if self._is_web:
            return dict(self._linked(f"{self.url}/"))
        path = self._path("")
        listed = self._persist("", lambda seconds: self._call("find", seconds, path, detail=True), None)
        return {name[len(path) :].lstrip("/"): _facts(info) for name, info in listed.items()}

    def _linked(self, folder: str) -> Iterator[tuple[str, FileFacts]]:
        """Yield the files to which the page of a folder links, and those of the folders in it.

        fsspec's own walk leaves out a folder that it cannot read.
        """
        listed = self._persist("", lambda seconds: self._call("ls", seconds, folder, detail=True), None)
        for link in sorted(info["name"] for info in listed):
            if not link.startswith(folder) or link == folder or "?" in link:  # back, or the same page in another order
                continue
            if link.endswith("/"):
                yield from self._linked(link)
            else:
                yield unquote(link[len(self.url) + 1 :]), FileFacts(-1, "")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _path(self, name: str) -> str:
        """Return the path of a file for fsspec, which keeps whole URLs for web servers."""
        if self._is_web:
            return f"{self.url}/{quote(name)}" if name else self.url
        path: str = self._system()._strip_protocol(self.where(name))
        return path

    def _system(self) -> Any:
        """Return this process's fsspec file system. Connections of a parent process cannot be used after a fork."""
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            opened = self._opened = os.getpid(), _file_system(self._protocol)
        return opened[1]

    def _call(self, method: str, seconds: float, *args: Any, **options: Any) -> Any:
        """Call a method of the file system, and raise TimeoutError if it takes longer."""
        system = self._system()
        if getattr(system, "async_impl", False):
            from fsspec.asyn import sync

            return sync(system.loop, getattr(system, f"_{method}"), *args, timeout=seconds, **options)
        return _in_time(functools.partial(getattr(system, method), *args, **options), seconds)

    def _range(self, name: str, start: int, stop: int, etag: str, seconds: float) -> bytes:
        path, system = self._path(name), self._system()
        if self._is_web:
            from fsspec.asyn import sync

            data, found = sync(system.loop, _web_range, system, path, start, stop, timeout=seconds)
        else:
            # Others open the file, and would read ahead.
            options = {} if getattr(system, "async_impl", False) else {"cache_type": "none"}
            data = self._call("cat_file", seconds, path, start=start, end=stop, **options)
            found = _facts(self._call("info", seconds, path)).etag if etag else ""
        if etag and found != etag:
            raise ChangedFileError(f"{self.where(name)} has changed since it was indexed; run karat index again")
        return bytes(data)

    def _persist(self, name: str, ask: Callable[[float], T], deadline: float | None) -> T:
        """Return what `ask`, given the seconds of one try, returns; tries again until the deadline."""
        begun = time.monotonic()
        deadline = begun + self.patience if deadline is None else deadline
        pause, tries, jitter = _FIRST_PAUSE, 0, random.Random()  # its own, for training's must not change
        while True:
            left = deadline - time.monotonic()
            try:
                return ask(max(0.01, min(left, _TRY * self.patience)))
            except StoreError:
                raise
            except Exception as error:
                tries += 1
                reason = self._reason(name, error)
            pause = min(2 * pause, _LONGEST_PAUSE)
            wait = pause * (0.5 + jitter.random())
            if time.monotonic() + wait >= deadline:
                spent = time.monotonic() - begun
                raise StoreError(
                    f"{self.where(name)}: {reason}, {tries} times in {spent:.0f} s; check the store, or raise "
                    f"data.timeout (now {self._timeout:g} s) if it is only slow"
                ) from None
            time.sleep(wait)

    def _reason(self, name: str, error: Exception) -> str:
        """Return what went wrong, in a few words. Raises StoreError where another try would not help."""
        reason, is_final = _judged(error)
        if is_final:
            raise StoreError(f"{self.where(name)}: {reason}") from None
        return reason


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


async def _web_range(system: Any, url: str, start: int, stop: int) -> tuple[bytes, str]:
    """Return a range of a file on a web server, and its ETag. A server that sends all of the file is refused."""
    session = await system.set_session()
    options = dict(system.kwargs)
    headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    async with session.get(system.encode_url(url), headers=headers, **options) as answer:
        answer.raise_for_status()
        if answer.status != 206:
            raise _FinalError("the server does not answer requests for a part of a file; use one that does")
        return await answer.read(), _tag(answer.headers)


def _facts(info: Mapping[str, Any]) -> FileFacts:
    size = info.get("size")
    return FileFacts(-1 if size is None else int(size), _tag(info))


def _tag(facts: Mapping[str, Any]) -> str:
    """Return what tells one content of a file from another."""
    lfs = facts.get("lfs")
    values = [facts.get(name) for name in ("ETag", "etag", "md5Hash", "blob_id")]
    values = [lfs.get("sha256") if isinstance(lfs, Mapping) else None, *values, facts.get("Last-Modified")]
    return next((str(value).strip('"') for value in values if value), "")


def _judged(error: BaseException) -> tuple[str, bool]:
    """Return what an error means, and whether it is final."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, _FinalError):
            return str(cause), True
        if (status := _status(cause)) is not None:
            what = {403: "access is refused", 401: "access is refused", 404: "it is missing"}.get(status, "it failed")
            hint = "; check the credentials that the store's library finds" if status in (401, 403) else ""
            return f"{what} (HTTP {status}){hint}", status < 500 and status not in _PASSING
        if type(cause).__name__ in _FINAL or isinstance(cause, ssl.SSLCertVerificationError):
            return f"{type(cause).__name__}; check the credentials, the endpoint and the certificates", True
    if isinstance(error, FileNotFoundError):
        return "it is missing", True
    if isinstance(error, PermissionError):
        return "access is refused; check the credentials that the store's library finds", True
    if any(isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__ for cause in causes):
        return "no answer came in time", False
    if isinstance(error, EOFError):
        return f"the answer was cut short: {error}", False
    words = next((cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror), "")
    return f"the connection failed ({words or type(error).__name__})", False


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        yield cause
        cause = cause.__cause__ or cause.__context__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status in the answer that an error of any of the libraries tells of."""
    if type(error).__module__.startswith("aiohttp.http_"):  # of aiohttp's parser: the code is its own, of a cut answer
        return None
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        holders = ((error, "status"), (response, "status_code"), (error, "status_code"), (error, "code"))
        found = next((getattr(holder, name) for holder, name in holders if hasattr(holder, name)), None)
    return found if isinstance(found, int) and 400 <= found < 600 else None


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
