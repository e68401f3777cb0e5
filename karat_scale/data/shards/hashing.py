"""`data.verify: hash` where several processes read the same files: each hashes a part of them."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from karat_scale.data.shards import beton
from karat_scale.data.shards.cache import RemoteUse
from karat_scale.data.shards.shard_format import dataset_directory, hash_file, read_dataset_record, staged_copy
from karat_scale.data.shards.shards import WORDING, open_place
from karat_scale.foundation.tables import Files
from karat_scale.recipe import DataConfig


def is_hashed(data: DataConfig) -> bool:
    """True if `hash_files` does what `data.verify` asks for."""
    return data.verify == "hash" and data.row.files in (Files.SHARDS, Files.BETONS)


def hash_files(data: DataConfig, part: int, parts: int) -> Iterator[None]:
    """Compare every `parts`-th file of a data set that is open, from `part` on, with its SHA-256.

    Yields after each piece that is read. Raises DataError if a file differs, or if it is at a URL.
    """
    directory = dataset_directory(staged_copy(data.path) or data.path)
    splits = dict.fromkeys([data.val_split] if data.is_stream else [data.train_split, data.val_split])
    if data.row.files == Files.BETONS:
        betons = [beton.beton_path(Path(directory), split) for split in splits]
        hashes = [hash_file(path, beton.read_record(path), beton.WORDING) for path in betons]
    else:
        record = read_dataset_record(directory, data.timeout)
        tars = record.tars_of(directory)
        shards = [shard for split in splits for shard in record.splits[split].shards]
        if isinstance(tars, str):
            open_place(tars, RemoteUse.of(data, training=False)).check(shards, by_hash=True)
        hashes = [hash_file(Path(tars) / shard.name, shard, WORDING) for shard in shards]
    return itertools.chain.from_iterable(hashes[part::parts])
