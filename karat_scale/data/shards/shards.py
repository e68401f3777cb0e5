"""The samples of one split by their id, and the place of a data set's files: a directory or a URL.

A split of shards is checked against dataset.json and the indexes. Both places answer the same questions.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from karat_scale.data.shards import shard_format
from karat_scale.data.shards.cache import RemoteUse
from karat_scale.data.shards.remote import RemotePlace
from karat_scale.data.shards.shard_files import (
    NO_BLOCKS,
    Blocks,
    ChangedSampleError,
    LocalShardFiles,
    SamplePlaces,
    ShardFiles,
)
from karat_scale.data.shards.shard_format import (
    BETON_WORDING,
    DATASET_FILE,
    INDEX_FIELDS,
    SHARD_WORDING,
    DatasetRecord,
    FileRecord,
    ShardRecord,
    Wording,
    beton_path,
    dataset_directory,
    hash_file,
    key_of,
    keys_of,
    read_columns,
    read_dataset_record,
    read_record,
    staged_copy,
)
from karat_scale.data.shards.tars import BLOCK
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.tables import Files
from karat_scale.recipe import DataConfig


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

    def __init__(self, directory: Path, wording: Wording = SHARD_WORDING) -> None:
        self._directory, self._wording, self.fix = directory, wording, wording.fix

    def where(self, name: str) -> str:
        """See Place."""
        return str(self._directory / name)

    def check(self, shards: Sequence[ShardRecord], by_hash: bool) -> None:
        """See Place."""
        for shard in shards:
            shard_format.check_file(self._directory / shard.name, shard, by_hash, self._wording)

    def read_checked(self, record: FileRecord) -> bytes:
        """See Place."""
        return shard_format.read_checked(self._directory / record.name, record, self._wording)

    def read_all_checked(self, records: Sequence[FileRecord]) -> Iterator[bytes]:
        """See Place."""
        return map(self.read_checked, records)

    def files(self, places: SamplePlaces, readahead: Blocks) -> ShardFiles:
        """See Place."""
        return LocalShardFiles(self._directory, places, readahead)


def open_place(directory: Path | str, remote: RemoteUse) -> Place:
    """Return the files of a data set in a directory or at a URL. Raises DataError."""
    return RemotePlace(directory, remote) if isinstance(directory, str) else LocalPlace(directory)


class IndexedSplit:
    """The samples of files that have an index each, by their ids 0 .. len - 1, file after file; see ImageSource.

    `labels` is int32 [len]. Opening checks every file's size, or with verify="hash" its SHA-256. Raises DataError, one
    line, if anything is missing, cut short, changed or out of range.

    shards: the files. indexes, tars: the places of the indexes and of the files. kinds: the dtypes of an index's
    columns. listed_in: what lists the classes, for messages. readahead: the blocks that the system reads ahead when one
    of their samples is read.
    """

    def __init__(
        self,
        classes: Sequence[str],
        shards: Sequence[ShardRecord],
        indexes: Place,
        tars: Place,
        verify: Literal["size", "hash"],
        kinds: Mapping[str, Any],
        listed_in: str,
        readahead: Blocks,
    ) -> None:
        self.classes, self._shards = tuple(classes), shards
        self._indexes, self._tars, self._listed_in = indexes, tars, listed_in
        tars.check(shards, by_hash=verify == "hash")
        parts: dict[str, list[npt.NDArray[Any]]] = {name: [np.empty(0, kind)] for name, kind in kinds.items()}
        found = indexes.read_all_checked([shard.index for shard in shards])
        for shard, data in zip(shards, found, strict=True):
            for name, values in self._read_columns(shard, data, kinds).items():
                parts[name].append(values)
        columns = {name: np.concatenate(values) for name, values in parts.items()}
        self.labels: npt.NDArray[np.int32] = columns["label"]
        starts = np.cumsum([0, *(shard.samples for shard in shards)])
        self.places = SamplePlaces(shards, starts, columns["offset"], columns["size"], columns["crc32"])
        self._files = self._open_files(columns, readahead)

    def _read_columns(self, shard: ShardRecord, data: bytes, kinds: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
        try:
            columns = read_columns(data, kinds, shard.samples, shard.bytes)
            self._check_columns(columns)
        except ValueError as error:
            path = self._indexes.where(shard.index.name)
            raise DataError(f"{path} does not fit {shard.name}: {error}; {self._indexes.fix}") from None
        wrong = np.flatnonzero((columns["label"] < 0) | (columns["label"] >= len(self.classes)))
        if len(wrong):
            sample, label = key_of(data, wrong[0]), columns["label"][wrong[0]]
            raise DataError(
                f"{self._indexes.where(shard.name)}: sample {sample} has label {label}, but {self._listed_in} lists "
                f"{len(self.classes)} classes; correct them and make both again"
            )
        return columns

    def _check_columns(self, columns: dict[str, npt.NDArray[Any]]) -> None:
        """Raise ValueError if the columns of an index cannot be true."""

    def _open_files(self, columns: dict[str, npt.NDArray[Any]], readahead: Blocks) -> ShardFiles:
        """Return what reads the samples that the columns of all indexes describe."""
        return self._tars.files(self.places, readahead)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def identity(self) -> list[tuple[int, str]]:
        """The size of each file and the hash of its index, in which a copy agrees."""
        return [(shard.bytes, shard.index.sha256) for shard in self._shards]

    def read(self, sample_id: int) -> bytes:
        """Return the encoded image. Raises DataError naming the file if it has changed since it was indexed."""
        try:
            return self._files.read(sample_id)
        except OSError as error:
            raise DataError(f"{self.file_of(sample_id)} cannot be read: {error.strerror}; {self._tars.fix}") from error
        except ChangedSampleError as error:
            key, _ = self.locate(sample_id)
            where = self.file_of(sample_id)
            raise DataError(f"{where} {error}: sample {key} differs; {self._tars.fix}") from None

    def locate(self, sample_id: int) -> tuple[str, str]:
        """Return the key of a sample and the name of its file, for messages."""
        shard, number = self._shard_of(sample_id)
        try:
            return key_of(self._indexes.read_checked(shard.index), number), shard.name
        except (DataError, ValueError, IndexError):  # the index has changed: the place is all that is known
            return f"number {number}", shard.name

    def keys(self) -> list[str]:
        """Return the key of each sample. Raises DataError if an index has changed."""
        return [key for shard in self._shards for key in keys_of(self._indexes.read_checked(shard.index))]

    def file_of(self, sample_id: int) -> str:
        """Return the path or the URL of the file that holds a sample."""
        return self._tars.where(self._shard_of(sample_id)[0].name)

    def _shard_of(self, sample_id: int) -> tuple[ShardRecord, int]:
        """Return the file of a sample, and the sample's number in it."""
        number = self.places.shard_of(sample_id)
        return self._shards[number], sample_id - int(self.places.starts[number])

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        self._files.close()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has its own open files.
        return {**self.__dict__, "_files": copy.copy(self._files)}


