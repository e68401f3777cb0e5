"""The files of a data set as its authors publish them, in their archive or unpacked, checked by the published MD5."""

import hashlib
import io
import sys
import tarfile
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from scipy.io import loadmat

from karat_scale.foundation.console import progress
from karat_scale.foundation.errors import DataError

_MB = 1_000_000


class PublishedFiles:
    """Some files of one data set in `src`: members of `folder` in `archive`, or plain files in `folder` or `src`.

    md5: the published hash by file name, None if there is none. fetched_by: the data set's name for fetch.py.
    """

    def __init__(
        self, src: Path, fetched_by: str, md5: dict[str, str | None], archive: str = "", folder: str = "."
    ) -> None:
        self._md5 = md5
        self._fix = f"fetch it again: python data_prep/fetch.py {fetched_by} --out {src}"
        self._archive: Path | None = None
        self._folder: Path | None = None
        if archive and (src / archive).is_file():
            self._archive, self._inside = src / archive, folder
            return
        for place in (src / folder, src):
            missing = [name for name in md5 if not (place / name).is_file()]
            if not missing:
                self._folder = place
                return
            # In `src` itself, names such as train and meta may belong to anything.
            if len(missing) < len(md5) and (place != src or not archive):
                raise DataError(f"{place} has no {missing[0]}; {self._fix}")

    @property
    def are_there(self) -> bool:
        """True if the archive or all of the files are in the source."""
        return self._archive is not None or self._folder is not None

    @cached_property
    def contents(self) -> dict[str, bytes]:
        """Return each file's bytes, by name. Raises DataError if one is missing or the archive is damaged."""
        if self._archive is not None:
            return self._unpacked(self._archive)
        assert self._folder is not None
        return {name: (self._folder / name).read_bytes() for name in self._md5}

    def checked(self, any_hash: bool) -> dict[str, bytes]:
        """Check that the contents have the published hashes, unless `any_hash` is set. Raises DataError."""
        if self._others and not any_hash:
            name = self._others[0]
            raise DataError(
                f"{self._where}: {name} has the MD5 {_md5(self.contents[name])}, and the published one is "
                f"{self._md5[name]}; {self._fix}, or accept it with --any-hash"
            )
        if self._others:
            print(f"warning: {self._where}: not as published: {', '.join(self._others)} (--any-hash)", file=sys.stderr)
        return self.contents

    @property
    def facts(self) -> dict[str, Any]:
        """Return the facts for dataset.json: the files that are not the published ones."""
        return {"not_as_published": self._others}

    @cached_property
    def _others(self) -> list[str]:
        return [name for name, md5 in self._md5.items() if md5 and _md5(self.contents[name]) != md5]

    @property
    def _where(self) -> Path | None:
        return self._archive or self._folder

    def _unpacked(self, archive: Path) -> dict[str, bytes]:
        wanted = {f"{self._inside}/{name}": name for name in self._md5}
        size = archive.stat().st_size
        try:
            with archive.open("rb") as file, progress(f"reading {archive.name}", -(-size // _MB), "MB") as advance:
                found = _read_members(_CountedReads(file, advance), wanted)
                advance(-(-size // _MB) - file.tell() // _MB)
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise DataError(f"{archive} is damaged or cut short ({error}); {self._fix}") from error
        if missing := [name for name in self._md5 if name not in found]:
            raise DataError(f"{archive} has no {self._inside}/{missing[0]}; {self._fix}")
        return found


class _CountedReads:
    """A file that reports how many MB were read."""

    def __init__(self, file: IO[bytes], advance: Callable[[int], None]) -> None:
        self._file, self._advance = file, advance

    def read(self, size: int) -> bytes:
        before = self._file.tell() // _MB
        data = self._file.read(size)
        self._advance(self._file.tell() // _MB - before)
        return data


def _read_members(packed: _CountedReads, wanted: dict[str, str]) -> dict[str, bytes]:
    """Return the members of a gzipped tar whose paths are keys of `wanted`, by its values; stops after the last one."""
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=packed, mode="r|gz") as tar:  # type: ignore[call-overload]
        for member in tar:
            name = wanted.get(str(PurePosixPath(member.name)))
            file = tar.extractfile(member) if name and member.isreg() else None
            if name and file:
                found[name] = file.read()
            if len(found) == len(wanted):
                break
    return found


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def mat_array(name: str, data: bytes, variable: str) -> npt.NDArray[Any]:
    """Return one array of integers from a .mat file. Raises DataError if it is damaged or has no such array."""
    try:
        found = loadmat(io.BytesIO(data), variable_names=[variable]).get(variable)
    except Exception as error:  # a damaged file makes scipy raise nearly any error
        raise DataError(f"{name} is not a complete MATLAB file ({error}); fetch it again") from error
    if not isinstance(found, np.ndarray) or not np.issubdtype(found.dtype, np.integer):
        raise DataError(f"{name} has no array of integers {variable!r}; fetch it again")
    return found
