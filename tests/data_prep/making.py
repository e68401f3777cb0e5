"""Runs of the scripts that convert a source, in this process."""

from pathlib import Path

import tests.data_prep.conftest  # noqa: F401  puts data_prep on the path
from karat_scale.data.formats.beton import BetonSplit


def make_shards(src: Path, out: Path, *options: str) -> None:
    from make_webdataset import main

    main(["--src", str(src), "--out", str(out), *options])


def make_betons(src: Path, out: Path, *options: str) -> None:
    from make_ffcv import main

    main(["--src", str(src), "--out", str(out), *(() if "--workers" in options else ("--workers", "1")), *options])


def beton_samples(out: Path, split: str, classes: int = 3) -> list[tuple[str, int, bytes]]:
    beton = BetonSplit(out, split, classes, "hash")
    return [(beton.locate(i)[0], int(beton.labels[i]), beton.read(i)) for i in range(len(beton))]


def prepared(data: bytes) -> bytes:
    """The bytes of an image in a shard, by the scripts' defaults."""
    from preparing import Preparation

    return Preparation().prepare(data, "a.jpg").data
