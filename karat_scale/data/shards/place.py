"""Where the files of a data set are: a directory, or a URL. Both are asked for the same."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from karat_scale.data.shards import checks
from karat_scale.data.shards.readahead import Blocks
from karat_scale.data.shards.shard_files import LocalShardFiles, SamplePlaces, ShardFiles
from karat_scale.data.shards.shard_format import DATASET_FILE, FileRecord, ShardRecord

FIX = "copy the shards again or make them again with data_prep/make_webdataset.py"
WORDING = checks.Wording(DATASET_FILE, FIX, f"is missing, though {DATASET_FILE} lists it")


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
            checks.check_file(self._directory / shard.name, shard, by_hash, WORDING)

    def read_checked(self, record: FileRecord) -> bytes:
        """See Place."""
        return checks.read_checked(self._directory / record.name, record, WORDING)

    def read_all_checked(self, records: Sequence[FileRecord]) -> Iterator[bytes]:
        """See Place."""
        return map(self.read_checked, records)

    def files(self, places: SamplePlaces, readahead: Blocks) -> ShardFiles:
        """See Place."""
        return LocalShardFiles(self._directory, places, readahead)
