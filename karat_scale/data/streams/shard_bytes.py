"""The bytes of a shard, as the webdataset library opens it, watched on their way to its reader.

The reader ends without a word at a damaged header, at a missing end, and where another tar follows. So what it leaves
is looked at. A shard is whole, or an error.
"""

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from webdataset.gopen import Pipe, gopen

# How a tar ends, at least.
_END = bytes(1024)
_BLOCK = 512
# The reader asks for 10 kB at a time, and drops what it has left. Near the end it gets single blocks, so that it drops
# none.
_HELD_BACK = 20 << 10
_PIECE = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "zcat", b"BZh": "bzcat", b"\xfd7zXZ": "xzcat", b"\x28\xb5\x2f\xfd": "zstdcat"}
# A command whose output has ended is about to end, too.
_PATIENCE = 5.0


class ShardError(Exception):
    """What is wrong with a shard, in words that follow its name. The library adds to the arguments of exceptions."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ShardBytes:
    """The bytes of a shard, for the library to read. is_empty: there are none."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._held, self._given, self._tail = b"", b"", b""
        self._has_ended = False
        self.is_empty = True

    def read(self, size: int) -> bytes:
        """Return at most so many bytes; none at the end. Raises ShardError."""
        while not self._has_ended and len(self._held) < size + _HELD_BACK:
            self._fetch(size)
        if self._has_ended:
            size = min(size, _BLOCK)
        self._given, self._held = self._held[:size], self._held[size:]
        return self._given

    def check_end(self) -> None:
        """Look at what the reader left. Raises ShardError if that is not the end of a tar, or the command failed."""
        unread = self._given[-_BLOCK:] + self._held
        while not unread.strip(b"\0") and not self._has_ended:
            unread = self._fetch(_PIECE)
        if unread.strip(b"\0"):
            raise self.explained("has a damaged header, or another tar that follows it,")
        if self._tail != _END:
            raise self.explained("ends early")
        if failed := _failure(self._stream, None):
            raise ShardError(failed)

    def explained(self, reason: str) -> ShardError:
        """Return the reason, or that the command failed, if that is why."""
        return ShardError(_failure(self._stream, _PATIENCE if self._has_ended else 0.0) or reason)

    def _fetch(self, size: int) -> bytes:
        try:
            data: bytes = self._stream.read(size)
        except OSError as error:  # its text may have the value of a variable
            raise self.explained(f"cannot be read ({error.strerror or type(error).__name__})") from error
        if self.is_empty:
            for magic, program in _COMPRESSED.items():
                if data.startswith(magic):
                    raise ShardError(f"is compressed, and tars are read as they are (use pipe: and {program})")
        self._has_ended = not data
        self.is_empty &= not data
        self._held += data
        self._tail = (self._tail + data)[-len(_END) :]
        return data


def _failure(stream: Any, patience: float | None) -> str:
    """Return how the command of a shard failed, once it has ended; empty if it did not, or there is none."""
    if not isinstance(stream, Pipe):
        return ""
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = stream.proc.wait(patience)
        if code < 0 and -code != signal.SIGPIPE:
            return f"was ended by signal {-code}"
        if code > 0 and code not in stream.ignore_status:
            return f"ended with exit code {code}"
    return ""


@contextmanager
def opened(url: str) -> Iterator[ShardBytes]:
    """Open a shard; its command, if it has one, ends with the block. Raises ShardError."""
    try:
        stream = gopen(url)
    except OSError as error:
        program = f": {error.filename}" if error.filename and str(error.filename) != url else ""
        raise ShardError(f"cannot be opened ({error.strerror or type(error).__name__}{program})") from error
    except Exception as error:  # of a library that finds the file
        raise ShardError(f"cannot be opened ({type(error).__name__})") from error
    try:
        yield ShardBytes(stream)
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
