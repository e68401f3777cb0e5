"""The members of an uncompressed tar, from its headers alone: no file in it is read.

ustar, GNU tar and pax headers are understood, as POSIX.1-2017 (pax) and GNU tar's manual describe them.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from karat_scale.foundation.errors import DataError

BLOCK = 512
# What is read at once: a header, and the small file or the header that often follows.
_WINDOW = 4096
_LONGEST_NAME = 1 << 20
# After the end mark, at most this much is searched for more members.
_SEARCHED_AFTER_END = 1 << 20

Read = Callable[[int, int], bytes]
"""Returns `size` bytes from `offset`; fewer only at the end."""
Kind = Literal["file", "sparse", "link", "special"]
# Type flags.
_FILES, _LINKS, _FOLDER, _SPARSE = b"\x0007", b"12", ord("5"), ord("S")
_WITHOUT_DATA = b"123456"
_EXTENDED, _GLOBAL, _LONG_NAME, _LONG_LINK = b"xgLK", ord("g"), ord("L"), ord("K")
# The keys of extended headers that matter; most headers have none of them.
_USED_KEYS = (b"path=", b"size=", b"GNU.sparse.")


class Member(NamedTuple):
    """A member of a tar that is no folder: its bytes are `size` from `offset`. Names are decoded like file names."""

    name: str
    offset: int
    size: int
    kind: Kind


def scan_members(read: Read, size: int, what: str) -> Iterator[Member]:
    """Yield the members of a tar of `size` bytes, in order.

    Args:
        read: reads the tar, some kilobytes at a time.
        what: the tar's name, for errors.

    Raises:
        DataError: it is cut short or damaged, is no tar, or holds another tar after its end.
    """
    offset = start = 0
    window = b""
    changes: dict[str, str] = {}
    everywhere: dict[str, str] = {}
    while True:
        place = offset - start
        if place + BLOCK > len(window):
            start, window, place = offset, read(offset, _WINDOW), 0
        header = window[place : place + BLOCK]
        if header[:1] == b"\0" or len(header) < BLOCK:
            if len(header) < BLOCK or header.count(0) < BLOCK:
                raise _no_header(header, offset, what)
            _check_nothing_follows(read, offset, size, what)
            return
        kind, length = header[156], _checked_size(header, offset, what)
        offset += BLOCK
        if kind in _EXTENDED:
            if length > _LONGEST_NAME or offset + length > size:
                raise DataError(f"{what} is damaged at byte {offset}: an extended header of {length} bytes")
            text = window[place + BLOCK : place + BLOCK + length]
            changes |= _extended(kind, text if len(text) == length else read(offset, length), everywhere)
        else:
            changes = {**everywhere, **changes} if everywhere else changes
            name = _name(header)
            if changes:
                length = _number(changes["size"]) if changes.get("size", "").isdecimal() else length
                name = changes.get("path", name)
            length = 0 if kind in _WITHOUT_DATA else length
            if offset + length > size:
                raise DataError(f"{what} is cut short at {name!r}; fetch it again")
            if kind != _FOLDER and name[-1:] != "/":
                yield Member(name, offset, length, _kind(kind, changes))
            changes = {}
        offset += -(-length // BLOCK) * BLOCK


def _kind(kind: int, change: dict[str, str]) -> Kind:
    if kind in _FILES:
        return "sparse" if change and any(key.startswith("GNU.sparse.") for key in change) else "file"
    return "sparse" if kind == _SPARSE else "link" if kind in _LINKS else "special"


def _byte_sum(data: bytes) -> int:
    """Return the sum of bytes, which is the lower half of Adler-32, less 1, modulo 65521."""
    return (zlib.adler32(data) & 0xFFFF) - 1


def _checked_size(header: bytes, offset: int, what: str) -> int:
    """Return the size in a header. Raises DataError if its checksum is wrong."""
    try:
        # The checksum counts itself as eight blanks.
        expected = int(header[148:156].partition(b"\0")[0], 8)
        if (_byte_sum(header) - _byte_sum(header[148:156]) + 256 - expected) % 65521:
            raise ValueError
        if header[124] & 0x80:  # GNU's binary form, for 8 GiB and more
            return int.from_bytes(header[125:136], "big")
        return int(header[124:136].partition(b"\0")[0], 8)
    except ValueError:
        raise _no_header(header, offset, what) from None


def _no_header(header: bytes, offset: int, what: str) -> DataError:
    if header.startswith((b"\x1f\x8b", b"BZ", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")) and offset == 0:
        return DataError(f"{what} is compressed; unpack its compression first")
    if len(header) < BLOCK:
        return DataError(f"{what} is cut short: it has no end mark; fetch it again")
    return DataError(f"{what} is damaged, or no tar: at byte {offset} is no tar header; fetch it again")


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _extended(kind: int, data: bytes, everywhere: dict[str, str]) -> dict[str, str]:
    """Return what an extended header changes in the next member; a global one changes `everywhere`."""
    if kind == _LONG_NAME:
        return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    if kind == _LONG_LINK or not any(key in data for key in _USED_KEYS):
        return {}
    found: dict[str, str] = {}
    while data[:1].isdigit():
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or (total := _number(length)) <= len(length) + 1:
            break
        key, _, value = rest[: total - len(length) - 2].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[total:]
    if "GNU.sparse.name" in found:
        found["path"] = found["GNU.sparse.name"]
    if kind == _GLOBAL:
        everywhere |= found
        return {}
    return found


def _number(digits: str | bytes) -> int:
    """Return a number in decimal digits. Python refuses thousands of them, and no file is as large as 20 say."""
    return int(digits) if len(digits) < 20 else 10**20


def _check_nothing_follows(read: Read, offset: int, size: int, what: str) -> None:
    """Refuse tars that were joined by cat: a reader would silently stop after the first."""
    rest = read(offset, min(size - offset, _SEARCHED_AFTER_END))
    if rest.count(0) != len(rest):
        raise DataError(f"{what} holds more after its end mark, as tars joined by cat do; split it into tars")
