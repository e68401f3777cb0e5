"""Images inside an uncompressed tar, read in place: headers are scanned once, nothing is unpacked."""

import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from karat_scale.data.prepare.sources.base import ListedSource, cannot_read
from karat_scale.data.prepare.sources.imagefolder import NO_IMAGE_NAME, is_image_name
from karat_scale.data.shards.shard_writer import TAR_BLOCK
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import open_regular


@dataclass(frozen=True)
class Member:
    """A file in a tar: its bytes are `size` from `offset` of the tar's own file. `unusable` says why it has none."""

    name: str
    offset: int
    size: int
    unusable: str = ""


def scan_tar(path: Path, within: Member | None = None, folders: list[str] | None = None) -> Iterator[Member]:
    """Return the files of a tar, or of the tar that is member `within` of it. Raises DataError if damaged.

    A hard link has the bytes of its target. An image that is no plain file, such as a symbolic link, is `unusable`.
    folders: the names of its folders are added to it.
    """
    files: dict[str, Member] = {}
    what = f"{path}: {within.name}" if within else f"{path}"
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            end = within.offset + within.size if within else path.stat().st_size
            file.seek(within.offset if within else 0)
            # Offsets count from the start of the outer file, since tarfile reads that.
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (info := archive.next()) is not None and info.offset < end:
                    archive.members.clear()  # type: ignore[attr-defined]
                    # The size of a sparse file counts its holes, which the tar does not have.
                    if info.offset_data + (info.size if info.isreg() and not info.issparse() else 0) > end:
                        raise DataError(f"{what} is cut short at {info.name!r}; fetch it again")
                    if info.isdir() and folders is not None:
                        folders.append(info.name)
                    if (member := _member(info, files)) is not None:
                        yield member
                # A tar ends with blocks of zeros; a tar that was cut between two members does not.
                file.seek(archive.offset)
                if file.read(max(0, min(TAR_BLOCK, end - archive.offset))) != bytes(TAR_BLOCK):
                    raise DataError(f"{what} is cut short: it has no end mark; fetch it again")
    except tarfile.TarError as error:
        packed = path.suffix in (".gz", ".tgz", ".xz", ".bz2", ".zst")
        fix = "unpack its compression first" if packed else "fetch it again"
        raise DataError(f"{what} is not a complete tar ({error}); {fix}") from error


def _member(info: tarfile.TarInfo, files: dict[str, Member]) -> Member | None:
    """Return a file, which is added to `files` by its path, or an image that is unusable; None for anything else."""
    path = posixpath.normpath(info.name)
    if info.isreg() and not info.issparse():
        files[path] = Member(info.name, info.offset_data, info.size)
        return files[path]
    if info.islnk() and (target := files.get(posixpath.normpath(info.linkname))) is not None:
        files[path] = replace(target, name=info.name)
        return files[path]
    if not is_image_name(posixpath.basename(path)):
        return None
    if info.islnk():
        return Member(info.name, 0, 0, f"a hard link to {info.linkname!r}, which is not before it in the tar")
    kind = "link" if info.issym() else "sparse" if info.issparse() else "special"
    return Member(info.name, 0, 0, f"it is no plain file but a {kind} member")


class TarSource(ListedSource):
    """Image members of one tar as a source. See Source.

    members: (class name, path for reports and keys, member). They are sorted in the order of an ImageFolder of the
    same images, so both give the same shards.
    """

    def __init__(self, archive: Path, members: Iterable[tuple[str, str, Member]], classes: list[str]) -> None:
        skipped: list[tuple[str, str]] = []
        self._archive = archive
        self._file: int | None = None
        numbers = {name: label for label, name in enumerate(classes)}
        found: list[tuple[str, str, Member]] = []
        for name, path, member in members:
            if member.unusable or not is_image_name(path.rpartition("/")[2]):
                skipped.append((path, member.unusable or NO_IMAGE_NAME))
                continue
            if name not in numbers:
                raise DataError(f"{archive}: {member.name} is of class {name!r}, which the shards do not have")
            found.append((name, path, member))
        if not found:
            raise DataError(f"{archive} has no images")
        found.sort(key=lambda item: (item[0], os.fsencode(item[1])))
        labels, sizes = [numbers[name] for name, _, _ in found], [member.size for _, _, member in found]
        super().__init__(classes, [path for _, path, _ in found], labels, sizes)
        self.skipped = skipped
        self._offsets = np.array([member.offset for _, _, member in found], dtype=np.int64)

    def read(self, index: int) -> bytes:
        size = int(self.sizes[index])
        try:
            if self._file is None:
                self._file = os.open(self._archive, os.O_RDONLY | os.O_CLOEXEC)
            data = os.pread(self._file, size, int(self._offsets[index]))
        except OSError as error:
            raise cannot_read(self._archive, error) from error
        if len(data) != size:
            raise DataError(f"{self._archive} has become shorter; it ends in {self.name(index)}")
        return data

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]
