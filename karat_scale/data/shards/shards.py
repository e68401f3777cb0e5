"""The samples of one split of shards by their id, and the place of a data set's files: a directory or a URL.

A split is checked against dataset.json and the indexes. Both places answer the same questions.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from karat_scale.data.shards import shard_format
from karat_scale.data.shards.cache import RemoteUse
from karat_scale.data.shards.extents import RemoteShardFiles
from karat_scale.data.shards.remote_place import RemotePlace
from karat_scale.data.shards.shard_files import (
    NO_BLOCKS,
    Blocks,
    ChangedSampleError,
    LocalShardFiles,
    SamplePlaces,
    ShardFiles,
)
from karat_scale.data.shards.shard_format import (
    DATASET_FILE,
    INDEX_FIELDS,
    DatasetRecord,
    FileRecord,
    ShardRecord,
    dataset_directory,
    key_of,
    keys_of,
    read_columns,
    read_dataset_record,
)
from karat_scale.foundation.errors import DataError

FIX = "copy the shards again or make them again with data_prep/make_webdataset.py"
WORDING = shard_format.Wording(DATASET_FILE, FIX, f"is missing, though {DATASET_FILE} lists it")


class Place(Protocol):
    """The files of a data set. All methods raise DataError."""

    fix: str
    """What to do if a file is not as it was."""

    def where(self, name: str) -> str:
        """Return the path or the URL of a file."""

    def check(self, shards: Sequence[ShardRecord], by_hash: bool) -> None:
        """Compare shards with their records: by their sizes, or also by their hashes."""

    def read_checked(self, record: FileRecord) -> bytes:
        """Return a small file after comparing it with its record."""

    def read_all_checked(self, records: Sequence[FileRecord]) -> Iterator[bytes]:
        """Yield small files, in order, after comparing each with its record."""

    def files(self, places: SamplePlaces, readahead: Blocks) -> ShardFiles:
        """Return what reads samples. readahead: the blocks that a file system reads ahead."""


class LocalPlace:
    """A directory. See Place."""

    fix = FIX

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def where(self, name: str) -> str:
        """See Place."""
        return str(self._directory / name)

    def check(self, shards: Sequence[ShardRecord], by_hash: bool) -> None:
        """See Place."""
        for shard in shards:
            shard_format.check_file(self._directory / shard.name, shard, by_hash, WORDING)

    def read_checked(self, record: FileRecord) -> bytes:
        """See Place."""
        return shard_format.read_checked(self._directory / record.name, record, WORDING)

    def read_all_checked(self, records: Sequence[FileRecord]) -> Iterator[bytes]:
        """See Place."""
        return map(self.read_checked, records)

    def files(self, places: SamplePlaces, readahead: Blocks) -> ShardFiles:
        """See Place."""
        return LocalShardFiles(self._directory, places, readahead)


class ShardSplit:
    """The samples of one split: sample ids 0 .. len - 1 over all shards in order.

    Opening reads the indexes and checks every shard's size, or with verify="hash" its SHA-256. Raises
    DataError, one line, if anything is missing, cut short, changed or out of range. `labels` is int32 [len].

    directory: of dataset.json, also as a URL. readahead: the blocks that the system reads ahead when one of their
    samples is read. remote: the same and more, for shards at a URL.
    """

    def __init__(
        self,
        directory: Path | str,
        split: str,
        num_classes: int,
        verify: Literal["size", "hash"] = "size",
        readahead: Blocks = NO_BLOCKS,
        remote: RemoteUse | None = None,
    ) -> None:
        self.directory = dataset_directory(directory)
        remote = self._remote = remote or RemoteUse()
        record = read_dataset_record(self.directory, remote.timeout)
        self.classes = tuple(record.classes)
        self._shards = self._split_record(record, split)
        shard_format.check_class_count(self.directory, len(self.classes), num_classes)
        self._indexes = open_place(self.directory, remote)
        self._tars = open_place(record.tars_of(self.directory), remote) if record.root else self._indexes
        self._tars.check(self._shards, by_hash=verify == "hash")
        columns: dict[str, list[Any]] = {name: [] for name in INDEX_FIELDS}
        indexes = self._indexes.read_all_checked([shard.index for shard in self._shards])
        for shard, data in zip(self._shards, indexes, strict=True):
            for name, values in self._columns(shard, data).items():
                columns[name].append(values)
        self.labels = np.concatenate([*columns["label"], np.empty(0, np.int32)])
        self.places = SamplePlaces(
            self._shards,
            np.cumsum([0, *(shard.samples for shard in self._shards)]),
            np.concatenate([*columns["offset"], np.empty(0, np.int64)]),
            np.concatenate([*columns["size"], np.empty(0, np.int64)]),
            np.concatenate([*columns["crc32"], np.empty(0, np.uint32)]),
        )
        self._files = self._tars.files(self.places, readahead)

    def _split_record(self, record: DatasetRecord, split: str) -> list[ShardRecord]:
        if split not in record.splits or record.splits[split].samples == 0:
            there = [name for name, found in record.splits.items() if found.samples]
            raise DataError(
                f"{self.directory} has no samples of split {split!r}; the splits there: {', '.join(there) or 'none'}"
                + shard_format.split_fix(split, there)
            )
        found = record.splits[split]
        if found.samples != sum(shard.samples for shard in found.shards):
            raise DataError(f"{self.directory}/{DATASET_FILE}: {split} has not as many samples as its shards; {FIX}")
        return found.shards

    def _columns(self, shard: ShardRecord, data: bytes) -> dict[str, Any]:
        try:
            index = read_columns(data, INDEX_FIELDS, shard.samples, shard.bytes)
        except ValueError as error:
            path = self._indexes.where(shard.index.name)
            raise DataError(f"{path} does not fit its shard {shard.name}: {error}; {self._indexes.fix}") from None
        wrong = np.flatnonzero((index["label"] < 0) | (index["label"] >= len(self.classes)))
        if len(wrong):
            sample, label = wrong[0], index["label"][wrong[0]]
            raise DataError(
                f"{self._indexes.where(shard.name)}: sample {key_of(data, sample)} has label {label}, but "
                f"dataset.json lists {len(self.classes)} classes; correct them and make the shards again"
            )
        return index

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, sample_id: int) -> bytes:
        """Return the encoded image. Raises DataError naming the shard if it has changed since it was indexed."""
        try:
            return self._files.read(sample_id)
        except OSError as error:
            raise DataError(f"{self.file_of(sample_id)} cannot be read: {error.strerror}; {self._tars.fix}") from error
        except ChangedSampleError as error:
            key, _ = self.locate(sample_id)
            where = self.file_of(sample_id)
            raise DataError(f"{where} {error}: sample {key} differs; {self._tars.fix}") from None

    @property
    def ahead(self) -> int:
        """The samples of a rank to fetch before they are needed; 0 for shards on a file system."""
        return self._remote.ahead if isinstance(self._files, RemoteShardFiles) else 0

    def prepare(self, sample_ids: Iterable[int]) -> None:
        """Fetch what is needed for some samples at a URL, several at a time. Raises DataError."""
        if isinstance(self._files, RemoteShardFiles):
            self._files.prepare(sample_ids)

    def hint(self, sample_ids: Iterable[int]) -> None:
        """Fetch samples at a URL into the node's cache, except those that another process fetches. Raises DataError."""
        if isinstance(self._files, RemoteShardFiles):
            self._files.hint(sample_ids)

    def locate(self, sample_id: int) -> tuple[str, str]:
        """Return the key of a sample and the name of its shard, for messages."""
        shard, number = self._shard_of(sample_id)
        try:
            return key_of(self._indexes.read_checked(shard.index), number), shard.name
        except (DataError, ValueError, IndexError):  # the index has changed: the place is all that is known
            return f"number {number}", shard.name

    def keys(self) -> list[str]:
        """Return the key of each sample. Raises DataError if an index has changed."""
        return [key for shard in self._shards for key in keys_of(self._indexes.read_checked(shard.index))]

    def file_of(self, sample_id: int) -> str:
        """Return the path or the URL of the shard that holds a sample."""
        return self._tars.where(self._shard_of(sample_id)[0].name)

    def _shard_of(self, sample_id: int) -> tuple[ShardRecord, int]:
        """Return the shard of a sample, and the sample's number in it."""
        number = self.places.shard_of(sample_id)
        return self._shards[number], sample_id - int(self.places.starts[number])

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        self._files.close()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has its own open files.
        return {**self.__dict__, "_files": copy.copy(self._files)}


def open_place(directory: Path | str, remote: RemoteUse) -> Place:
    """Return the files of a data set in a directory or at a URL. Raises DataError."""
    return RemotePlace(directory, remote) if isinstance(directory, str) else LocalPlace(directory)


def check_file(directory: Path, record: FileRecord, by_hash: bool) -> None:
    """Compare a file with its record by size or by SHA-256. Raises DataError."""
    shard_format.check_file(directory / record.name, record, by_hash, WORDING)
