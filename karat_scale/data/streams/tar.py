"""The samples of one shard, as the webdataset library opens, reads and groups them.

The library ends without a word at a damaged header, at a missing end, and where another tar follows. So the bytes are
watched on their way to it. A shard is whole, or an error.
"""

import contextlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from webdataset.gopen import Pipe, gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from karat_scale.console import plural
from karat_scale.errors import DataError

# How a tar ends, at least.
_END = bytes(1024)
_PIECE = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "zcat", b"BZh": "bzcat", b"\xfd7zXZ": "xzcat", b"\x28\xb5\x2f\xfd": "zstdcat"}
# A command whose output has ended is about to end, too.
_PATIENCE = 5.0
DOUBLED = "__doubled__"


def read_tar(url: str, name: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard as the library makes them, in the shard's order.

    A sample in which a suffix occurs twice has DOUBLED, and the first of the two.

    Args:
        url: what to open.
        name: what messages call it.

    Raises:
        DataError: the shard cannot be opened, is damaged or ends early, or its command fails.
    """
    read = 0
    try:
        with _opened(url) as stream:
            watched = _Watched(stream)
            for read, sample in enumerate(_samples(watched), start=1):  # noqa: B007
                yield sample
            watched.check_end()
    except _ShardError as error:
        raise DataError(_described(name, read, error.reason)) from None


def _described(name: str, read: int, reason: str) -> str:
    after = f" after {plural(read, 'sample')}" if read else ""
    return f"data.stream: {name} {reason}{after}; put it right, or take it out of data.stream"


def _samples(watched: "_Watched") -> Iterator[dict[str, Any]]:
    doubled = False

    def note(error: Exception) -> bool:
        nonlocal doubled
        if not isinstance(error, ValueError):
            raise error
        doubled = True
        return True  # go on

    try:
        for sample in group_by_keys(tar_file_expander([{"url": "", "stream": watched}]), handler=note):
            yield {**sample, DOUBLED: True} if doubled else sample
            doubled = False
    except _ShardError:
        raise
    except Exception as error:  # of tarfile, or of a header's text
        reason = str(error.args[0]).partition(" @ ")[0] if error.args else type(error).__name__
        raise watched.explained(f"is damaged or ends early ({reason})" if watched.count else "is empty") from error


class _ShardError(Exception):
    """What is wrong with a shard, in words that follow its name. The library adds to the arguments of exceptions."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Watched:
    """The bytes of a shard on their way to the library. Remembers how many there were, and the last ones."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._tail = b""
        self._has_ended = False
        self.count = 0

    def read(self, size: int) -> bytes:
        """Return the next bytes; none at the end."""
        try:
            data: bytes = self._stream.read(size)
        except OSError as error:  # its text may have the value of a variable
            raise self.explained(f"cannot be read ({error.strerror or type(error).__name__})") from error
        if not self.count:
            for magic, program in _COMPRESSED.items():
                if data.startswith(magic):
                    raise _ShardError(f"is compressed, and tars are read as they are (use pipe: and {program})")
        self.count += len(data)
        self._has_ended = not data
        self._tail = (self._tail + data)[-len(_END) :]
        return data

    def check_end(self) -> None:
        """Read what the library left. Raises _ShardError if that is not the end of a tar, or the command failed."""
        while rest := self.read(_PIECE):
            if rest.strip(b"\0"):
                raise _ShardError("has a damaged header, or another tar that follows it,")
        if self._tail != _END:
            raise self.explained("ends early")
        if failed := _failure(self._stream, None):
            raise _ShardError(failed)

    def explained(self, reason: str) -> _ShardError:
        """Return the reason, or that the command failed, if that is why."""
        return _ShardError(_failure(self._stream, _PATIENCE if self._has_ended else 0.0) or reason)


def _failure(stream: Any, patience: float | None) -> str:
    """Return how the command of a shard failed, once it has ended; empty if it did not, or there is none."""
    if not isinstance(stream, Pipe):
        return ""
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = stream.proc.wait(patience)
        if code < 0 and -code not in _ENDED_BY_US:
            return f"was ended by signal {-code}"
        if code > 0 and code not in stream.ignore_status:
            return f"ended with exit code {code}"
    return ""


# SIGPIPE: nobody reads on.
_ENDED_BY_US = (13,)


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    try:
        stream = gopen(url)
    except OSError as error:
        program = f": {error.filename}" if error.filename and str(error.filename) != url else ""
        raise _ShardError(f"cannot be opened ({error.strerror or type(error).__name__}{program})") from error
    except Exception as error:  # of a library that finds the file
        raise _ShardError(f"cannot be opened ({type(error).__name__})") from error
    try:
        yield stream
    finally:
        if isinstance(stream, Pipe):
            _end(stream.proc)
        with contextlib.suppress(OSError):
            stream.close()


def _end(command: "subprocess.Popen[bytes]") -> None:
    """End a command that is not read to its end, with all that it has started."""
    if command.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            shell = psutil.Process(command.pid)  # first, or it would say that the others were killed
            for process in (shell, *shell.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        command.wait()
