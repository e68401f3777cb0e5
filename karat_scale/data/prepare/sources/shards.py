"""Finished shards as a source: samples in the shards' own order, with the shards' keys and labels."""

import hashlib
from pathlib import Path

import numpy as np

from karat_scale.data.prepare.sources.base import Source
from karat_scale.data.shards.index import KEY, read_column
from karat_scale.data.shards.shard_format import DATASET_FILE, DatasetRecord, chosen_splits, read_dataset_record
from karat_scale.data.shards.shards import ShardSplit


class ShardSource(Source):
    """One split of a directory of shards. See Source. Raises DataError if the shards are not right."""

    def __init__(self, directory: Path, split: str, record: DatasetRecord) -> None:
        self._split = ShardSplit(directory, split, len(record.classes))
        indexes = [(directory / shard.index.name).read_bytes() for shard in record.splits[split].shards]
        sizes = np.concatenate([read_column(index, "size") for index in indexes])
        super().__init__(record.classes, self._split.labels, sizes)
        self.grey = record.splits[split].grey
        self._keys = np.concatenate([read_column(index, KEY) for index in indexes])
        self._hashes = [shard.sha256 for shard in record.splits[split].shards]

    def name(self, index: int) -> str:
        return self.key(index)

    def key(self, index: int) -> str:
        return bytes(self._keys[index]).decode(errors="backslashreplace")

    def read(self, index: int) -> bytes:
        return self._split.read(index)

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(self._hashes).encode()).hexdigest()


def has_shards(src: Path) -> bool:
    """True if this is a directory of finished shards."""
    return (src / DATASET_FILE).is_file()


def open_shards(src: Path, split: str | None) -> tuple[dict[str, ShardSource], list[str]]:
    """Return the requested splits of a directory of shards, and its classes' readable names. Raises DataError."""
    record = read_dataset_record(src)
    chosen = chosen_splits(src, record, split)
    return {name: ShardSource(src, name, record) for name, found in chosen.items() if found.samples}, record.names
