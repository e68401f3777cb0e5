"""Ways to damage a file of a checkpoint, and the pointer to a checkpoint."""

from collections.abc import Callable
from pathlib import Path


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


HARMS: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "emptied": _empty,
    "zeroed": _zero,
    "one bit flipped": _flip,
    "deleted": Path.unlink,
}

POINTERS: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "dangling": b"step-00000099\n",
    "elsewhere": b"../elsewhere\n",
    "not UTF-8": b"step-\xff\xfe\n",
    "NUL": b"\x00" * 14,
    "endless": b"step-" + b"0" * 5000,
}


def point(pointer: Path, content: bytes | None) -> None:
    """Write wrong content into a pointer, `latest` or `best`; None removes the pointer."""
    if content is None:
        pointer.unlink()
    else:
        pointer.write_bytes(content)
