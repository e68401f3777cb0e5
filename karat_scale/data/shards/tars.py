"""Uncompressed tars: the members of any tar, read only from its headers, and the writer of shards.

ustar, GNU tar and pax headers are understood, as POSIX.1-2017 (pax) and GNU tar's manual describe them.

Shards are written one tar and its index at a time, with the same bytes as webdataset's own writer. The latter streams
through buffers of a few kilobytes and copies an image a dozen times. Here the headers come from tarfile, and the images
go to the file directly. The same samples give the same bytes. Every file is written atomically; the caller writes
dataset.json last.
"""

import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from karat_scale.data.shards.shard_format import ShardRecord, file_record, index_bytes
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import (
    FingerprintedFile,
    commit_file,
    name_in_errors,
    temporary_file,
    write_atomically,
)

BLOCK = 512
# What is read at once: a header, and the small file or the header that often follows.
_WINDOW = 4096
_LONGEST_NAME = 1 << 20
# After the end mark, at most this much is searched for more members.
_SEARCHED_AFTER_END = 1 << 20

Read = Callable[[int, int], bytes]
"""Returns `size` bytes from `offset`; fewer only at the end."""
Kind = Literal["file", "sparse", "link", "special", "directory"]
# Type flags.
_FILES, _LINKS, _HARD_LINK, _FOLDER, _SPARSE = b"\x0007", b"12", ord("1"), ord("5"), ord("S")
_WITHOUT_DATA = b"123456"
_EXTENDED, _GLOBAL, _LONG_NAME, _LONG_LINK = b"xgLK", ord("g"), ord("L"), ord("K")
# The keys of extended headers that matter; most headers have none of them.
_USED_KEYS = (b"path=", b"size=", b"GNU.sparse.")  # linkpath= among them


