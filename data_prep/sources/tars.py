"""Images inside an uncompressed tar, read in place: headers are scanned once, nothing is unpacked."""

import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from karat_scale.data.formats.shard_writer import TAR_BLOCK
from karat_scale.errors import DataError
from sources.base import ListedSource, Openers, UnreadableSampleError
from sources.imagefolder import NO_IMAGE_NAME, SPLIT_FOLDERS, is_image_name, require_utf8


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: its bytes are `size` from `offset` of the tar's own file."""

    name: str
    offset: int
    size: int


def scan_tar(path: Path, within: Member | None = None, folders: list[str] | None = None) -> Iterator[Member]:
    """Return the regular files of a tar, or of the tar that is member `within` of it. Raises DataError if damaged.

    folders: the names of its folders are added to it.
    """
    what = f"{path}: {within.name}" if within else f"{path}"
    try:
        with path.open("rb") as file:
            end = within.offset + within.size if within else path.stat().st_size
            file.seek(within.offset if within else 0)
            # Offsets count from the start of the outer file, since tarfile reads that.
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (info := archive.next()) is not None and info.offset < end:
                    archive.members.clear()  # type: ignore[attr-defined]
                    if info.offset_data + (info.size if info.isreg() else 0) > end:
                        raise DataError(f"{what} is cut short at {info.name!r}; fetch it again")
                    if info.isdir() and folders is not None:
                        folders.append(info.name)
                    if info.isreg() and not info.issparse():
                        yield Member(info.name, info.offset_data, info.size)
                # A tar ends with blocks of zeros; a tar that was cut between two members does not.
                file.seek(archive.offset)
                if file.read(max(0, min(TAR_BLOCK, end - archive.offset))) != bytes(TAR_BLOCK):
                    raise DataError(f"{what} is cut short: it has no end mark; fetch it again")
    except tarfile.TarError as error:
        packed = path.suffix in (".gz", ".tgz", ".xz", ".bz2", ".zst")
        fix = "unpack its compression first" if packed else "fetch it again"
        raise DataError(f"{what} is not a complete tar ({error}); {fix}") from error


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
            if not is_image_name(path.rpartition("/")[2]):
                skipped.append((path, NO_IMAGE_NAME))
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
        if self._file is None:
            self._file = os.open(self._archive, os.O_RDONLY | os.O_CLOEXEC)
        size = int(self.sizes[index])
        try:
            data = os.pread(self._file, size, int(self._offsets[index]))
        except OSError as error:
            raise UnreadableSampleError(error.strerror or str(error)) from error
        if len(data) != size:
            raise DataError(f"{self._archive} has become shorter; it ends in {self.name(index)}")
        return data

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]


def folder_tar_splits(path: Path) -> tuple[Openers, list[str]]:
    """Return splits and classes of a tar of an ImageFolder: [<anything>/][train/|val/]<class>/<image>."""
    by_split: dict[str, list[tuple[str, str, Member]]] = {}
    folders: list[str] = []
    for member in scan_tar(path, folders=folders):
        parts = _parts(member.name)
        if len(parts) < 2:
            raise DataError(f"{path}: {member.name} is in no class folder; expected <class>/<image>")
        split, inner = _split_of(parts, parts[:-2])
        by_split.setdefault(split, []).append((inner[0], "/".join(inner), member))
    flat = [member for _, _, member in by_split.get("", []) if is_image_name(member.name.rpartition("/")[2])]
    if flat and len(by_split) > 1:
        raise DataError(
            f"{path}: {flat[0].name} is in no class folder of a split, as other images are; sort such images into "
            "<split>/<class>/<image>, or remove them"
        )
    named = {item[0] for items in by_split.values() for item in items}
    for parts in map(_parts, folders):
        # A class without files is one too, as in a folder.
        split, inner = _split_of(parts, parts[:-1])
        if split in by_split and inner and inner[0][0] != ".":
            named.add(inner[0])
    classes = sorted(named)
    require_utf8(classes, path)
    return {split: partial(TarSource, path, items) for split, items in by_split.items()}, classes


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in ("", ".", "..")]


def _split_of(parts: list[str], above: list[str]) -> tuple[str, list[str]]:
    """Return the split, "" for none, and the parts inside it; `above` are the parts that may name it."""
    at = next((i for i, part in enumerate(above) if part in SPLIT_FOLDERS), None)
    return ("", parts) if at is None else (parts[at], parts[at + 1 :])
