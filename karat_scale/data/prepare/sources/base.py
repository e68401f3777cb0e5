"""The interface of a source of images, its options, the names of samples, and the choice of splits.

The classes are those of some of the splits; see `labelling_splits`.
"""

import argparse
import errno
import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from karat_scale.data.shards.shards import refuse_two_spellings
from karat_scale.foundation.errors import DataError

Encoding = Literal["png", "jpeg"]
MAX_KEY_BYTES = 90  # a tar name holds 100
_UNFIT = re.compile(r"[\x00-\x20\x7f\s]")
_OF_ONE_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM}
_OF_ONE_FILE |= {errno.EINVAL, errno.EFBIG}  # no regular file, or larger than an image can be


class UnreadableSampleError(Exception):
    """A source image that cannot be used; the message is the reason."""


def cannot_read(path: Path, error: OSError, whole: bool = True) -> DataError | UnreadableSampleError:
    """Return the error that ends the run because a file or folder cannot be read; it may be readable the next time.

    whole: whether each file must be readable. If not, an error of one file, such as a lack of permission, concerns only
    that sample.
    """
    if not whole and error.errno in _OF_ONE_FILE:
        return UnreadableSampleError(error.strerror or str(error))
    return DataError(f"{path} cannot be read: {error.strerror or error}; fix that, and run the same command again")


def find_file(src: Path, names: tuple[str, ...]) -> Path | None:
    """Return the first of these files in `src`."""
    return next((src / name for name in names if (src / name).is_file()), None)


def lines_of(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank, without blanks around them. Raises DataError."""
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; correct the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read: {error}; name a text file") from error


@dataclass(frozen=True)
class SourceOptions:
    """Options for reading a source.

    val_labels, synsets: files with ImageNet's validation labels, as in tars.py. encoding: the encoding of images that a
    source holds as raw pixels; None uses the source's default. any_hash: whether to accept files of a published data
    set with another hash than the published one, or without some files. image_column, label_column: the columns of
    Parquet files.
    """

    val_labels: Path | None = None
    synsets: Path | None = None
    encoding: Encoding | None = None
    any_hash: bool = False
    image_column: str | None = None
    label_column: str | None = None

    @classmethod
    def of(cls, options: argparse.Namespace) -> "SourceOptions":
        """Return the options from a script's command line."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})


class Source(ABC):
    """One split of a source, in a fixed order.

    classes: the classes that the labels number. labels: int32 [n], the class number of each sample. sizes: int64 [n],
    the bytes of each sample; if not `exact_sizes`, means of several samples. skipped: files that are known not to be
    images, and why. facts: additional facts about the source for dataset.json. blocks: int64 [n], the number of the
    block that each sample is read with, of which `window` fit in memory; None if any order is as fast. grey: the number
    of grey images, if they were prepared before.
    """

    exact_sizes = True
    blocks: npt.NDArray[np.int64] | None = None
    window: int = 1
    grey: int = 0

    def __init__(self, classes: list[str], labels: npt.ArrayLike, sizes: npt.ArrayLike) -> None:
        self.classes = classes
        self.labels: npt.NDArray[np.int32] = np.asarray(labels, dtype=np.int32)
        self.sizes: npt.NDArray[np.int64] = np.asarray(sizes, dtype=np.int64)
        self.skipped: list[tuple[str, str]] = []
        self.facts: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the place of sample `index` in the source, for reports."""

    @abstractmethod
    def key(self, index: int) -> str:
        """Return the name of sample `index` in a shard, without suffix."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises UnreadableSampleError, or DataError if the source itself cannot be read."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash that changes when the source does."""


# Splits by name, each opened with the classes that its labels number.
Openers = dict[str, Callable[[list[str]], Source]]


class ListedSource(Source):
    """Common code of sources of image files with paths: the same files give the same shards from any of them."""

    def __init__(self, classes: list[str], paths: list[str], labels: npt.ArrayLike, sizes: npt.ArrayLike) -> None:
        super().__init__(classes, labels, sizes)
        self._paths = paths
        self._keys = unique_keys(paths)

    def name(self, index: int) -> str:
        return self._paths[index]

    def key(self, index: int) -> str:
        return self._keys[index]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path, size, label in zip(self._paths, self.sizes, self.labels, strict=True):
            digest.update(os.fsencode(path) + f"\0{size}\0{label}\n".encode())
        return digest.hexdigest()


def unique_keys(paths: list[str]) -> list[str]:
    """Return a key for each path. Keys are unique and short enough for a tar.

    The key is the path without its suffix and without parts that point outside of a directory. Dots in its last part,
    blanks and control characters become `_`. A key that is empty, too long or taken becomes a hash.
    """
    keys: list[str] = []
    taken: set[str] = set()
    for path in paths:
        key = _key(path)
        if not key or key in taken or len(key.encode()) > MAX_KEY_BYTES:
            key = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
        for number in range(2, len(paths) + 2):
            if key not in taken:
                break
            key = hashlib.sha256(os.fsencode(path) + b"\0%d" % number).hexdigest()[:32]
        taken.add(key)
        keys.append(key)
    return keys


def _key(path: str) -> str:
    text = os.fsencode(path).decode(errors="replace").replace("\\", "/")
    parts = [_UNFIT.sub("_", part) for part in text.split("/") if part not in ("", ".", "..")]
    if not parts:
        return ""
    stem = parts[-1].rpartition(".")[0] or parts[-1]
    return "/".join([*parts[:-1], stem.replace(".", "_")])


# Other data sets' names for the split that recipes call val.
VAL_NAMES = ("val", "valid", "validation", "test", "t10k")


def choose_splits(src: Path, found: Collection[str], split: str | None) -> dict[str, str]:
    """Return output names of splits and the source's own names for them. Raises DataError if there is no such split."""
    if split is None:
        first_val = next((name for name in VAL_NAMES if name in found), None)
        chosen = {name: name for name in found if name not in VAL_NAMES}
        return chosen | ({"val": first_val} if first_val else {})
    aliases = VAL_NAMES if split in VAL_NAMES else (split,)
    for origin in (split, *aliases):
        if origin in found:
            return {split: origin}
    raise DataError(f"{src} has no split {split!r}; it has {', '.join(found)}")


def labelling_splits(src: Path, found: Collection[str], split: str | None) -> set[str]:
    """Return the source's names of the splits whose classes are numbered. Raises DataError if there is no such split.

    They are the splits that are made without --split, and `split`. So a split that is made by itself has the same
    labels as when it is made with the others. A split that is left out adds no class: all images of `test` are often in
    one folder.
    """
    return {*choose_splits(src, found, None).values(), *choose_splits(src, found, split).values()}


def names_of_classes(src: Path, by_split: Mapping[str, Collection[str]], split: str | None) -> list[str]:
    """Return the classes of these splits, sorted. See `labelling_splits`.

    Raises DataError for a name that is not UTF-8, for two that look the same but differ, as those of a Mac and of other
    systems do, and for a class that the split `train` does not have.
    """
    names = sorted({name for origin in labelling_splits(src, by_split, split) for name in by_split[origin]})
    for name in names:
        if (shown := os.fsencode(name).decode(errors="backslashreplace")) != name:
            raise DataError(f"{src}: the name of class {shown} is not UTF-8; rename it")
    refuse_two_spellings(src, names)
    for origin in choose_splits(src, by_split, None).values() if "train" in by_split else ():
        for name in sorted(set(by_split[origin]) - set(by_split["train"]))[:1]:
            told = f"the split {origin} has the class {name!r}, which train does not have"
            raise DataError(f"{src}: {told}; remove it, or add it to train")
    return names