class Member(NamedTuple):
    """A member of a tar: its bytes are `size` from `offset`. Names are decoded like file names.

    target: for a hard link, the name of the earlier member whose bytes it shares.
    """

    name: str
    offset: int
    size: int
    kind: Kind
    target: str = ""


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
            rest = read(offset, min(size - offset, _SEARCHED_AFTER_END))
            if rest.count(0) != len(rest):  # a reader would silently stop after the first of tars joined by cat
                raise DataError(f"{what} holds more after its end mark, as tars joined by cat do; split it into tars")
            return
        kind, length = header[156], _checked_size(header, offset, what)
        offset += BLOCK
        if kind in _EXTENDED:
            if length > _LONGEST_NAME or offset + length > size:
                raise DataError(
                    f"{what} is damaged at byte {offset}: an extended header of {length} bytes; fetch it again"
                )
            text = window[place + BLOCK : place + BLOCK + length]
            changes |= _extended(kind, text if len(text) == length else read(offset, length), everywhere)
        else:
            changes = {**everywhere, **changes} if everywhere else changes
            name, target = _name(header), _text(header[157:257]) if kind == _HARD_LINK else ""
            if changes:
                length = _number(changes["size"]) if changes.get("size", "").isdecimal() else length
                name, target = changes.get("path", name), changes.get("linkpath", target)
            length = 0 if kind in _WITHOUT_DATA else length
            more = kind == _SPARSE and header[482]
            while more:  # old GNU tar: the rest of the map of its data, which `length` does not count
                block = read(offset, BLOCK)
                more, offset = len(block) == BLOCK and block[504], offset + BLOCK
            if offset + length > size:
                raise DataError(f"{what} is cut short at {name!r}; fetch it again")
            sort: Kind = "directory" if kind == _FOLDER or name[-1:] == "/" else _kind(kind, changes)
            yield Member(name, offset, length, sort, target if kind == _HARD_LINK else "")
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
        # The checksum counts itself as eight blanks. Old tars have the sum of signed bytes.
        excess = _byte_sum(header) - _byte_sum(header[148:156]) + 256 - int(header[148:156].partition(b"\0")[0], 8)
        if excess % 65521 and (excess - 256 * sum(byte > 127 for byte in header[:148] + header[156:])) % 65521:
            raise ValueError
        if header[124] & 0x80:  # GNU's binary form, for 8 GiB and more
            return int.from_bytes(header[125:136], "big")
        return int(header[124:136].partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise _no_header(header, offset, what) from None


# The first bytes of compressed files, and what decompresses them.
_UNPACKED_BY = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


def _no_header(header: bytes, offset: int, what: str) -> DataError:
    if offset == 0 and (tool := next((tool for start, tool in _UNPACKED_BY.items() if header.startswith(start)), "")):
        return DataError(f"{what} is compressed; decompress it first, for example with {tool}")
    if offset == 0 and header:
        return DataError(f"{what} is not a tar, or damaged from its first byte; name another file, or fetch it again")
    if len(header) < BLOCK:
        return DataError(f"{what} is cut short: it has no end mark; fetch it again")
    return DataError(f"{what} has no tar header at byte {offset}: damaged, or not a tar; fetch it again")


def _name(header: bytes) -> str:
    if header[345] and header[257:263] == b"ustar\0":
        return f"{_text(header[345:500])}/{_text(header[:100])}"
    return _text(header[:100])


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _extended(kind: int, data: bytes, everywhere: dict[str, str]) -> dict[str, str]:
    """Return what an extended header changes in the next member; a global one changes `everywhere`."""
    if kind in (_LONG_NAME, _LONG_LINK):
        return {"path" if kind == _LONG_NAME else "linkpath": _text(data)}
    if not any(key in data for key in _USED_KEYS):
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
    """Return a number in decimal digits. Python refuses thousands of digits, and no file's size has 20."""
    return int(digits) if len(digits) < 20 else 10**20


# Owner and mode of the members, as webdataset sets them.
OWNER, MODE = "bigdata", 0o444


@dataclass(frozen=True)
class EncodedSample:
    """An image file in a shard. `extension` is jpg, png, ...; `key` has no dot in its name."""

    key: str
    extension: str
    data: bytes
    label: int


def shard_name(split: str, number: int) -> str:
    """Return the name of a shard without its suffix."""
    return f"{split}-{number:06d}"


def write_shard(directory: Path, name: str, samples: Iterable[EncodedSample]) -> ShardRecord:
    """Write `name`.tar and `name`.index.npz into `directory`; returns their record in dataset.json."""
    rows: list[tuple[int, int, int, int]] = []
    keys: list[str] = []
    path = directory / f"{name}.tar"
    with temporary_file(path) as temporary:
        with name_in_errors(path), temporary.open("wb") as file:
            stream = FingerprintedFile(file)
            for sample in samples:
                _add_member(stream, f"{sample.key}.cls", str(sample.label).encode())
                offset = _add_member(stream, f"{sample.key}.{sample.extension}", sample.data)
                rows.append((offset, len(sample.data), sample.label, zlib.crc32(sample.data)))
                keys.append(sample.key)
            stream.write(bytes(2 * BLOCK))
            stream.write(bytes(-stream.bytes % tarfile.RECORDSIZE))
        index = index_bytes(rows, keys)
        listed = file_record(f"{name}.index.npz", index)
        # The index is renamed first, so a tar under its final name always has one.
        write_atomically(directory / listed.name, index)
        commit_file(temporary, path)
    return ShardRecord(name=path.name, **stream.fingerprint()._asdict(), samples=len(rows), index=listed)


def _add_member(stream: FingerprintedFile, name: str, data: bytes) -> int:
    """Append a file to a tar; returns the offset of its bytes."""
    stream.write(_header(name, len(data)))
    offset = stream.bytes
    stream.write(data)
    stream.write(bytes(-len(data) % BLOCK))
    return offset


def _tarfile_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.uname, member.gname = size, MODE, OWNER, OWNER
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _header(name: str, size: int) -> bytes:
    """Return the header that tarfile makes, from a template if the name is plain: tarfile is slow for small images."""
    if len(name) > tarfile.LENGTH_NAME or not name.isascii() or size > LARGEST_IN_FORM:
        return _tarfile_header(name, size)
    in_header = name.encode()
    total = FORM_SUM + sum(in_header) + sum(b"%011o" % size)
    header = in_header.ljust(tarfile.LENGTH_NAME, b"\0") + FORM_OWNER + b"%011o" % size
    return header + FORM_TIME + b"%06o\0" % total + FORM_REST


LARGEST_IN_FORM = 8**11 - 1
# A header without name, size and checksum, split at these; the checksum counts itself as blanks.
_FORM = _tarfile_header("", 0)
FORM_OWNER, FORM_TIME, FORM_REST = _FORM[100:124], _FORM[135:148], _FORM[155:]
FORM_SUM = sum(_FORM[:148]) + 8 * ord(" ") + sum(_FORM[156:]) - sum(b"%011o" % 0)
