"""Write shards, one tar and its index at a time, with the same bytes as webdataset's own writer.

That writer streams through buffers of a few kilobytes and copies an image a dozen times. Here the headers
come from tarfile, and the images go to the file directly.

The same samples give the same bytes. Every file is written atomically; the caller writes
dataset.json last.
"""

import hashlib
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from karat_scale.data.shards.shard_format import FileRecord, ShardRecord, index_bytes
from karat_scale.foundation.files import commit_file, name_in_errors, temporary_file, write_atomically

TAR_BLOCK = tarfile.BLOCKSIZE
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
            stream = _HashingStream(file)
            for sample in samples:
                _add_member(stream, f"{sample.key}.cls", str(sample.label).encode())
                offset = _add_member(stream, f"{sample.key}.{sample.extension}", sample.data)
                rows.append((offset, len(sample.data), sample.label, zlib.crc32(sample.data)))
                keys.append(sample.key)
            stream.write(bytes(2 * TAR_BLOCK))
            stream.write(bytes(-stream.bytes % tarfile.RECORDSIZE))
        index = index_bytes(rows, keys)
        index_name = f"{name}.index.npz"
        # The index is renamed first, so a tar under its final name always has one.
        write_atomically(directory / index_name, index)
        commit_file(temporary, path)
    return ShardRecord(
        name=path.name,
        bytes=stream.bytes,
        sha256=stream.digest.hexdigest(),
        samples=len(rows),
        index=FileRecord(name=index_name, bytes=len(index), sha256=hashlib.sha256(index).hexdigest()),
    )


def _add_member(stream: "_HashingStream", name: str, data: bytes) -> int:
    """Append a file to a tar; returns the offset of its bytes."""
    stream.write(_header(name, len(data)))
    offset = stream.bytes
    stream.write(data)
    stream.write(bytes(-len(data) % TAR_BLOCK))
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


class _HashingStream:
    """Writes bytes to a file, counting and hashing them, so that no shard is read back for its digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.bytes = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.bytes += len(data)
        self.digest.update(data)
        return self._file.write(data)
