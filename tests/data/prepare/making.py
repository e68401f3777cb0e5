"""Runs of the scripts that convert a source, in this process."""

from pathlib import Path

from karat_scale.data.prepare import make_ffcv, make_webdataset
from karat_scale.data.prepare.images import Preparation
from karat_scale.data.shards.beton import BetonSplit


def make_shards(src: Path, out: Path, *options: str) -> None:
    make_webdataset.main(["--src", str(src), "--out", str(out), *options])


def make_betons(src: Path, out: Path, *options: str) -> None:
    workers = () if "--workers" in options else ("--workers", "1")
    make_ffcv.main(["--src", str(src), "--out", str(out), *workers, *options])


def beton_samples(out: Path, split: str, classes: int = 3) -> list[tuple[str, int, bytes]]:
    beton = BetonSplit(out, split, classes, "hash")
    return [(beton.locate(i)[0], int(beton.labels[i]), beton.read(i)) for i in range(len(beton))]


def prepared(data: bytes) -> bytes:
    """The bytes of an image in a shard, by the scripts' defaults."""
    return Preparation().prepare(data, "a.jpg").data
