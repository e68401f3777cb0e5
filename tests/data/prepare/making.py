"""Helpers that run the scripts that convert a source in this process, and read the results."""

from pathlib import Path
from types import ModuleType

from karat_scale.data.prepare import make_ffcv, make_webdataset
from karat_scale.data.prepare.images import Preparation
from karat_scale.data.shards.beton import BetonSplit
from karat_scale.data.shards.shard_format import DatasetRecord, read_dataset_record
from karat_scale.data.shards.shards import IndexedSplit, ShardSplit


def run(script: ModuleType, src: Path, out: Path, *options: str) -> None:
    script.main(["--src", str(src), "--out", str(out), "--workers", "1", *options])  # the last of two --workers counts


def make_shards(src: Path, out: Path, *options: str) -> DatasetRecord:
    run(make_webdataset, src, out, *options)
    return read_dataset_record(out)


def make_betons(src: Path, out: Path, *options: str) -> None:
    run(make_ffcv, src, out, *options)


def samples(split: IndexedSplit) -> list[tuple[str, int, bytes]]:
    """Return key, label and bytes of each sample."""
    return [(split.locate(i)[0], int(split.labels[i]), split.read(i)) for i in range(len(split))]


def shard_samples(out: Path, split: str = "train") -> list[tuple[str, int, bytes]]:
    return samples(ShardSplit(out, split, 1000, "hash"))


def beton_samples(out: Path, split: str = "train") -> list[tuple[str, int, bytes]]:
    return samples(BetonSplit(out, split, 1000, "hash"))


def prepared(data: bytes) -> bytes:
    """Return the bytes of an image in a shard, by the scripts' defaults."""
    return Preparation().prepare(data, "a.jpg").data
