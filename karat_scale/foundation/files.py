"""Atomic file writes, locks and hashes of files, and the folders that ship beside the package.

A file or folder that is being written has a temporary name, `.NAME.RANDOM.unfinished`, and its writer holds a lock on
it. A kill releases the lock. So the next writer of that name, or the next start of the run, recognises what a killed
writer left behind and removes it. Some file systems have no locks.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

_UMASK = os.umask(0o077)  # only setting it tells it, which is not safe once there are threads
os.umask(_UMASK)
_NAME = re.compile(r"\.(?P<of>.+)\.[a-z0-9_]{8}\.unfinished", re.DOTALL)


def temporary_file(path: Path) -> AbstractContextManager[Path]:
    """Make an empty file beside `path`; it is removed after the block, unless it was renamed."""
    return _temporary(path, lambda made: made.touch(0o600, exist_ok=False), lambda made: made.unlink(missing_ok=True))


def temporary_folder(path: Path) -> AbstractContextManager[Path]:
    """Make an empty folder beside `path`; it is removed after the block, unless it was renamed."""
    return _temporary(path, lambda made: made.mkdir(0o700), lambda made: shutil.rmtree(made, ignore_errors=True))


@contextmanager
def _temporary(path: Path, make: Callable[[Path], None], remove: Callable[[Path], None]) -> Iterator[Path]:
    remove_leftovers(path.parent, path.name)
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
        make(temporary)
        try:
            handle = _open(temporary, 0)
        except FileNotFoundError:  # another writer took it for a leftover
            continue
        try:
            # Another writer may have locked it as a leftover, and removes it then.
            if lock(handle, wait=False) and temporary.exists():
                try:
                    yield temporary
                finally:
                    remove(temporary)
                return
        finally:
            unlock(handle)
            os.close(handle)


def remove_leftovers(directory: Path, of: str | None = None) -> list[str]:
    """Remove what killed writers left in a directory.

    Args:
        of: the name that they were writing; any when None.

    Returns:
        A line for each one that cannot be removed.
    """
    problems, found = [], list[Path]()
    with suppress(OSError):
        names = [(path, _NAME.fullmatch(path.name)) for path in directory.iterdir()]
        found = [path for path, match in names if match and of in (None, match["of"])]
    for path in found:
        try:
            handle = _open(path, os.O_NONBLOCK | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        except OSError as error:
            problems.append(_line(path, error))
            continue
        try:
            if lock(handle, wait=False, without=False):  # without locks, nothing is known to be a leftover
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        except OSError as error:
            problems.append(_line(path, error))
        finally:
            os.close(handle)
    return problems


def _open(path: Path, flags: int) -> int:
    """Open a path for a lock: NFS locks only files that are open for writing, which folders cannot be."""
    return os.open(path, flags | (os.O_RDWR if path.is_file() and os.access(path, os.W_OK) else os.O_RDONLY))


def _line(path: Path, error: OSError) -> str:
    return f"{path} is left over from a run that was killed and cannot be removed: {error.strerror}; remove it by hand"


_BLOCK = 1 << 20
# Of what we write as text, an index of a checkpoint with very many ranks is the largest.
LARGEST_TEXT = 64 * 2**20
# An uncompressed image of 80 million pixels with 16 bits in each channel is smaller.
_LARGEST_IMAGE = 512 * 2**20
# A file that the system calls empty may have content, such as those in /proc.
_LEAST_READ = 1 << 16


class Fingerprint(NamedTuple):
    """The size and hash of a file."""

    bytes: int
    sha256: str


class FingerprintedFile:
    """A binary file that computes its fingerprint while it is written from front to back.

    `on_bytes` is called with the size of each piece that has been written.
    """

    def __init__(self, file: IO[bytes], on_bytes: Callable[[int], object] = lambda size: None) -> None:
        self._file, self._on_bytes = file, on_bytes
        self.bytes = 0
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Append all of `data`."""
        self._digest.update(data)
        written = self._file.write(data)
        self.bytes += written
        self._on_bytes(written)
        return written

    def flush(self) -> None:
        """Flush the buffer to the operating system."""
        self._file.flush()

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of everything written so far."""
        return Fingerprint(self.bytes, self._digest.hexdigest())


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file that the user names: under a temporary name, flushed to disk, and renamed. Text is written as UTF-8.

    A link's target is replaced, not the link. A device, a pipe or a socket is written to as it is.
    """
    if is_written_in_place(path):
        with name_in_errors(path), path.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
        return
    replace_file(Path(os.path.realpath(path)), content)


def is_written_in_place(path: Path) -> bool:
    """Whether a rename must not replace `path`: a device, a pipe, or a standard stream by its name in /dev."""
    if not path.exists():
        return False
    top = path.absolute().parts[1:3]  # /dev/shm has files
    return not (path.is_file() or path.is_dir()) or (top[:1] in (("dev",), ("proc",)) and top != ("dev", "shm"))


