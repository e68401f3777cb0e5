"""Random access into the shards of one split, checked against dataset.json and the indexes."""

import os
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from karat_scale.data.formats import checks
from karat_scale.data.formats.index import key_of, keys_of, read_columns
from karat_scale.data.formats.readahead import Readahead
from karat_scale.data.formats.shard_format import (
    DATASET_FILE,
    INDEX_FIELDS,
    DatasetRecord,
    FileRecord,
    ShardRecord,
    read_dataset_record,
)
from karat_scale.errors import DataError

MAX_OPEN_SHARDS = 256
FIX = "copy the shards again or make them again with data_prep/make_webdataset.py"

WORDING = checks.Wording(DATASET_FILE, FIX, f"is missing, though {DATASET_FILE} lists it")


class ShardSplit:
    """The samples of one split: sample ids 0 .. len - 1 over all shards in order.

    Opening reads the indexes and checks every shard's size, or with verify="hash" its SHA-256. Raises
    DataError, one line, if anything is missing, cut short, changed or out of range. `labels` is int32 [len].

    readahead: the number of samples in a block that the system reads ahead when one of them is read, for an order
    that uses few blocks at a time; 0 for none.
    """

    def __init__(
        self,
        directory: Path | str,
        split: str,
        num_classes: int,
        verify: Literal["size", "hash"] = "size",
        readahead: int = 0,
    ) -> None:
        self.directory = Path(directory).expanduser()
        record = read_dataset_record(self.directory)
        self._tars = record.tars_of(self.directory)
        self.classes = tuple(record.classes)
        self._shards = self._split_record(record, split)
        checks.check_class_count(self.directory, len(self.classes), num_classes)
        columns: dict[str, list[Any]] = {name: [] for name in INDEX_FIELDS}
        for shard in self._shards:
            check_file(self._tars, shard, by_hash=verify == "hash")
            for name, values in self._read_index(shard).items():
                columns[name].append(values)
        self.labels = np.concatenate([*columns["label"], np.empty(0, np.int32)])
        self._offsets = np.concatenate([*columns["offset"], np.empty(0, np.int64)])
        self._sizes = np.concatenate([*columns["size"], np.empty(0, np.int64)])
        self._crcs = np.concatenate([*columns["crc32"], np.empty(0, np.uint32)])
        self._starts = np.cumsum([0, *(shard.samples for shard in self._shards)])
        self._files: OrderedDict[int, int] = OrderedDict()
        self._readahead = Readahead(readahead, self._offsets, self._sizes)

    def _split_record(self, record: DatasetRecord, split: str) -> list[ShardRecord]:
        if split not in record.splits or record.splits[split].samples == 0:
            there = ", ".join(name for name, found in record.splits.items() if found.samples) or "none"
            raise DataError(f"{self.directory} has no samples of split {split!r}; the splits there: {there}")
        found = record.splits[split]
        if found.samples != sum(shard.samples for shard in found.shards):
            raise DataError(f"{self.directory / DATASET_FILE}: {split} has not as many samples as its shards; {FIX}")
        return found.shards

    def _read_index(self, shard: ShardRecord) -> dict[str, Any]:
        path = self.directory / shard.index.name
        data = checks.read_checked(path, shard.index, WORDING)
        try:
            index = read_columns(data, INDEX_FIELDS, shard.samples, shard.bytes)
        except ValueError as error:
            raise DataError(f"{path} does not fit its shard {shard.name}: {error}; {FIX}") from None
        wrong = np.flatnonzero((index["label"] < 0) | (index["label"] >= len(self.classes)))
        if len(wrong):
            sample, label = wrong[0], index["label"][wrong[0]]
            raise DataError(
                f"{self.directory / shard.name}: sample {key_of(data, sample)} has label {label}, but "
                f"dataset.json lists {len(self.classes)} classes; correct them and make the shards again"
            )
        return index

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, sample_id: int) -> bytes:
        """Return the encoded image. Raises DataError naming the shard if it has changed since it was indexed."""
        number = self._shard_of(sample_id)
        shard = self._shards[number]
        path = self._tars / shard.name
        size = int(self._sizes[sample_id])
        try:
            file = self._file(number, path)
            self._readahead.ask(file, sample_id, int(self._starts[number]), int(self._starts[number + 1]))
            data = os.pread(file, size, int(self._offsets[sample_id]))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; {FIX}") from error
        # Without its hash, a shard was indexed by its headers alone, and its CRCs are unknown.
        if len(data) != size or (shard.sha256 and zlib.crc32(data) != self._crcs[sample_id]):
            key, _ = self.locate(sample_id)
            what = "is cut short" if len(data) != size else "has changed since its index was written"
            raise DataError(f"{path} {what}: sample {key} differs; {FIX}")
        return data

    def locate(self, sample_id: int) -> tuple[str, str]:
        """Return the key of a sample and the name of its shard, for messages."""
        number = self._shard_of(sample_id)
        shard = self._shards[number]
        path = self.directory / shard.index.name
        try:
            return key_of(path.read_bytes(), sample_id - int(self._starts[number])), shard.name
        except (OSError, ValueError, IndexError):  # the index has changed: the place is all that is known
            return f"number {sample_id - int(self._starts[number])}", shard.name

    def keys(self) -> list[str]:
        """Return the key of each sample. Raises DataError if an index has changed."""
        indexes = (
            checks.read_checked(self.directory / shard.index.name, shard.index, WORDING) for shard in self._shards
        )
        return [key for data in indexes for key in keys_of(data)]

    def file_of(self, sample_id: int) -> str:
        """Return the path of the shard that holds a sample."""
        return str(self._tars / self._shards[self._shard_of(sample_id)].name)

    def _shard_of(self, sample_id: int) -> int:
        return int(np.searchsorted(self._starts, sample_id, side="right")) - 1

    def _file(self, number: int, path: Path) -> int:
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        if len(self._files) >= MAX_OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        self._files[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[number]

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        # Descriptors have no meaning in a process that was not forked.
        return {**self.__dict__, "_files": OrderedDict()}


def check_file(directory: Path, record: FileRecord, by_hash: bool) -> None:
    """Compare a file with its record by size or by SHA-256. Raises DataError."""
    checks.check_file(directory / record.name, record, by_hash, WORDING)
