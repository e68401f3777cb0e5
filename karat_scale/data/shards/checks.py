"""Checks for shards, betons and folders: files against their records, classes against the model."""

import hashlib
import os
import stat
import threading
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from karat_scale.data.shards.shard_format import FileRecord, check_has_record, staged_copy
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.stores import is_url
from karat_scale.foundation.tables import Files
from karat_scale.recipe import DataConfig

_PIECE = 1 << 20


@dataclass(frozen=True)
class Wording:
    """Words for messages about a kind of file: where its record is, how to fix it, and that it is missing."""

    said_by: str
    fix: str
    missing: str = "is missing"


def must_answer(path: Path, timeout: float) -> None:
    """Wait until a path can be opened or is found missing. Raises DataError after `timeout` seconds.

    A dead server's file system blocks the caller and lets no signal through, so a thread opens the path.
    """

    def ask() -> None:
        with suppress(OSError):
            os.close(os.open(path, os.O_RDONLY))

    asking = threading.Thread(target=ask, name="karat-ask", daemon=True)
    asking.start()
    asking.join(timeout)
    if asking.is_alive():
        raise DataError(
            f"data.path = {path} did not answer for data.timeout = {timeout:g} s; check its file system, or raise "
            "data.timeout if it is only slow"
        )


def check_data_path(data: DataConfig) -> None:
    """Refuse a `data.path` where there is nothing. It costs nothing, so that commands ask before they import torch.

    Raises:
        DataError: it does not exist, has no dataset.json though it should, or does not answer.
    """
    if data.row.files is None or is_url(data.path) or staged_copy(data.path):
        return
    directory = Path(data.path).expanduser()
    must_answer(directory, data.timeout)
    if data.row.files is Files.SHARDS:
        check_has_record(directory)
    elif not directory.is_dir():
        raise DataError(f"data.path = {directory} is not a directory; set it to {data.row.files.value}")


def split_fix(split: str, there: Collection[str]) -> str:
    """Return what to do where a data set lacks a split and has others; an empty text if it has none."""
    if not there:
        return ""
    if split == "train":
        return "; set data.train_split to one of them"
    others = [name for name in ("val", "validation", "valid", "test") if name in there]
    if others:
        return f"; set data.val_split={others[0]}"
    return "; set data.val_split to one of them, or make one by data_prep/make_webdataset.py --val-fraction 0.1"


def check_class_count(place: Path | str, classes: int, num_classes: int) -> None:
    """Refuse data with more classes than the model. Raises DataError."""
    if classes > num_classes:
        raise DataError(
            f"{place} has {classes} classes, but model.num_classes = {num_classes}; set model.num_classes={classes}"
        )


def unused_classes(classes: int, num_classes: int) -> str:
    """Return a notice if the model has more classes than the data; else an empty text."""
    if classes >= num_classes:
        return ""
    return (
        f"the data has {classes} classes, but model.num_classes = {num_classes}: the others do not occur; "
        f"set model.num_classes={classes} unless that is intended"
    )


def check_file(path: Path, record: FileRecord, by_hash: bool, wording: Wording) -> None:
    """Compare a file with its record by size or by SHA-256. Raises DataError."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} {wording.missing}; {wording.fix}") from error
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        raise DataError(f"{path} is not a regular file; {wording.fix}")
    size = status.st_size
    if size != record.bytes:
        how = "is cut short" if size < record.bytes else "has changed since it was written"
        raise DataError(f"{path} {how}: {size} bytes, {wording.said_by} says {record.bytes}; {wording.fix}")
    if by_hash:
        for _ in hash_file(path, record, wording):
            pass


def hash_file(path: Path, record: FileRecord, wording: Wording) -> Iterator[None]:
    """Compare a file's SHA-256 with its record; yields after each piece that is read. Raises DataError."""
    if not record.sha256:
        raise DataError(f"{path} was indexed without its SHA-256; use data.verify=size, or index it again with --hash")
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
                yield
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {wording.fix}") from error
    if digest.hexdigest() != record.sha256:
        raise DataError(f"{path} has changed since it was written: its SHA-256 differs; {wording.fix}")


def read_checked(path: Path, record: FileRecord, wording: Wording) -> bytes:
    """Return the bytes of a small file after comparing it with its record. Raises DataError."""
    check_file(path, record, False, wording)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {wording.fix}") from error
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise DataError(f"{path} has changed since it was written; {wording.fix}")
    return data