def replace_file(path: Path, content: bytes | str) -> None:
    """Write a file of ours like `write_atomically`, but replace whatever has its name, even a link or a pipe."""
    data = content.encode() if isinstance(content, str) else content
    with name_in_errors(path), temporary_file(path) as temporary:
        temporary.write_bytes(data)
        commit_file(temporary, path)


def make_folder(path: Path) -> None:
    """Create a folder of ours, if need be. Raises OSError, also where a link leads elsewhere."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a link, and nothing is written where it leads; remove it", str(path))
    path.mkdir(parents=True, exist_ok=True)


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Return a descriptor of a regular file, which the caller closes; never waits for the other end of a pipe.

    Raises:
        OSError: it cannot be opened, or it is a device, pipe, socket or directory.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.EISDIR):
            raise
        raise _not_regular(path) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return descriptor


def open_to_read(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file for its bytes. Raises OSError as `open_regular` does."""
    return os.fdopen(open_regular(path), "rb", buffering)


def append_to(path: Path) -> IO[str]:
    """Open a text file of ours for lines at its end. Raises OSError, also where it is a link or no regular file."""
    return os.fdopen(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW), "a", encoding="utf-8")


def read_bytes(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most `most` bytes; never waits, and never reads without end.

    Raises:
        OSError: there is no such file, it is a device, pipe or directory, or it is larger.
    """
    with open_to_read(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most else file.read(min(max(size, _LEAST_READ), most) + 1)
    if max(size, len(content)) > most:
        raise OSError(errno.EFBIG, f"larger than {most / 1e6:g} MB", str(path))
    return content


def read_image(path: Path) -> bytes:
    """Return an encoded image, as `read_bytes` reads it. Raises OSError, also for a file larger than any image."""
    return read_bytes(path, _LARGEST_IMAGE)


def read_text(path: Path, most: int = LARGEST_TEXT) -> str:
    """Return the text of a regular file, as `read_bytes` reads it.

    Raises:
        OSError: there is no such file, it is a device, pipe or directory, or it is larger.
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_bytes(path, most).decode("utf-8")


def _raise(error: OSError) -> None:
    raise error


def walk(top: Path, onerror: Callable[[OSError], None] = _raise) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk like os.walk, and follow links, except those that lead back to a folder above: they would have no end.

    Raises OSError if a folder cannot be listed, unless `onerror` takes it.
    """
    real = Path(os.path.realpath(top))
    around = {str(top): {str(real), *map(str, real.parents)}}
    for directory, below, files in os.walk(top, onerror=onerror, followlinks=True):
        above = around.pop(directory)
        for name in [*below]:
            path = os.path.join(directory, name)  # noqa: PTH118  # as os.walk writes it
            if (there := os.path.realpath(path)) in above:
                below.remove(name)
            else:
                around[path] = {*above, there}
        yield directory, below, files


def _not_regular(path: Path) -> OSError:
    return OSError(errno.EINVAL, "not a regular file", str(path))


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError if it is no JSON, or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a regular file; an empty one if the file is missing or damaged, or is no object."""
    try:
        found = parse_json(read_text(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Add this file name to an OSError without one, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def commit_file(temporary: Path, path: Path) -> None:
    """Flush a written temporary file to disk and rename it to `path`. Others may read it, if the umask lets them."""
    temporary.chmod(0o644 & ~_UMASK)
    flush_to_disk(temporary)
    temporary.replace(path)
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path, on_bytes: Callable[[int], object] = lambda size: None) -> str:
    """Return the SHA-256 of a file as hex. `on_bytes` is called with the size of each piece that has been read."""
    digest = hashlib.sha256()
    with open_to_read(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


def json_sha256(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain data as hex. It does not depend on the order or layout of the JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain data together with its SHA-256 as `sha256`, so that a later change can be detected."""
    unsealed = {key: value for key, value in content.items() if key != "sha256"}
    return {**unsealed, "sha256": json_sha256(unsealed)}


def shipped_directory(name: str) -> Path:
    """Return the folder `name`: inside the package of an installed wheel, or at the top of a clone."""
    package = Path(__file__).resolve().parents[1]
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def run_around(path: Path) -> Path | None:
    """Return the directory of the run that contains a path; None if no run does."""
    found = (one for one in path.resolve().parents if (one / "recipe.yaml").is_file())
    return next((one for one in found if (one / "checkpoints").is_dir()), None)


def trained_model(source: str) -> Path:
    """Return the path of a model: a path as it is, or the folder of that name among the package's models."""
    path = Path(source).expanduser()
    shipped = shipped_directory("examples/weights")
    return shipped / source if not path.exists() and shipped / source in shipped.glob("*") else path


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
            raise OSError(errno.EINVAL, "not a regular file; remove it", str(path))
        yield handle if lock(handle, wait=wait) else None
    finally:
        unlock(handle)
        os.close(handle)