class ShardSplit(IndexedSplit):
    """The samples of one split of shards. See IndexedSplit.

    directory: of dataset.json, also as a URL. remote: how the samples of shards at a URL are used.
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
        self._remote = remote or RemoteUse()
        record = read_dataset_record(self.directory, self._remote.timeout)
        shards = _shards_of(self.directory, record, split)
        shard_format.check_class_count(self.directory, len(record.classes), num_classes)
        indexes = open_place(self.directory, self._remote)
        tars = open_place(record.tars_of(self.directory), self._remote) if record.root else indexes
        super().__init__(record.classes, shards, indexes, tars, verify, INDEX_FIELDS, DATASET_FILE, readahead)

    @property
    def ahead(self) -> int:
        """The samples of a rank to fetch before they are needed; 0 for shards on a file system."""
        return self._remote.ahead if self._files.is_remote else 0

    def around(self, sample_id: int) -> bytes:
        """Return what is between the sample before and the one after, with the latter's header. Raises DataError."""
        places, number = self.places, self.places.shard_of(sample_id)
        begin, end = 0, self._shards[number].bytes
        if sample_id > places.starts[number]:
            begin = -(-int(places.offsets[sample_id - 1] + places.sizes[sample_id - 1]) // BLOCK) * BLOCK
        if sample_id + 1 < places.starts[number + 1]:
            end = int(places.offsets[sample_id + 1])
        try:
            return self._files.span(sample_id, begin, end)
        except OSError as error:
            raise DataError(f"{self.file_of(sample_id)} cannot be read: {error.strerror}; {self._tars.fix}") from error

    def prepare(self, sample_ids: Iterable[int]) -> None:
        """See ShardFiles."""
        self._files.prepare(sample_ids)

    def hint(self, sample_ids: Iterable[int]) -> None:
        """See ShardFiles."""
        self._files.hint(sample_ids)


def _shards_of(directory: Path | str, record: DatasetRecord, split: str) -> list[ShardRecord]:
    if split not in record.splits or record.splits[split].samples == 0:
        there = [name for name, found in record.splits.items() if found.samples]
        raise DataError(
            f"{directory} has no samples of split {split!r}; the splits there: {', '.join(there) or 'none'}"
            + shard_format.split_fix(split, there)
        )
    found = record.splits[split]
    if found.samples != sum(shard.samples for shard in found.shards):
        fix = SHARD_WORDING.fix
        raise DataError(f"{directory}/{DATASET_FILE}: {split} has not as many samples as its shards; {fix}")
    return found.shards


def is_hashed(data: DataConfig) -> bool:
    """True if `hash_files` does what `data.verify` asks for."""
    return data.verify == "hash" and data.row.files in (Files.SHARDS, Files.BETONS)


def hash_files(data: DataConfig, part: int, parts: int) -> Iterator[None]:
    """Compare every `parts`-th file of a data set that is open, from `part` on, with its SHA-256.

    So several processes that read the same files each hash a part of them. Yields after each piece that is read. Raises
    DataError if a file differs, or if it is at a URL.
    """
    directory = dataset_directory(staged_copy(data.path) or data.path)
    splits = dict.fromkeys([data.val_split] if data.is_stream else [data.train_split, data.val_split])
    if data.row.files == Files.BETONS:
        betons = [beton_path(Path(directory), split) for split in splits]
        hashes = [hash_file(path, read_record(path), BETON_WORDING) for path in betons]
    else:
        record = read_dataset_record(directory, data.timeout)
        tars = record.tars_of(directory)
        shards = [shard for split in splits for shard in record.splits[split].shards]
        if isinstance(tars, str):
            open_place(tars, RemoteUse.of(data, training=False)).check(shards, by_hash=True)
        hashes = [hash_file(Path(tars) / shard.name, shard, SHARD_WORDING) for shard in shards]
    return itertools.chain.from_iterable(hashes[part::parts])
