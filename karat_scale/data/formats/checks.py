"""Checks that shards, betons and folders share: files against their records, classes against the model."""

import hashlib
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from karat_scale.data.formats.shard_format import FileRecord
from karat_scale.errors import DataError
from karat_scale.files import file_sha256


@dataclass(frozen=True)
class Wording:
    """How a kind of file is spoken of: where its record stands, what fixes it, and how its absence is told."""

    said_by: str
    fix: str
    missing: str = "is missing"


def must_answer(path: Path, timeout: float) -> None:
    """Wait until a path can be opened, or is found missing. Raises DataError after `timeout` seconds.

    A dead server's file system holds whoever asks it and lets no signal through, so a thread does the asking.
    """

    def ask() -> None:
        with suppress(OSError):
            os.close(os.open(path, os.O_RDONLY))

    asking = threading.Thread(target=ask, name="karat-ask", daemon=True)
    asking.start()
    asking.join(timeout)
    if asking.is_alive():
        raise DataError(
            f"data.path = {path} did not answer for data.timeout = {timeout:g} s; is its file system there? Raise "
            "data.timeout if it is only slow"
        )


def check_class_count(place: Path, classes: int, num_classes: int) -> None:
    """Refuse data of more classes than the model has. Raises DataError."""
    if classes > num_classes:
        raise DataError(
            f"{place} has {classes} classes, but model.num_classes = {num_classes}; set model.num_classes={classes}"
        )


def unused_classes(classes: int, num_classes: int) -> str:
    """A notice of classes that the model has and the data has not; empty where there are none."""
    if classes >= num_classes:
        return ""
    return (
        f"the data has {classes} classes, but model.num_classes = {num_classes}: the others are never seen; "
        f"set model.num_classes={classes} unless that is meant"
    )


def check_file(path: Path, record: FileRecord, by_hash: bool, wording: Wording) -> None:
    """Compare a file with its record by size or by SHA-256. Raises DataError."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} {wording.missing}; {wording.fix}") from error
    if size != record.bytes:
        how = "is cut short" if size < record.bytes else "has changed since it was written"
        raise DataError(f"{path} {how}: {size} bytes, {wording.said_by} says {record.bytes}; {wording.fix}")
    if by_hash and file_sha256(path) != record.sha256:
        raise DataError(f"{path} has changed since it was written: its SHA-256 differs; {wording.fix}")


def read_checked(path: Path, record: FileRecord, wording: Wording) -> bytes:
    """The bytes of a small file that is as its record says. Raises DataError."""
    check_file(path, record, False, wording)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {wording.fix}") from error
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise DataError(f"{path} has changed since it was written; {wording.fix}")
    return data
